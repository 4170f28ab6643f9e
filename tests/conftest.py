"""How pytest is set up here, and nothing else: what tests share is imported from tests.support."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# No deadline: on a shared machine an example may wait for the processor. No database: a clone starts as CI does, and an
# example worth keeping is written into a test. In CI the examples are the same every time; at home they are new ones.
hypothesis.settings.register_profile(
    "ocifs",
    deadline=None,
    database=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ocifs")


@pytest.fixture(params=["fuse", "erofs"])
def driver(request: pytest.FixtureRequest) -> str:
    """Run a test under each driver that works on this machine."""
    from tests.support.mounting import why_not  # noqa: PLC0415 (most tests mount nothing)

    if why := why_not(request.param):
        pytest.skip(why)
    return str(request.param)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Give an empty directory to mount on; a mount that is left there is ended, by force if need be."""
    from tests.support.mounting import force_away, in_mountinfo, run  # noqa: PLC0415 (as above)

    where = tmp_path / "mnt"
    where.mkdir()
    yield where
    try:
        if in_mountinfo(where):
            run(["umount", str(where)], limit=30)
    finally:
        force_away(where)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test, and the processes it starts, away from the cache of whoever runs the tests."""
    monkeypatch.setenv("OCIFS_CACHE_DIR", str(tmp_path / "ocifs-cache"))
