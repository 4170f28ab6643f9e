"""``python -m ocifs``: the same as the command ``ocifs``."""

from __future__ import annotations

import sys

from ocifs.cli import main

if __name__ == "__main__":
    sys.exit(main())
