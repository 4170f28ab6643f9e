"""What is done with the contenders, and how long it takes them.

Each workload goes round by round, and in each round from contender to contender, beginning with another one each time: a
machine that is slower for a while is so for everybody. *Cold* is a fresh mount after the kernel dropped its caches, with
the programs that do the work read in again; *warm* is the same once more, at once. What a contender delivered is compared
with what the kernel's overlayfs does; whoever delivers something else has no figure.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmark import contenders
from benchmark import images as images_module
from benchmark.contenders import Mounter
from benchmark.images import Contents, Images, Layout
from benchmark.machine import Tools, say
from benchmark.processes import (
    FailedError,
    anonymous_memory,
    forget_caches,
    mounted,
    piped,
    run,
    served,
    several,
    used,
)
from benchmark.report import Book, percentile

STATES = ("cold", "warm")
FIRST = "etc/os-release"
"""The first file read of a mount that was never seen."""
TOLERANCE = 0.001
"""The part by which two tars of one tree may differ in size: padding, and which of several hard links comes first."""
SLOW = 40.0
"""Seconds a slow contender may take for what the others do in one or two."""
UMOCI_ROUNDS = 2
"""It takes as long as all the others together, and is ten times slower than what it is compared with."""
IMPORT = ("python3", "-c", "import numpy; print(numpy.__version__)")

ZLIB = """
import sys, zlib
inflater, blob = zlib.decompressobj(31), open(sys.argv[1], "rb")
while piece := blob.read(1 << 20):
    inflater.decompress(piece)
"""


class WrongError(FailedError):
    """A contender did less than the work, or other work: its figures are void."""


class Effort(NamedTuple):
    """How much a run may take."""

    rounds: int
    limit: float
    """Seconds one command may take."""
    idle: float
    """Seconds for which idle mounts are watched."""
    reads: int
    """Random reads."""
    until: float
    """When to stop beginning things (time.monotonic())."""
    wide: bool
    """Whether images of a million entries take part."""
    thorough: bool
    """Whether slow contenders take part, and everything is done both cold and warm."""


class Setting(NamedTuple):
    """Everything a workload needs."""

    checkout: Path
    work: Path
    tools: Tools
    images: Images
    contents: Contents
    mounters: list[Mounter]
    only: frozenset[str]
    """Contenders that take part; all if empty."""
    reader: Path
    effort: Effort
    book: Book

    @property
    def place(self) -> Path:
        """Where contenders mount, one at a time."""
        return self.work / "mnt"

    def wants(self, contender: str) -> bool:
        """Whether a contender takes part."""
        return not self.only or contender in self.only

    def prime(self, layout: Layout) -> Path:
        """Have the layers of an image indexed in the cache that stays; give the cache."""
        cache = self.work / "cache"
        for driver in ("fuse", "erofs"):
            with contenders.ocifs(self.tools, driver, cache, layout, self.place):
                pass
        return cache


# -- rounds --------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """A contender's turn: what it is to do, noting samples as it goes."""

    contender: str
    act: Callable[[], None]
    rows: tuple[str, ...]
    lacking: str = ""
    most: int = 1000
    """Rounds after which enough is known of it."""


def rounds(setting: Setting, name: str, turns: Sequence[Turn]) -> None:
    """Give every contender its turn, several times over, the order moving on by one each round."""
    book, effort = setting.book, setting.effort
    playing = []
    for turn in turns:
        if not setting.wants(turn.contender):
            continue
        if turn.lacking:
            _excuse(book, turn, turn.lacking)
        else:
            playing.append(turn)
    for number in range(effort.rounds):
        start = number % len(playing) if playing else 0
        for turn in [*playing[start:], *playing[:start]]:
            if number >= turn.most:
                continue
            if time.monotonic() > effort.until:
                _excuse(book, turn, "the time given was over")
                continue
            began = time.monotonic()
            try:
                turn.act()
            except (FailedError, OSError) as error:
                _excuse(book, turn, str(error), void=isinstance(error, WrongError))
                playing.remove(turn)
                say(f"{name}: {turn.contender}: {error}")
            else:
                say(f"{name}, round {number + 1}: {turn.contender}, {time.monotonic() - began:.1f} s in all")


def _excuse(book: Book, turn: Turn, reason: str, *, void: bool = False) -> None:
    for row in turn.rows:
        if void:
            book.samples.pop((row, turn.contender), None)
        if (row, turn.contender) not in book.samples:
            book.note(row, turn.contender, reason)


