"""What looks at a mount: functions that run in a process of their own and answer in JSON.

``python -m tests.support.agent FUNCTION`` with the arguments as a JSON array in the open file whose descriptor
``OCIFS_AGENT_ARGUMENTS`` tells, and the seconds it may live in ``OCIFS_AGENT_LIMIT``. Names are text
with surrogate escapes both ways. Nothing but the standard library is used, and nothing of ocifs: what is seen here is what
the kernel says.

Not here: who starts this, with which time limit (`tests.support.mounting`), and what is expected.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import errno
import hashlib
import json
import mmap
import os
import random
import select
import signal
import stat
import subprocess
import sys
from typing import Any

KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
PIECE = 1 << 20


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY)
    try:
        while piece := os.read(fd, PIECE):
            digest.update(piece)
    finally:
        os.close(fd)
    return digest.hexdigest()


def _xattrs(path: str) -> dict[str, str]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return {}  # no inode of the file system has any
    return {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in names}


def _described(path: str, *, content: bool) -> dict[str, Any]:
    status = os.lstat(path)
    kind = KINDS[stat.S_IFMT(status.st_mode)]
    seen: dict[str, Any] = {
        "kind": kind,
        "mode": f"{stat.S_IMODE(status.st_mode):04o}",
        "uid": status.st_uid,
        "gid": status.st_gid,
        "mtime_ns": status.st_mtime_ns,
        "nlink": status.st_nlink,
        "ino": status.st_ino,
        "size": status.st_size,
        "blksize": status.st_blksize,
        "blocks": status.st_blocks,
        "xattrs": _xattrs(path),
    }
    if kind == "symlink":
        seen["target"] = os.readlink(path)
    if kind in {"char", "block"}:
        seen["rdev"] = [os.major(status.st_rdev), os.minor(status.st_rdev)]
    if kind == "file" and content:
        try:
            seen["sha256"] = _sha256(path)
        except OSError as error:
            seen["sha256"] = errno.errorcode[error.errno or 0]
    return seen


def walk(root: str, what: str = "content") -> dict[str, Any]:
    """Path (relative; the root is ``.``) → everything that stat, readlink, getxattr say of it, and reading if asked."""
    content = what == "content"
    seen = {".": _described(root, content=content)}
    stack = [""]
    while stack:
        here = stack.pop()
        for name in os.listdir(f"{root}/{here}"):
            path = f"{here}{name}"
            seen[path] = _described(f"{root}/{path}", content=content)
            if seen[path]["kind"] == "dir":
                stack.append(path + "/")
    return seen


def described(path: str) -> dict[str, Any]:
    """Describe one name."""
    return _described(path, content=True)


def sha256(path: str) -> str:
    """Hash a file, or name the error that reading it gave."""
    try:
        return _sha256(path)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def read(path: str, offset: int, size: int) -> str:
    """Give bytes of a file as hex, or the name of the error."""
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            return os.pread(fd, size, offset).hex()
        finally:
            os.close(fd)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def pieces(path: str, offsets: list[int], size: int) -> list[str]:
    """Give for each offset the SHA-256 of ``size`` bytes there, or the name of the error."""
    answers = []
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead into what another offset stands for
    for offset in offsets:
        try:
            answers.append(hashlib.sha256(os.pread(fd, size, offset)).hexdigest())
        except OSError as error:
            answers.append(errno.errorcode[error.errno or 0])
    os.close(fd)
    return answers


def errors(calls: list[list[Any]]) -> list[str]:
    """Give for each ``[name of a function of os, arguments…]`` the name of its errno, or ``ok``."""
    return [_error_of(call) for call in calls]


def _error_of(call: list[Any]) -> str:
    name, *arguments = call
    arguments = [one.encode() if isinstance(one, str) and one.startswith("bytes:") else one for one in arguments]
    try:
        result = getattr(os, name)(*arguments)
        if name == "open":
            os.close(result)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def access(path: str, mode: int) -> str:
    """Give what access(2) says: ``ok`` or the errno (os.access hides it)."""
    libc = ctypes.CDLL(None, use_errno=True)
    return "ok" if libc.access(os.fsencode(path), mode) == 0 else errno.errorcode[ctypes.get_errno()]


def as_user(user: int, root: str, function: str, arguments: list[Any]) -> Any:
    """Run another of these functions in the directory ``root`` as a user who may not do much; paths are relative."""
    os.chdir(root)  # while the way there is open to us
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    return globals()[function](*arguments)


def statfs(path: str) -> dict[str, int]:
    """Give statvfs(3)."""
    answer = os.statvfs(path)
    return {name: getattr(answer, name) for name in dir(answer) if name.startswith("f_")}


# -- every way to write --------------------------------------------------------------------------------------------


def write_attempts(root: str) -> dict[str, str]:
    """Try every system call that changes a file system; needs ``file``, ``dir/`` and ``link`` (a symlink) below root."""
    file, folder, new = f"{root}/file", f"{root}/dir", f"{root}/new"
    attempts: dict[str, list[Any]] = {
        "open O_WRONLY": ["open", file, os.O_WRONLY],
        "open O_RDWR": ["open", file, os.O_RDWR],
        "open O_APPEND": ["open", file, os.O_WRONLY | os.O_APPEND],
        "open O_TRUNC": ["open", file, os.O_WRONLY | os.O_TRUNC],
        "open O_RDONLY O_TRUNC": ["open", file, os.O_RDONLY | os.O_TRUNC],
        "open O_CREAT": ["open", new, os.O_WRONLY | os.O_CREAT],
        "open O_CREAT O_EXCL": ["open", new, os.O_RDWR | os.O_CREAT | os.O_EXCL],
        "truncate": ["truncate", file, 0],
        "mkdir": ["mkdir", new],
        "rmdir": ["rmdir", folder],
        "unlink": ["unlink", file],
        "rename": ["rename", file, new],
        "rename onto": ["rename", file, f"{root}/link"],
        "link": ["link", file, new],
        "symlink": ["symlink", "target", new],
        "mknod fifo": ["mknod", new, stat.S_IFIFO | 0o600],
        "mknod file": ["mknod", new, stat.S_IFREG | 0o600],
        "mknod device": ["mknod", new, stat.S_IFCHR | 0o600, os.makedev(1, 3)],
        "chmod": ["chmod", file, 0o777],
        "chmod directory": ["chmod", folder, 0o700],
        "chown": ["chown", file, 1, 1],
        "lchown": ["lchown", f"{root}/link", 1, 1],
        "utimensat": ["utime", file],
        "setxattr": ["setxattr", file, "user.new", b"value"],
        "setxattr replaced": ["setxattr", file, "user.note", b"value"],
        "removexattr": ["removexattr", file, "user.note"],
    }
    return {what: _error_of(call) for what, call in attempts.items()}


def remount_writable(path: str) -> str:
    """Remount without MS_RDONLY, by the system call: mount(8) would ask FUSE's helper, which refuses. Gives the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    remount, nosuid, nodev = 32, 2, 4  # MS_* of linux/mount.h
    done = libc.mount(b"none", os.fsencode(path), None, ctypes.c_ulong(remount | nosuid | nodev), b"")
    return "ok" if done == 0 else errno.errorcode[ctypes.get_errno()]


