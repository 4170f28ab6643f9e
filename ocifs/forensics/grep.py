"""Searches the data of an image's files, visible or not, and the bytes between them; each span decoded once.

Data is gone through as it lies in the layers (`ocifs.forensics.sweep`), so matches come by layer and offset.

*Lines.* A pattern is one of Python's for bytes (`re`), with ``^`` and ``$`` for the ends of lines. What is searched at once
are whole lines, as many as a span has, so a pattern that matches a newline may match over several. A line that reaches over
spans is put together up to `MAX_LINE` bytes and cut there; a match over the cut is not found. What is shown of a line is as
long at most. Holes are not searched: they end a line.

*Binary* is a file with a NUL byte in its first 32 KiB, or with a hole.

Not here: output, and exit statuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from ocifs.forensics.hashes import content_of
from ocifs.forensics.sweep import Stream, Wanted, sweep
from ocifs.tree import Kind

if TYPE_CHECKING:
    from ocifs.errors import OcifsError
    from ocifs.forensics.examination import Examination
    from ocifs.history import Version

MAX_LINE: Final = 1 << 20
"""Bytes of a line that are kept to be searched together with what follows."""

_PEEK: Final = 32 << 10


class Match(NamedTuple):
    """A place where the pattern matches."""

    file_offset: int
    """Of its first byte; of slack, in the gap."""
    layer_offset: int
    text: bytes
    """What matches."""
    line: bytes
    """The line or lines that it is in, without the newline at the end."""
    line_offset: int
    """Where in the file those begin."""
    binary: bool


Sink = Callable[[Stream, Match], bool]
"""Is told of a match; says whether it wants more of this stream. The stream's ``entry`` is -1 for a gap."""


def grep(
    examination: Examination, pattern: re.Pattern[bytes], names: Names, sink: Sink, *, slack: bool = False
) -> Iterator[tuple[Stream, OcifsError]]:
    """Search every content that ``names`` wants, and with ``slack`` what is no file's data, by layer and offset.

    Gives the streams that could not be read to their end; ``sink`` gets all that matches.
    """

    def begin(stream: Stream, *, whole: bool) -> _Searching:
        return _Searching(pattern, stream, sink, whole=whole)

    swept = sweep(examination.layers, names.wanted, begin, gaps=slack, evidence=examination.evidence)
    for stream, searching, error in swept:
        searching.tell()
        if error is not None:
            yield stream, error


class _Searching:
    """Takes one stream.

    In a thread only finds out whether there is a match, and keeps the data if there is: less than a span. What tells of
    matches is the iterating thread, so that they come in order and none has to be kept.
    """

    def __init__(self, pattern: re.Pattern[bytes], stream: Stream, sink: Sink, *, whole: bool) -> None:
        self._pattern = pattern
        self._stream = stream
        self._sink = sink
        self._whole = whole
        self._kept: list[tuple[bytes, int, int]] = []
        """(lines, file_offset, layer_offset), to be told of."""
        self._carried = b""
        """The beginning of a line."""
        self._file_offset = 0
        self._layer_offset = stream.layer_offset
        """Where the next bytes are."""
        self._binary = False
        self._enough = False

    def take(self, data: memoryview) -> None:
        if not self._file_offset:
            self._binary = b"\0" in bytes(data[:_PEEK])
        if self._whole:
            if self._pattern.search(data):
                self._kept.append((bytes(data), self._file_offset, self._layer_offset))
        elif not self._enough:
            lines = b"".join((self._carried, data))
            stop = lines.rfind(b"\n") + 1
            if len(lines) - stop > MAX_LINE:
                stop = len(lines)
            self._search(lines[:stop])
            self._carried = lines[stop:]
        self._file_offset += len(data)
        self._layer_offset += len(data)

    def hole(self, size: int) -> None:
        self._binary = True
        self.finish()
        self._file_offset += size

    def finish(self) -> None:
        carried, self._carried = self._carried, b""
        if carried and not self._enough:
            at = self._file_offset - len(carried)
            self._tell(carried, at, self._layer_offset - len(carried))

    def tell(self) -> None:
        """Tell of what was kept."""
        for lines, file_offset, layer_offset in self._kept:
            if not self._enough:
                self._tell(lines, file_offset, layer_offset)

    def _search(self, lines: bytes) -> None:
        """Tell of matches in the next lines; what was carried stands before what is taken now."""
        before = len(self._carried)
        self._tell(lines, self._file_offset - before, self._layer_offset - before)

    def _tell(self, lines: bytes, file_offset: int, layer_offset: int) -> None:
        start = stop = -1
        line = b""
        for match in self._pattern.finditer(lines):
            first, last = match.span()
            if first == len(lines) and lines.endswith(b"\n"):
                return  # behind the last line there is none
            if first > stop or last > stop:
                start = lines.rfind(b"\n", 0, first) + 1
                stop = lines.find(b"\n", max(first, last - 1))
                stop = len(lines) if stop < 0 else stop
                if stop - start > MAX_LINE:
                    start += (first - start) // MAX_LINE * MAX_LINE
                    stop = min(stop, start + MAX_LINE)
                line = lines[start:stop]
            found = Match(file_offset + first, layer_offset + first, match[0], line, file_offset + start, self._binary)
            if not self._sink(self._stream, found):
                self._enough = True
                return


class Names:
    """Which contents are to be searched, and under which names they are known.

    Keeps eight bytes for each content, and the paths of hard links.
    """

    def __init__(self, examination: Examination, wanted: Callable[[Version], bool]) -> None:
        """Want the content of every version that is a file and that ``wanted`` says yes to."""
        self.wanted = Wanted()
        self._history = examination.history
        self._wants = wanted
        self._linked: dict[tuple[int, int], list[Version]] = {}
        for version in examination.history:
            if version.kind == Kind.FILE and version.extents and wanted(version):
                content = content_of(version)
                self.wanted.add(content.layer, content.layer_offset)
                if version.hard_link:
                    self._linked.setdefault((content.layer, content.layer_offset), []).append(version)
        self.wanted.settle()

    def of(self, stream: Stream) -> list[Version]:
        """Give the versions that show a content, its own entry's first."""
        own = self._history.by_entry(stream.layer, stream.entry)
        return [own] * self._wants(own) + self._linked.get((stream.layer, stream.layer_offset), [])
