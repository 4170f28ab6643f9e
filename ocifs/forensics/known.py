"""Lists of known files: which of an image's hashes are in one.

A list is read once, front to back, and only what the image has is kept; so it may be as large as it likes, and text may come
out of a pipe. These are recognised by what is in them:

* hashdeep's output (its columns say which hash is where), sha256sum's and its kin's, ``NAME (file) = HASH`` of BSD, and one
  plain hash a line; the hash of the first line says which algorithm it is, by its length;
* the reference data set of the NSRL, version 3: an SQLite database with a table or view ``FILE`` (in the full set over the
  table ``METADATA``) of the columns ``sha256``, ``sha1`` and ``md5``. If SQLite has an index of the hash each of the
  image's hashes is looked up, else all rows are gone through.

Not here: hashing (`ocifs.forensics.hashes`).
"""

from __future__ import annotations

import contextlib
import re
from itertools import chain
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol

from ocifs.errors import MachineError, NotFoundError, OcifsError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

_SQLITE: Final = b"SQLite format 3\0"
_BY_LENGTH: Final = {64: "sha256", 40: "sha1", 32: "md5"}
_STRONGEST: Final = ("sha256", "sha1", "md5")
_HASH: Final = re.compile(rb"\\?([0-9A-Fa-f]{32}(?:[0-9A-Fa-f]{8}(?:[0-9A-Fa-f]{24})?)?)(?=[\s*]|$)")
_TAGGED: Final = re.compile(rb"\\?[A-Za-z0-9-]+ \(.*\) = ([0-9A-Fa-f]+)\s*$", re.DOTALL)
_MAX_LINE: Final = 1 << 16


class KnownListError(OcifsError):
    """A list of known files is of no kind that is understood (exit 2)."""

    exit_code = 2


class KnownList(Protocol):
    """A list of known files."""

    algorithm: str
    """Whose hashes it has, as in `ocifs.forensics.hashes.ALGORITHMS`."""

    def among(self, digests: set[bytes]) -> set[bytes]:
        """Give those of ``digests`` that are in the list, which is read now: once."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


@contextlib.contextmanager
def opened_list(path: str) -> Iterator[KnownList]:
    """Open a list.

    Raises `NotFoundError` if there is none, `MachineError` if it cannot be read, `KnownListError` if it is not understood.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 (the list closes it)
        with contextlib.ExitStack() as stack:
            stack.callback(file.close)
            # A pipe is read once only, so this looks ahead.
            found = _ReferenceDataSet(path) if file.peek(len(_SQLITE)).startswith(_SQLITE) else _HashList(path, file)
            stack.pop_all()
    except FileNotFoundError:
        raise NotFoundError(f"there is no list of known files {path}") from None
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        yield found
    finally:
        found.close()
        file.close()


def _unreadable(path: str, error: OSError) -> MachineError:
    return MachineError(f"cannot read the list of known files {path}: {error.strerror}")


class _HashList:
    """Lines of text."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._column = -1
        self._left = self._hashes()
        first = next(self._left, None)
        if first is None:
            raise KnownListError(f"{path} is no list of known files: it holds no MD5, SHA-1 or SHA-256")
        self._first = first
        self.algorithm = _BY_LENGTH[len(first[1])]

    def close(self) -> None:
        """Nothing to do: who opened the file closes it."""

    def among(self, digests: set[bytes]) -> set[bytes]:
        found = set()
        try:
            for line, text in chain([self._first], self._left):
                if _BY_LENGTH[len(text)] != self.algorithm:
                    raise KnownListError(
                        f"line {line} of {self._path} has a hash of another kind than {self.algorithm}"
                    )
                digest = bytes.fromhex(text.decode("ascii"))
                if digest in digests:
                    found.add(digest)
        except OSError as error:
            raise _unreadable(self._path, error) from error
        return found

    def _hashes(self) -> Iterator[tuple[int, bytes]]:
        """Give each line's number and hash."""
        number = 0
        while line := self._file.readline(_MAX_LINE):
            number += 1
            found = self._hash(line)
            if found is not None:
                yield number, found
            elif line.strip() and not line.startswith((b"#", b"%%%%")):
                raise KnownListError(f"line {number} of {self._path} begins with no MD5, SHA-1 or SHA-256")

    def _hash(self, line: bytes) -> bytes | None:
        if line.startswith(b"%%%%"):
            columns = line.strip().split(b" ")[-1].split(b",")
            known = [columns.index(name.encode()) for name in _STRONGEST if name.encode() in columns]
            self._column = known[0] if known else self._column
            return None
        if line.startswith(b"#"):
            return None
        if self._column >= 0:
            line = line.split(b",", self._column + 1)[self._column] if line.count(b",") > self._column else b""
        match = _HASH.match(line) or _TAGGED.match(line)
        return match[1] if match and len(match[1]) in _BY_LENGTH else None


class _ReferenceDataSet:
    """An SQLite database of the NSRL."""

    def __init__(self, path: str) -> None:
        import sqlite3  # noqa: PLC0415 (only who has such a list needs it)
        from urllib.parse import quote  # noqa: PLC0415 (likewise)

        self._path = path
        self._failed = sqlite3.Error
        try:
            self._database = sqlite3.connect(f"file:{quote(path)}?mode=ro&immutable=1", uri=True)
            self._table, self.algorithm = self._place()
        except sqlite3.Error as error:
            raise self._damaged(error) from error

    def close(self) -> None:
        self._database.close()

    def among(self, digests: set[bytes]) -> set[bytes]:
        try:
            if self._indexed(self._table):
                return {digest for digest in digests if self._has(digest.hex())}
            return digests & {digest for digest in self._all() if digest in digests}
        except self._failed as error:
            raise self._damaged(error) from error

    def _place(self) -> tuple[str, str]:
        """Say which table and which hash to look at: one with an index if there is one."""
        found = [(table, name) for table in ("FILE", "METADATA") for name in _STRONGEST if name in self._columns(table)]
        if not found:
            raise KnownListError(f"{self._path} is no reference data set of the NSRL: it has no table FILE with hashes")
        self.algorithm = found[0][1]
        same = [table for table, name in found if name == self.algorithm]
        return next((table for table in same if self._indexed(table)), same[0]), self.algorithm

    def _columns(self, table: str) -> set[str]:
        rows = self._database.execute(f"PRAGMA table_info({table})")
        return {str(row[1]).lower() for row in rows}

    def _select(self, table: str) -> str:
        return f"SELECT 1 FROM {table} WHERE {self.algorithm} IN (?, ?) LIMIT 1"  # noqa: S608 (both are words of ours)

    def _indexed(self, table: str) -> bool:
        plan = self._database.execute("EXPLAIN QUERY PLAN " + self._select(table), ("", ""))
        return any(str(row[3]).startswith("SEARCH") for row in plan)

    def _has(self, digest: str) -> bool:
        return self._database.execute(self._select(self._table), (digest.upper(), digest)).fetchone() is not None

    def _all(self) -> Iterator[bytes]:
        rows: sqlite3.Cursor = self._database.execute(f"SELECT {self.algorithm} FROM {self._table}")  # noqa: S608 (as above)
        for (text,) in rows:
            try:
                yield bytes.fromhex(text)
            except (TypeError, ValueError):
                continue

    def _damaged(self, error: Exception) -> KnownListError:
        return KnownListError(f"the database {self._path} cannot be read: {error}")