def directory_syncs(root: str) -> list[str]:
    """Give what fsync(2) says of a file and a directory, and fdatasync(2) of the file: there is nothing to sync."""
    said = []
    for path, sync in ((f"{root}/file", os.fsync), (f"{root}/file", os.fdatasync), (f"{root}/dir", os.fsync)):
        fd = os.open(path, os.O_RDONLY)
        try:
            sync(fd)
            said.append("ok")
        except OSError as error:
            said.append(errno.errorcode[error.errno or 0])
        os.close(fd)
    return said


# -- directory streams, as libc has them ---------------------------------------------------------------------------


class _Dirent(ctypes.Structure):
    """struct dirent of readdir(3) on 64-bit Linux."""

    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    )


class _Stream:
    """A directory stream."""

    def __init__(self, path: str) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.opendir.restype = ctypes.c_void_p
        self._libc.readdir.restype = ctypes.POINTER(_Dirent)
        self._libc.telldir.restype = ctypes.c_long
        self._dir = ctypes.c_void_p(self._libc.opendir(os.fsencode(path)))
        assert self._dir.value, os.strerror(ctypes.get_errno())

    def next(self) -> list[Any] | None:
        ctypes.set_errno(0)
        found = self._libc.readdir(self._dir)
        if not found:
            assert ctypes.get_errno() == 0, os.strerror(ctypes.get_errno())
            return None
        # d_name is longer than the field in what the kernel gives: read it to its NUL.
        name = ctypes.string_at(ctypes.addressof(found.contents) + _Dirent.d_name.offset)
        return [os.fsdecode(name), found.contents.d_ino, found.contents.d_type]

    def rest(self) -> list[list[Any]]:
        found = []
        while (entry := self.next()) is not None:
            found.append(entry)
        return found

    def tell(self) -> int:
        return int(self._libc.telldir(self._dir))

    def seek(self, position: int) -> None:
        self._libc.seekdir(self._dir, ctypes.c_long(position))

    def rewind(self) -> None:
        self._libc.rewinddir(self._dir)

    def close(self) -> None:
        self._libc.closedir(self._dir)


