"""Who ``User`` is: looked up in the image's own files as config.md and conversion.md say, whatever those files hold."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocifs import image
from ocifs.bundle.users import GROUPS_MAX, LIMIT, Account, UnknownUserError, account_in, find_account
from ocifs.errors import DamagedError, OcifsError
from ocifs.image import ImageOptions
from ocifs.rootfs import view as look
from ocifs.store import Store
from tests.support import layout
from tests.support.tarball import DIR, FIFO, HARDLINK, SYMLINK, entry, tarball

if TYPE_CHECKING:
    from pathlib import Path

PASSWD = b"""\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1::/:/usr/sbin/nologin
ada:x:1000:100:Ada,,,:/home/ada:/bin/sh
1000:x:7:8::/seven:
short:x:50:51
grace:x:1001:1001
ada:x:9:9::/second:
"""
GROUP = b"""\
root:x:0:
wheel:x:10:ada,grace
users:x:100:ada
audio:x:29:adam,ada
again:x:10:ada
nobody:x:99
"""


def account(user: str, passwd: bytes = PASSWD, group: bytes = GROUP) -> Account:
    name, _, of_group = user.encode().partition(b":")
    return account_in(passwd, group, name, of_group)


@pytest.mark.parametrize(
    ("user", "uid", "gid", "groups", "home"),
    [
        ("", 0, 0, (), "/root"),
        ("ada", 1000, 100, (10, 100, 29), "/home/ada"),
        ("1000", 1000, 100, (), "/home/ada"),
        ("1000:", 1000, 100, (), "/home/ada"),
        ("ada:", 1000, 100, (10, 100, 29), "/home/ada"),
        ("ada:wheel", 1000, 10, (), "/home/ada"),
        ("ada:77", 1000, 77, (), "/home/ada"),
        ("1000:audio", 1000, 29, (), "/home/ada"),
        ("1000:77", 1000, 77, (), "/home/ada"),
        ("4242", 4242, 0, (), "/"),
        ("4242:4243", 4242, 4243, (), "/"),
        ("4242:nobody", 4242, 99, (), "/"),
        ("007", 7, 8, (), "/seven"),
        (":wheel", 0, 10, (), "/root"),
        ("short", 50, 51, (), "/"),
        ("grace", 1001, 1001, (10,), "/"),
        ("root", 0, 0, (), "/root"),
        ("4294967294", 4294967294, 0, (), "/"),
    ],
)
def test_a_user_is(user: str, uid: int, gid: int, groups: tuple[int, ...], home: str) -> None:
    assert account(user) == Account(uid, gid, groups, home)


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("alan", "the image has no user 'alan': /etc/passwd does not list it"),
        ("alan:10", "the image has no user 'alan': /etc/passwd does not list it"),
        ("ada:alans", "the image has no group 'alans': /etc/group does not list it"),
        ("1000:alans", "the image has no group 'alans': /etc/group does not list it"),
        ("-1", "the image has no user '-1': /etc/passwd does not list it"),
        ("4294967295", "'4294967295' is no user id: ids go from 0 to 4294967294"),
        ("1:4294967295", "'4294967295' is no group id: ids go from 0 to 4294967294"),
        ("9" * 5000, f"'{'9' * 100}' is no user id: ids go from 0 to 4294967294"),
    ],
)
def test_an_unknown_user_is_an_error(user: str, message: str) -> None:
    with pytest.raises(UnknownUserError) as raised:
        account(user)
    assert str(raised.value) == message
    assert raised.value.exit_code == 3


@pytest.mark.parametrize(
    "line",
    [
        b"ada",
        b"ada:x",
        b"ada:x:5",
        b"ada:x:5:",
        b"ada:x::5:::",
        b"ada:x:-5:5:::",
        b"ada:x:0x5:5:::",
        b"ada:x:5.0:5:::",
        b"ada:x:4294967295:5:::",
        b"ada:x:" + b"5" * 100_000 + b":5:::",
        b"#ada:x:5:5:::",
        b" ada:x:5:5:::",
        b"+ada:x:5:5:::",
        b"\0ada:x:5:5:::",
        b":" * 1_000_000,
        b"\xff" * 1_000_000,
        b"",
    ],
    ids=range(17),
)
def test_what_is_no_entry_is_passed_over(line: bytes) -> None:
    assert account("ada", line + b"\n" + PASSWD).uid == 1000
    with pytest.raises(UnknownUserError):
        account("ada", line)


@pytest.mark.parametrize("home", [b"", b"relative", b"/\xff", b"/a\0b"])
def test_a_home_that_cannot_be_said_is_the_root(home: bytes) -> None:
    assert account("ada", b"ada:x:5:6::%b:" % home, b"") == Account(5, 6, (), "/")


def test_a_last_line_without_an_end_counts() -> None:
    assert account("ada", b"ada:x:5:6::/home:/bin/sh", b"a:x:7:ada").groups == (7,)
    assert account("ada", b"ada:x:5:6::/home:/bin/sh", b"a:x:7:eve,ada\r").groups == (7,)


def test_more_groups_than_a_process_can_have_are_refused() -> None:
    lines = b"".join(b"g:x:%d:ada\n" % number for number in range(GROUPS_MAX + 1))
    with pytest.raises(DamagedError, match="'ada' of the image is in more than 65536 groups"):
        account("ada", PASSWD, lines)


@given(passwd=st.binary(), group=st.binary(), user=st.text(max_size=9))
def test_no_files_raise_anything_but_our_errors(passwd: bytes, group: bytes, user: str) -> None:
    with contextlib.suppress(OcifsError):
        account(user, passwd, group)


# -- through an image's tree ---------------------------------------------------------------------------------------


def found(tmp_path: Path, *entries: bytes, user: str = "ada") -> Account:
    """Look a user up in an image with one layer."""
    layout.write_layout(tmp_path / "image", [tarball(*entries)])
    store = Store(tmp_path / "cache")
    try:
        with image.open_image(f"oci:{tmp_path / 'image'}", store, ImageOptions()) as opened:
            return find_account(look(opened), user)
    finally:
        store.close()


ADA = Account(1000, 100, (10, 100, 29), "/home/ada")


def test_the_files_of_the_image_are_read(tmp_path: Path) -> None:
    assert found(tmp_path, entry("etc/passwd", data=PASSWD), entry("etc/group", data=GROUP)) == ADA


def test_links_are_followed_inside_the_image(tmp_path: Path) -> None:
    entries = (
        entry("etc", type=SYMLINK, link="/../../usr/etc"),
        entry("usr/etc/passwd", type=SYMLINK, link="../../../../../../lib/passwd"),
        entry("lib/passwd", data=PASSWD),
        entry("lib/group", data=GROUP),
        entry("usr/etc/group", type=HARDLINK, link="lib/group"),
    )
    assert found(tmp_path, *entries) == ADA


@pytest.mark.parametrize(
    "entries",
    [
        (),
        (entry("etc/passwd/", type=DIR), entry("etc/group/", type=DIR)),
        (entry("etc/passwd", type=FIFO), entry("etc/group", type=FIFO)),
        (entry("etc/passwd", type=SYMLINK, link="/not/there"), entry("etc/group", type=SYMLINK, link="group")),
        (entry("etc", data=b"a file"),),
        (entry("etc/passwd"), entry("etc/group")),
    ],
    ids=["none", "directories", "fifos", "links", "etc is a file", "empty"],
)
def test_without_the_files_only_numbers_are_users(tmp_path: Path, entries: tuple[bytes, ...]) -> None:
    assert found(tmp_path, *entries, user="5:6") == Account(5, 6)
    with pytest.raises(UnknownUserError):
        found(tmp_path, *entries, user="root")


def test_of_a_huge_file_only_its_beginning_counts(tmp_path: Path) -> None:
    passwd = PASSWD.ljust(LIMIT, b"\n") + b"late:x:5:6:::\n"
    entries = (entry("etc/passwd", data=passwd), entry("etc/group", data=GROUP))
    assert found(tmp_path, *entries) == ADA
    with pytest.raises(UnknownUserError):
        found(tmp_path, *entries, user="late")
