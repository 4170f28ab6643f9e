"""Decode every span of an image with ocifs's own decoder, as many at a time as told: `spans.py REF CACHE THREADS`.

Run by the interpreter ocifs is installed for. Prints two numbers: nanoseconds for the decoding alone, and the bytes that
came out. Each span's SHA-256 is checked on the way, as it is for a mount.
"""

from __future__ import annotations

import concurrent.futures
import sys
import time
from pathlib import Path

from ocifs.image import ImageOptions, open_image
from ocifs.store import Store


def main() -> None:
    """Decode, count, print."""
    reference, cache, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    with Store(cache) as store, open_image(reference, store, ImageOptions()) as image:
        work = [(layer.data, span) for layer in image.layers for span in range(len(layer.data.index.spans))]
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            began = time.perf_counter_ns()
            total = sum(pool.map(lambda one: len(one[0].decode(one[1])), work))
            print(time.perf_counter_ns() - began, total)


if __name__ == "__main__":
    main()