def entries(path: str) -> list[list[Any]]:
    """Give the entries of a directory as readdir(3) does, in its order: [name, d_ino, d_type]."""
    stream = _Stream(path)
    found = stream.rest()
    stream.close()
    return found


def seek_everywhere(path: str, every: int) -> dict[str, Any]:
    """Go back to every so manieth position of a directory stream, in a shuffled order, and compare what follows.

    Gives how many entries there are, how many positions were tried, and those from where something else followed; and what
    is read after rewinddir(3), and from a second stream that is at another place.
    """
    stream, other = _Stream(path), _Stream(path)
    names: list[str] = []
    positions: list[tuple[int, int]] = []
    while True:
        if len(names) % every == 0:
            positions.append((len(names), stream.tell()))
        entry = stream.next()
        if entry is None:
            break
        names.append(entry[0])
    random.Random(1).shuffle(positions)
    wrong = []
    for number, position in positions:
        stream.seek(position)
        other.next()
        following = [entry[0] for _ in range(5) if (entry := stream.next()) is not None]
        if following != names[number : number + 5]:
            wrong.append(number)
    stream.rewind()
    again = [entry[0] for entry in stream.rest()]
    other_rest = [entry[0] for entry in other.rest()]
    stream.close()
    other.close()
    return {
        "entries": len(names),
        "positions": len(positions),
        "wrong": wrong,
        "rewound": again == names,
        "other": other_rest == names[len(positions) :],
    }


# -- reading in other ways -----------------------------------------------------------------------------------------


def mapped(path: str, how: str) -> str:
    """Hash a file through a mapping: shared and read-only, or private, written to and read again."""
    with open(path, "rb") as file:
        if how == "private":
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
                first = view[0]
                view[0] = first ^ 0xFF
                assert view[0] == first ^ 0xFF
                view[0] = first
                return hashlib.sha256(view).hexdigest()
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as view:
            step = mmap.PAGESIZE
            backwards = sum(view[at] for at in range(len(view) - len(view) % step, -1, -step) if at < len(view))
            assert backwards >= 0
            return hashlib.sha256(view).hexdigest()


def reads_of_every_kind(path: str) -> dict[str, bool]:
    """Compare reads of odd sizes, by pread, backwards, direct and by sendfile with a plain read of the whole."""
    with open(path, "rb") as file:
        whole = file.read()
    seen: dict[str, bool] = {}
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    odd: list[bytes] = []
    at = 0
    sizes = [1, 7, 511, 513, 4095, 4097, 131071, 131073, 1 << 20]
    while piece := os.pread(fd, sizes[len(odd) % len(sizes)], at):
        odd.append(piece)
        at += len(piece)
    seen["odd sizes"] = b"".join(odd) == whole
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    step = 100_003
    starts = range(0, len(whole), step)
    seen["backwards"] = b"".join(reversed([os.pread(fd, step, start) for start in reversed(starts)])) == whole
    seen["beyond the end"] = os.pread(fd, 10, len(whole)) == b"" and os.pread(fd, 10, len(whole) + (1 << 40)) == b""
    seen["across the end"] = os.pread(fd, 100, max(0, len(whole) - 3)) == whole[-3:]
    seen["SEEK_END"] = os.lseek(fd, 0, os.SEEK_END) == len(whole)
    os.lseek(fd, 0, os.SEEK_SET)
    reader, writer = os.pipe()
    sent = os.sendfile(writer, fd, 0, min(len(whole), 60_000))
    os.close(writer)
    got = b""
    while piece := os.read(reader, 1 << 16):
        got += piece
    os.close(reader)
    seen["sendfile"] = got == whole[:sent]
    os.close(fd)
    seen["direct"] = _direct(path) in (whole, None)
    return seen