def _states(*keys: str) -> tuple[str, ...]:
    return tuple(f"{key}.{state}" for key in keys for state in STATES)


Samples = Iterable[tuple[str, float]]
"""What one go yields: rows without their state, and values."""


def on_mounts(
    setting: Setting,
    name: str,
    keys: tuple[str, ...],
    task: Callable[[Mounter, Path], Samples],
    warm_up: Sequence[str | Path],
    *,
    memory: bool = True,
) -> None:
    """Do a task on a mount of each contender, cold and warm, and note the daemon's memory after that."""
    book = setting.book

    def act(mounter: Mounter) -> None:
        with mounter.mount(setting.place) as pid:
            for state in STATES:
                if state == "cold":
                    forget_caches()
                    run(*warm_up, keep=False)
                for key, value in task(mounter, setting.place):
                    book.add(f"{key}.{state}", mounter.key, value)
            if pid is not None and memory:
                book.add(f"memory.{name}", mounter.key, anonymous_memory(pid))

    turns = [
        Turn(mounter.key, partial(act, mounter), _states(*keys), mounter.lacking)
        for mounter in setting.mounters
        if not mounter.sits_out(name, thorough=setting.effort.thorough)
    ]
    rounds(setting, name, turns)
    for mounter in setting.mounters:
        if mounter.superset and any((row, mounter.key) in book.samples for row in _states(*keys)):
            book.remark(f"{mounter.key}: {mounter.superset}.")


def compare(what: str, got: float, wanted: float, mounter: Mounter, *, tolerance: float = 0) -> None:
    """Raise WrongError if a contender did not deliver what it should have; one that shows more may deliver more."""
    if got < wanted * (1 - tolerance) or (got > wanted * (1 + tolerance) and not mounter.superset):
        raise WrongError(f"delivered {got:,.0f} {what} where {wanted:,.0f} were to be had")


def _grumble(setting: Setting, key: str, mounter: Mounter, complaint: str) -> None:
    """Say that a program was not content although all was there; where not all was there, `compare` has said so."""
    if complaint:
        for row in _states(key):
            setting.book.note(row, mounter.key, complaint)


def truth(setting: Setting) -> contextlib.AbstractContextManager[None]:
    """The kernel's overlayfs over the unpacked layers, for what is right."""
    return mounted(setting.place, *contenders.overlay_words(setting.images), setting.place)


# -- trees ---------------------------------------------------------------------------------------------------------


def find(setting: Setting) -> None:
    """`find -ls`: every name and every inode's attributes."""

    def task(mounter: Mounter, place: Path) -> Samples:
        limit = min(setting.effort.limit, SLOW) if mounter.only_in else setting.effort.limit
        ran = run("find", place, "-ls", limit=limit, forgive=True)
        compare("names", ran.output.count(b"\n"), setting.contents.entries, mounter)
        _grumble(setting, "find", mounter, ran.complaint)
        yield "find", ran.seconds

    on_mounts(setting, "find", ("find",), task, ("find", "--version"))


def tar(setting: Setting) -> None:
    """`tar` of the whole tree to a pipe: every attribute and every byte."""
    with truth(setting):
        wanted = piped("tar", "-C", setting.place, "-cf", "-", ".").size

    def task(mounter: Mounter, place: Path) -> Samples:
        ran = piped("tar", "-C", place, "-cf", "-", ".", limit=setting.effort.limit, forgive=True)
        compare("bytes of tar", ran.size, wanted, mounter, tolerance=TOLERANCE)
        _grumble(setting, "tar", mounter, ran.complaint)
        yield "tar", ran.seconds

    on_mounts(setting, "tar", ("tar",), task, ("tar", "--version"))


# -- files ---------------------------------------------------------------------------------------------------------


class Read(NamedTuple):
    """What the reader says: nanoseconds in all, bytes, a checksum; nanoseconds of each random read."""

    nanoseconds: int
    size: int
    check: int
    each: list[int]


def read(setting: Setting, words: Sequence[str], feed: bytes, place: Path) -> Read:
    """Run the reader in a mount."""
    ran = run(setting.reader, *words, feed=feed, cwd=place, limit=setting.effort.limit)
    nanoseconds, size, check, *each = map(int, ran.output.split())
    return Read(nanoseconds, size, check, each)


