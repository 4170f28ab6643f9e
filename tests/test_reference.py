"""References: what each form of the grammar means, and that nothing but an `OcifsError` ever comes out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocifs.errors import NotFoundError, OcifsError, UsageError
from ocifs.reference import Reference, Scheme, Selector, parse
from ocifs.spec import Digest

if TYPE_CHECKING:
    from collections.abc import Callable

HEX = "a" * 64
DIGEST = Digest("sha256", HEX)


def nothing(_path: bytes) -> bool:
    return False


def only(*paths: bytes) -> Callable[[bytes], bool]:
    return lambda path: path in paths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oci:/images/debian", (Scheme.OCI, b"/images/debian", Selector(), None)),
        ("oci:debian:12", (Scheme.OCI, b"debian", Selector(name="12"), None)),
        ("oci:debian:example.org/debian:12", (Scheme.OCI, b"debian", Selector(name="example.org/debian:12"), None)),
        ("oci:debian:@0", (Scheme.OCI, b"debian", Selector(number=0), None)),
        ("oci:debian:12#3", (Scheme.OCI, b"debian", Selector(name="12"), 3)),
        (f"oci:debian@sha256:{HEX}", (Scheme.OCI, b"debian", Selector(digest=DIGEST), None)),
        (f"oci:debian:@sha256:{HEX}", (Scheme.OCI, b"debian", Selector(digest=DIGEST), None)),
        (f"oci:debian:12@sha256:{HEX}#2", (Scheme.OCI, b"debian", Selector(name="12", digest=DIGEST), 2)),
        ("oci:with space\n", (Scheme.OCI, b"with space\n", Selector(), None)),
        ("oci:\udcff", (Scheme.OCI, b"\xff", Selector(), None)),
        ("ocidir:///images/debian:12", (Scheme.OCI, b"/images/debian", Selector(name="12"), None)),
        ("ocidir://images", (Scheme.OCI, b"images", Selector(), None)),
        ("oci-archive:a.tar:v1", (Scheme.OCI_ARCHIVE, b"a.tar", Selector(name="v1"), None)),
        ("docker-archive:a.tar:busybox:1.36", (Scheme.DOCKER_ARCHIVE, b"a.tar", Selector(name="busybox:1.36"), None)),
        ("docker-archive:a.tar:@1", (Scheme.DOCKER_ARCHIVE, b"a.tar", Selector(number=1), None)),
        ("dir:a:b", (Scheme.DIR, b"a:b", Selector(), None)),
        (f"dir:a@sha256:{HEX}", (Scheme.DIR, b"a", Selector(digest=DIGEST), None)),
        ("containerd:docker.io/library/redis:7", (Scheme.CONTAINERD, b"", Selector("docker.io/library/redis:7"), None)),
        (f"containerd:redis:7@sha256:{HEX}", (Scheme.CONTAINERD, b"", Selector("redis:7", digest=DIGEST), None)),
        (f"containerd:@sha256:{HEX}#1", (Scheme.CONTAINERD, b"", Selector(digest=DIGEST), 1)),
        ("containerd:", (Scheme.CONTAINERD, b"", Selector(), None)),
        ("containerd::@2", (Scheme.CONTAINERD, b"", Selector(number=2), None)),
    ],
)
def test_each_form_of_the_grammar(text: str, expected: tuple[Scheme, bytes, Selector, int | None]) -> None:
    assert parse(text, exists=nothing) == Reference(text, *expected)


def test_a_bare_path_that_exists_wins_over_any_other_reading() -> None:
    assert parse("oci:x", exists=only(b"oci:x")) == Reference("oci:x", Scheme.PATH, b"oci:x")
    assert parse("a#2", exists=only(b"a#2", b"a")) == Reference("a#2", Scheme.PATH, b"a#2")
    name = f"a@sha256:{HEX}"
    assert parse(name, exists=only(name.encode())) == Reference(name, Scheme.PATH, name.encode())


def test_a_bare_path_takes_a_layer_count_and_a_digest() -> None:
    assert parse("a#2", exists=only(b"a")) == Reference("a#2", Scheme.PATH, b"a", upto=2)
    text = f"a@sha256:{HEX}#2"
    assert parse(text, exists=only(b"a")) == Reference(text, Scheme.PATH, b"a", Selector(digest=DIGEST), 2)
    text = f"oci:a@sha256:{HEX}"
    assert parse(text, exists=only(b"oci:a")).path == b"oci:a"


def test_a_bare_path_takes_a_tag_where_the_path_exists() -> None:
    assert parse("a.tar:v1", exists=only(b"a.tar")) == Reference("a.tar:v1", Scheme.PATH, b"a.tar", Selector("v1"))
    assert parse("oci:v1", exists=only(b"oci")) == Reference("oci:v1", Scheme.OCI, b"v1")


def test_existence_is_asked_of_the_real_file_system_by_default(tmp_path: os.PathLike[str]) -> None:
    assert parse(os.fspath(tmp_path)) == Reference(os.fspath(tmp_path), Scheme.PATH, os.fsencode(tmp_path))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", UsageError, "empty"),
        ("a\0b", UsageError, "NUL"),
        ("/no/such/path", NotFoundError, "no such file or directory"),
        ("debian", NotFoundError, "no such file or directory"),
        ("docker:debian", UsageError, "'docker' is none of oci:, oci-archive:"),
        ("oci:", UsageError, "no path behind oci:"),
        ("oci::tag", UsageError, "no path behind oci:"),
        ("dir:", UsageError, "no path behind dir:"),
        ("oci:a:", UsageError, "nothing behind the colon"),
        ("oci:a:@x", UsageError, "behind :@ comes the number"),
        ("oci:a:@99999999999999999999", UsageError, "too large"),
        ("oci:a#0", UsageError, "layers count from 1"),
        ("oci:a#" + "9" * 5000, UsageError, "too large"),
        ("a#x", UsageError, "behind # would come"),
        ("oci:a@sha256:xyz", UsageError, "64 lower-case hex digits"),
        (f"oci:a@sha256:{HEX.upper()}", UsageError, "64 lower-case hex digits"),
    ],
)
def test_what_is_no_reference_says_why(text: str, error: type[OcifsError], message: str) -> None:
    with pytest.raises(error) as caught:
        parse(text, exists=nothing)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("alpine:latest", "docker://alpine:latest oci:alpine:latest"),
        ("alpine", "docker://alpine oci:alpine:latest"),
        ("alpine:3.20#2", "docker://alpine:3.20 oci:alpine:3.20"),
        ("docker.io/library/alpine", "docker://docker.io/library/alpine oci:alpine:latest"),
        ("example.org/a/b_c:v1.0", "docker://example.org/a/b_c:v1.0 oci:b_c:v1.0"),
        ("localhost:5000/x:1", "docker://localhost:5000/x:1 oci:x:1"),
        (f"debian@sha256:{HEX}", f"docker://debian@sha256:{HEX} oci:debian:latest"),
        ("docker://alpine", "docker://alpine oci:alpine:latest"),
        ("docker-daemon:app:1", "docker-daemon:app:1 oci:app:1"),
    ],
)
def test_of_a_name_in_a_registry_the_command_is_said_that_copies_it(text: str, command: str) -> None:
    with pytest.raises(OcifsError) as caught:
        parse(text, exists=nothing)
    assert str(caught.value).endswith(f"; if it is in a registry, copy it first: skopeo copy {command}")


@pytest.mark.parametrize(
    "text", ["./alpine", "/alpine", "../a/b", "app.tar", "images/app.tar", "Images/app", "oic:a/b:1"]
)
def test_of_what_can_be_no_name_in_a_registry_nothing_is_said_of_them(text: str) -> None:
    with pytest.raises(OcifsError) as caught:
        parse(text, exists=nothing)
    assert "skopeo" not in str(caught.value)


def test_c5_a_digest_of_an_unknown_algorithm_is_a_digest() -> None:
    parsed = parse("oci:a@blake3:" + "b" * 64, exists=nothing)
    assert parsed.selector.digest == Digest("blake3", "b" * 64)
    parsed = parse("oci:a@md5:" + "c" * 32, exists=nothing)
    assert parsed.selector.digest == Digest("md5", "c" * 32)


@given(
    st.one_of(
        st.text(),
        st.lists(
            st.sampled_from(["oci", "dir", "containerd", "ocidir://", ":", "@", "#", "1", "sha256", "a", "/", "\udcff"])
        ).map("".join),
    ),
    st.booleans(),
)
def test_any_text_is_a_reference_or_an_ocifs_error(text: str, there: bool) -> None:
    try:
        parsed = parse(text, exists=lambda _: there)
    except OcifsError as error:
        assert "\n" not in str(error)
    else:
        assert parsed.text == text
        assert parsed.upto is None or parsed.upto >= 1
        assert b"\0" not in parsed.path