def _direct(path: str) -> bytes | None:
    """Read a file past the kernel's pages; None if its file system cannot do that."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
    buffer = mmap.mmap(-1, 1 << 20)
    parts: list[bytes] = []
    while count := os.preadv(fd, [buffer], sum(len(part) for part in parts)):
        parts.append(buffer[:count])
    os.close(fd)
    return b"".join(parts)


def _fork() -> int:
    """Fork; the child dies with its parent."""
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    return pid


def readers(paths: list[str], expected: dict[str, str], count: int, rounds: int, seconds: float = 0) -> dict[str, Any]:
    """Let ``count`` processes read all files, each in an order of its own and dropping the kernel's pages first.

    Each does ``rounds`` of them, or goes on for ``seconds``. Gives how many files were read and which came out wrong.
    """
    children = []
    for number in range(count):
        reader, writer = os.pipe()
        pid = _fork()
        if pid == 0:
            os.close(reader)
            with os.fdopen(writer, "w") as out:
                json.dump(_read_all(paths, expected, number, rounds, seconds), out)
            os._exit(0)
        os.close(writer)
        children.append((pid, reader))
    read_files, wrong = 0, []
    for pid, reader in children:
        with os.fdopen(reader) as told:
            done, bad = json.load(told)
        os.waitpid(pid, 0)
        read_files += done
        wrong += bad
    return {"read": read_files, "wrong": wrong}


def _read_all(
    paths: list[str], expected: dict[str, str], seed: int, rounds: int, seconds: float
) -> tuple[int, list[str]]:
    import time  # noqa: PLC0415  (only for a run that is asked to last)

    order, wrong, done = random.Random(seed), [], 0
    until = time.monotonic() + seconds
    while rounds > 0 or time.monotonic() < until:
        rounds -= 1
        for path in order.sample(paths, len(paths)):
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
            done += 1
            try:
                got = _sha256(path)
            except OSError as error:
                got = str(error)
            if got != expected[path]:
                wrong.append(f"{path}: {got}")
            if rounds <= 0 and time.monotonic() >= until and seconds:
                break
    return done, wrong


# -- for the life cycle --------------------------------------------------------------------------------------------


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def hold(path: str) -> str:
    """Say that ``path`` is open, and keep it so until standard input ends; then say what reading it gives."""
    fd = os.open(path, os.O_RDONLY)
    _tell("holding")
    sys.stdin.read()
    try:
        return hashlib.sha256(os.pread(fd, 1 << 26, 0)).hexdigest()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def hold_directory(path: str) -> str:
    """Work in a directory until standard input ends."""
    os.chdir(path)
    _tell("holding")
    sys.stdin.read()
    return "ok"


def hold_mapping(path: str) -> str:
    """Keep a file mapped, its descriptor closed, until standard input ends."""
    with open(path, "rb") as file:
        view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    _tell("holding")
    sys.stdin.read()
    view.close()
    return "ok"


def keep_reading(path: str, size: int) -> int:
    """Read pieces of a file from the daemon, never from the kernel's pages, until standard input ends.

    After each a line is written to standard error. Gives how many there were.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    length = os.fstat(fd).st_size
    buffer = mmap.mmap(-1, size)
    at = count = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        os.preadv(fd, [buffer], at)
        at = (at + (2 << 20) + size) % (length - size) & ~4095
        count += 1
        _tell(str(count))
    return count


def crowds(path: str, count: int) -> int:
    """For each line of standard input have a process of ``count`` threads send requests to the daemon, and kill it.

    Threads, for they all die at once, in microseconds. The moment is a random one, by the number of requests that we get
    answered ourselves meanwhile. An attribute that is asked for is never kept by the kernel, so each call is a request.
    """
    order, rounds = random.Random(1), 0
    for _ in sys.stdin:
        pid = _fork()
        if pid == 0:
            for _ in range(count - 1):
                _thread.start_new_thread(_ask_without_end, (path,))
            _ask_without_end(path)
        for _ in range(order.randrange(5, 60)):
            _ask(path)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        rounds += 1
        _tell("killed")
    return rounds


def _ask_without_end(path: str) -> None:
    while True:
        _ask(path)


def ask_without_end(path: str) -> None:
    """Send requests until killed."""
    _tell("asking")
    _ask_without_end(path)


def _ask(path: str) -> None:
    with contextlib.suppress(OSError):
        os.getxattr(path, "user.nothing")


def run_there(root: str, words: list[str]) -> list[Any]:
    """Run a program in a root directory of its own: [status, output, what it complained about]."""
    os.chroot(root)
    os.chdir("/")
    done = subprocess.run(words, capture_output=True, check=False, text=True)
    return [done.returncode, done.stdout, done.stderr]


def main() -> None:
    """Run the function that the first word names."""
    signal.alarm(int(os.environ["OCIFS_AGENT_LIMIT"]))  # ends us even if who started us is gone
    told = int(os.environ["OCIFS_AGENT_ARGUMENTS"])
    arguments = json.loads(os.pread(told, os.fstat(told).st_size, 0))
    os.close(told)
    json.dump(globals()[sys.argv[1]](*arguments), sys.stdout)


if __name__ == "__main__":
    main()