def _checked(
    setting: Setting,
    name: str,
    words: Sequence[str],
    feed: bytes,
    keys: Sequence[str],
    samples: Callable[[Read], Samples],
) -> None:
    """Have the reader read on each contender's mount, and compare bytes and checksum with the truth."""
    with truth(setting):
        wanted = read(setting, words, feed, setting.place)

    def task(_: Mounter, place: Path) -> Samples:
        got = read(setting, words, feed, place)
        if (got.size, got.check) != (wanted.size, wanted.check):
            raise WrongError("delivered other bytes than the rest")
        yield from samples(got)

    on_mounts(setting, name, tuple(keys), task, (setting.reader, "files", "1"), memory=name != "large")


def _nul(words: Iterable[bytes]) -> bytes:
    return b"".join(word + b"\0" for word in words)


def small(setting: Setting) -> None:
    """Open, read, close: every small file, in the order of their paths."""
    paths = setting.contents.small

    def samples(got: Read) -> Samples:
        yield "small", got.nanoseconds / len(paths) / 1000

    _checked(setting, "small", ("files", "1"), _nul(paths), ("small",), samples)
    setting.book.remark(
        f"small files: {len(paths):,} regular files of at most {images_module.SMALL >> 10} KiB, in the order of their paths."
    )
    _reader_alone(setting)


def _reader_alone(setting: Setting) -> None:
    """What the reader itself costs: the same files on tmpfs."""
    paths, place = setting.contents.small, setting.work / "tmpfs"
    place.mkdir(exist_ok=True)
    with mounted(place, "mount", "-t", "tmpfs", "-o", "mode=0700", "tmpfs", place):
        with truth(setting):
            run(
                "tar", "-C", setting.place, "--null", "--no-recursion", "-T", "-", "-cf", place / "files.tar",
                feed=_nul(b"./" + path for path in paths),
            )  # fmt: skip
        run("tar", "-C", place, "-xf", place / "files.tar")
        for _ in range(3):
            got = read(setting, ("files", "1"), _nul(paths), place)
            setting.book.add("small.warm", "tmpfs", got.nanoseconds / len(paths) / 1000)


def large(setting: Setting) -> None:
    """The largest file from its beginning to its end."""

    def samples(got: Read) -> Samples:
        yield "large", got.size / got.nanoseconds * 1000

    _checked(setting, "large", ("files", "1"), _nul([setting.contents.large]), ("large",), samples)
    setting.book.remark(f"large file: {os.fsdecode(setting.contents.large)}, read 128 KiB at a time.")


def random(setting: Setting) -> None:
    """4 KiB each at places all over the larger files."""
    places = setting.contents.random
    feed = _nul(word for place in places for word in (place.path, b"%d" % place.offset))

    def samples(got: Read) -> Samples:
        yield "random-p50", percentile(got.each, 0.5) / 1000
        yield "random-p99", percentile(got.each, 0.99) / 1000

    _checked(setting, "random", ("random",), feed, ("random-p50", "random-p99"), samples)
    setting.book.remark(f"random reads: {len(places):,} in files of at least 1 MiB, the same places for everybody.")


def readers(setting: Setting) -> None:
    """Eight readers at once, each reading an eighth of all files whole."""

    def samples(got: Read) -> Samples:
        yield "readers", got.nanoseconds / 1e9

    _checked(setting, "readers", ("files", "8"), _nul(setting.contents.files), ("readers",), samples)


# -- from nothing --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fresh(path: Path) -> Iterator[Path]:
    """A place that does not exist yet, and does not any more afterwards."""
    shutil.rmtree(path, ignore_errors=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def first(setting: Setting) -> None:
    """An image that was never seen, until a first file of it is read; and what decompressing its layers takes alone."""
    layout, tools, limit = setting.images.reference, setting.tools, max(setting.effort.limit, 300)

    def ocifs(driver: str) -> float:
        with fresh(setting.work / "new-cache") as cache:
            pid = None
            try:
                words = contenders.mount_words(tools, driver, cache, layout.reference, setting.place)
                seconds = run(*words, limit=limit).seconds
                seconds += run("cat", setting.place / FIRST).seconds
                pid = contenders.daemon_of(setting.place)
            finally:
                contenders.take_down(setting.place, pid)
            return seconds

    def umoci() -> float:
        with fresh(setting.work / "new-bundle") as bundle:
            words = ("umoci", "unpack", "--image", f"{layout.path}:{layout.tag}", bundle)
            return run(*words, limit=limit).seconds + run("cat", bundle / "rootfs" / FIRST).seconds

    def ratarmount() -> float:
        with fresh(setting.work / "new-indexes") as folder:
            folder.mkdir()
            words = contenders.ratarmount_words(tools, setting.images, folder, setting.place)
            began = time.perf_counter()
            with served(setting.place, *words, limit=limit):
                run("cat", setting.place / FIRST)
                return time.perf_counter() - began

    def each(*words: str | Path) -> Callable[[], float]:
        return lambda: sum(run(*words, blob, keep=False, limit=limit).seconds for blob in layout.blobs)

    measures: dict[str, tuple[Callable[[], float], str]] = {
        "ocifs-erofs": (lambda: ocifs("erofs"), ""),
        "ocifs-fuse": (lambda: ocifs("fuse"), ""),
        "umoci": (umoci, tools.missing.get("umoci", "")),
        "ratarmount": (ratarmount, tools.missing.get("ratarmount", "")),
        "rapidgzip": (each(tools.peers / "rapidgzip", "-P", "2", "-d", "-c"), tools.missing.get("rapidgzip", "")),
        "zlib": (each(tools.python, "-c", ZLIB), ""),
        "igzip": (each("igzip", "-d", "-c"), tools.missing.get("igzip", "")),
    }

    def act(contender: str, measure: Callable[[], float]) -> None:
        for state in STATES if setting.effort.thorough else ("cold",):
            forget_caches()
            if state == "warm":
                run("cat", *layout.blobs, keep=False)
                run(tools.ocifs, "--version")
            setting.book.add(f"first.{state}", contender, measure())

    turns = [
        Turn(
            key,
            partial(act, key, measure),
            _states("first") if setting.effort.thorough else ("first.cold",),
            lacking,
            UMOCI_ROUNDS if key == "umoci" else 1000,
        )
        for key, (measure, lacking) in measures.items()
    ]
    rounds(setting, "first", turns)


def is_mounted(setting: Setting) -> None:
    """An image whose layers are indexed, until `ocifs mount` has returned: the reference image, few and many entries."""
    wanted = [
        ("mounted", setting.images.reference),
        ("mounted-1k", images_module.wide(setting.checkout, setting.work, 1000)),
    ]
    if setting.effort.wide:
        wanted.append(("mounted-1m", images_module.wide(setting.checkout, setting.work, 1_000_000)))
    for _, layout in wanted:
        setting.prime(layout)

    def act(driver: str) -> None:
        for key, layout in wanted:
            for state in STATES:
                if state == "cold":
                    forget_caches()
                words = contenders.mount_words(
                    setting.tools, driver, setting.work / "cache", layout.reference, setting.place
                )
                pid = None
                try:
                    seconds = run(*words).seconds
                    pid = contenders.daemon_of(setting.place)
                    setting.book.add(f"{key}.{state}", f"ocifs-{driver}", seconds)
                finally:
                    contenders.take_down(setting.place, pid)

    def peer(mounter: Mounter) -> None:
        for state in STATES:
            if state == "cold":
                forget_caches()
            began = time.perf_counter()
            with mounter.mount(setting.place):
                setting.book.add(f"mounted.{state}", mounter.key, time.perf_counter() - began)

    rows = _states(*(key for key, _ in wanted))
    turns = [Turn(f"ocifs-{driver}", partial(act, driver), rows) for driver in ("erofs", "fuse")]
    turns += [
        Turn(mounter.key, partial(peer, mounter), _states("mounted"), mounter.lacking)
        for mounter in setting.mounters
        if mounter.key == "ratarmount"
    ]
    rounds(setting, "mounted", turns)


def scale(setting: Setting) -> None:
    """A thousand and a million entries in a hundred layers, ten thousand in one directory: indexed, listed; memory."""
    if not setting.effort.wide:
        setting.book.remark("A million entries took no part.")
        return
    sizes = (("1k", 1000, 100), ("10k", 10_000, 1), ("1m", 1_000_000, 100))
    layouts = [(name, entries, images_module.wide(setting.checkout, setting.work, entries, layers=layers))
               for name, entries, layers in sizes]  # fmt: skip
    limit = max(setting.effort.limit, 300)

    def act(driver: str) -> None:
        key = f"ocifs-{driver}"
        for name, entries, layout in layouts:
            with fresh(setting.work / "new-cache") as cache:
                forget_caches()
                pid = None
                try:
                    words = contenders.mount_words(setting.tools, driver, cache, layout.reference, setting.place)
                    setting.book.add(f"new-{name}", key, run(*words, limit=limit).seconds)
                    pid = contenders.daemon_of(setting.place)
                    if name != "1k":
                        _list(setting, key, name, entries)
                    if name == "1m":
                        setting.book.add("memory-1m", key, anonymous_memory(pid))
                finally:
                    contenders.take_down(setting.place, pid)

    rows = ("new-1k", "new-10k", "new-1m", "memory-1m", *_states("find-10k", "find-1m"))
    turns = [Turn(f"ocifs-{driver}", partial(act, driver), rows, most=2) for driver in ("erofs", "fuse")]
    rounds(setting, "scale", turns)


def _list(setting: Setting, key: str, name: str, entries: int) -> None:
    for state in STATES:
        if state == "cold":
            forget_caches()
            run("find", "--version")
        ran = run("find", setting.place, "-ls", limit=max(setting.effort.limit, 300))
        names = ran.output.count(b"\n")
        if names < entries:
            raise WrongError(f"find showed {names:,} names of {entries:,}")
        setting.book.add(f"find-{name}.{state}", key, ran.seconds)


# -- containers ----------------------------------------------------------------------------------------------------


def make_bundle(bundle: Path, root: Path) -> None:
    """An OCI runtime bundle: runc's own defaults, a read-only root, a command that imports numpy."""
    bundle.mkdir(parents=True, exist_ok=True)
    (bundle / "config.json").unlink(missing_ok=True)
    run("runc", "spec", "--bundle", bundle)
    config = json.loads((bundle / "config.json").read_bytes())
    config["process"]["terminal"] = False
    config["process"]["args"] = list(IMPORT)
    config["process"]["env"].append("PYTHONDONTWRITEBYTECODE=1")
    config["root"] = {"path": str(root), "readonly": True}
    (bundle / "config.json").write_text(json.dumps(config), encoding="utf-8")


def runc(setting: Setting) -> None:
    """Start a container that imports numpy, from nothing and from less and less."""
    bundle, state = setting.work / "bundle", setting.work / "runc"
    tools, layout = setting.tools, setting.images.reference
    lacking = tools.missing.get("runc", "")

    def start() -> float:
        ran = run("runc", "--root", state, "run", "--bundle", bundle, f"bench-{os.getpid()}-{time.monotonic_ns()}")
        if not ran.output.strip():
            raise WrongError("the container printed nothing")
        return ran.seconds

    def forget() -> None:
        forget_caches()
        run("runc", "--version")

    def mounter_acts(mounter: Mounter) -> None:
        make_bundle(bundle, setting.place)
        forget()
        began = time.perf_counter()
        with mounter.mount(setting.place):
            start()
            setting.book.add("runc.indexed", mounter.key, time.perf_counter() - began)
        with mounter.mount(setting.place):
            forget()
            setting.book.add("runc.cold", mounter.key, start())
            setting.book.add("runc.warm", mounter.key, start())
        if mounter.key.startswith("ocifs-"):
            with fresh(setting.work / "new-cache") as cache:
                forget()
                began = time.perf_counter()
                with contenders.ocifs(tools, mounter.key.removeprefix("ocifs-"), cache, layout, setting.place):
                    start()
                    setting.book.add("runc.new", mounter.key, time.perf_counter() - began)

    def umoci() -> None:
        with fresh(setting.work / "new-bundle") as unpacked:
            make_bundle(bundle, unpacked / "rootfs")
            forget()
            words = ("umoci", "unpack", "--image", f"{layout.path}:{layout.tag}", unpacked)
            seconds = run(*words, limit=max(setting.effort.limit, 300)).seconds
            setting.book.add("runc.new", "umoci", seconds + start())

    rows = ("runc.indexed", "runc.cold", "runc.warm")
    turns = [
        Turn(
            mounter.key,
            partial(mounter_acts, mounter),
            (*rows, "runc.new") if mounter.key.startswith("ocifs-") else rows,
            lacking or mounter.lacking,
        )
        for mounter in setting.mounters
        if not mounter.sits_out("runc", thorough=setting.effort.thorough)
    ]
    if setting.effort.thorough:
        missing = lacking or tools.missing.get("umoci", "")
        turns.append(Turn("umoci", umoci, ("runc.new",), missing, UMOCI_ROUNDS))
    rounds(setting, "runc", turns)


# -- alone ---------------------------------------------------------------------------------------------------------


def decode(setting: Setting) -> None:
    """Every span of the reference image decoded with two threads, against igzip on two layers at a time."""
    layout, tools = setting.images.reference, setting.tools
    cache = setting.prime(layout)
    total = sum(_uncompressed(setting))

    def spans() -> float:
        ran = run(tools.python, Path(__file__).with_name("spans.py"), layout.reference, cache, "2")
        nanoseconds, size = map(int, ran.output.split())
        if size != total:
            raise WrongError(f"decoded {size:,} bytes of {total:,}")
        return nanoseconds / 1e9

    def igzip() -> float:
        return several([("igzip", "-d", "-c", blob) for blob in layout.blobs], 2)

    def act(contender: str, measure: Callable[[], float]) -> None:
        for state in STATES:
            if state == "cold":
                forget_caches()
            setting.book.add(f"decode.{state}", contender, measure())

    rounds(
        setting,
        "decode",
        [
            Turn("ocifs-erofs", lambda: act("ocifs-erofs", spans), _states("decode")),
            Turn("igzip", lambda: act("igzip", igzip), _states("decode"), tools.missing.get("igzip", "")),
        ],
    )
    setting.book.remark(
        "decoding: the same for both drivers of ocifs; it checks every span's SHA-256, igzip each layer's CRC."
    )


def _uncompressed(setting: Setting) -> list[int]:
    layout = setting.images.reference
    return [blob.stat().st_size for blob in images_module.read_layout(layout.path, "plain").blobs]


def size(setting: Setting) -> None:
    """What is kept on disk of an image's layers, in percent of the blobs' size."""
    layout = setting.images.reference

    def kept(folder: Path) -> float:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / layout.size * 100

    def ocifs() -> None:
        with fresh(setting.work / "new-cache") as cache:
            with contenders.ocifs(setting.tools, "fuse", cache, layout, setting.place):
                pass
            setting.book.add("size.index", "ocifs-fuse", kept(cache))
            setting.book.add("size.index", "ocifs-erofs", kept(cache))

    def ratarmount() -> None:
        with fresh(setting.work / "new-indexes") as folder:
            folder.mkdir()
            words = contenders.ratarmount_words(setting.tools, setting.images, folder, setting.place)
            with served(setting.place, *words, limit=300):
                pass
            setting.book.add("size.index", "ratarmount", kept(folder))

    lacking = setting.tools.missing.get("ratarmount", "")
    turns = [
        Turn("ocifs-fuse", ocifs, ("size.index",), most=1),
        Turn("ratarmount", ratarmount, ("size.index",), lacking, most=1),
    ]
    rounds(setting, "size", turns)


def idle(setting: Setting) -> None:
    """Mounts that were used and are not any more, all watched at the same time: their daemons' CPU time and wake-ups."""
    effort, book = setting.effort, setting.book
    with contextlib.ExitStack() as stack:
        watched: dict[str, int] = {}
        for mounter in setting.mounters:
            if mounter.lacking or mounter.sits_out("idle", thorough=effort.thorough) or not setting.wants(mounter.key):
                continue
            place = setting.work / f"idle-{mounter.key}"
            place.mkdir(exist_ok=True)
            try:
                pid = stack.enter_context(mounter.mount(place))
                run("find", place, "-ls", keep=False, forgive=True, limit=effort.limit)
                run("cat", place / FIRST, keep=False)
            except FailedError as error:
                for row in ("idle.cpu", "idle.switches"):
                    book.note(row, mounter.key, str(error))
                continue
            if pid is not None:
                watched[mounter.key] = pid
        time.sleep(3)  # what a daemon does at once after its last request is not idleness
        before = {key: used(pid) for key, pid in watched.items()}
        began = time.monotonic()
        time.sleep(effort.idle)
        after = {key: used(pid) for key, pid in watched.items()}
        minutes = (time.monotonic() - began) / 60
    for key in watched:
        cpu, switches = after[key].since(before[key])
        book.add("idle.cpu", key, cpu / minutes)
        book.add("idle.switches", key, switches / minutes)
    say(f"idle: {', '.join(watched)}, {minutes:.1f} minutes")


WORKLOADS: dict[str, Callable[[Setting], None]] = {
    "first": first,
    "mounted": is_mounted,
    "find": find,
    "tar": tar,
    "small": small,
    "random": random,
    "runc": runc,
    "decode": decode,
    "large": large,
    "size": size,
    "idle": idle,
    "readers": readers,
    "scale": scale,
}
"""In the order in which they are run."""
