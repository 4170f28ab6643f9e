"""The process that makes views of an examined mount: what it makes, what it says when it cannot, how it ends."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, BinaryIO

import pytest

from ocifs.errors import DamagedError, MachineError
from ocifs.forensics.workshop import Answer, Report, Wanted, Workshop
from ocifs.image import Image, ImageOptions, open_image
from ocifs.image_tree import ImageTree
from ocifs.store import Kind, Store
from tests.support.evidence_image import write_evidence

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ocifs.forensics.examination import Examination


def count(image: Image, examination: Examination, file: BinaryIO) -> None:
    file.write(b"%d layers, %d versions\n" % (len(image.layers), len(examination.history)))


def damaged(image: Image, examination: Examination, file: BinaryIO) -> None:
    del image, examination, file
    raise DamagedError("nothing can be said")


def mistaken(image: Image, examination: Examination, file: BinaryIO) -> None:
    del image
    file.write(b"half")
    assert examination is None, "a bug"


def lost(image: Image, examination: Examination, file: BinaryIO) -> None:
    del image, examination, file
    os.kill(os.getpid(), signal.SIGKILL)


REPORTS: dict[str, Report] = {"count": count, "damaged": damaged, "mistaken": mistaken, "lost": lost}


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    options = ImageOptions(examine=True)
    with (
        Store(tmp_path / "cache") as store,
        open_image(write_evidence(tmp_path / "image"), store, options) as image,
        Workshop(image, store.path, options, REPORTS) as made,
    ):
        yield made


def test_trees_and_the_history_are_in_the_store_afterwards(workshop: Workshop, tmp_path: Path) -> None:
    sizes = {}
    with Store(tmp_path / "cache") as store:
        for wanted in (Wanted("layer", 2), Wanted("upto", 2), Wanted("slack", 3), Wanted("deleted"), Wanted("history")):
            answer = workshop.make(wanted)
            assert workshop.make(wanted) == answer
            file = store.open_entry(Kind.TREE, answer.key)
            assert file is not None
            with file, ImageTree.open(file.fd) as tree:
                sizes[wanted.what] = tree.metadata.inode_count
        answer = workshop.make(Wanted("versions"))
        assert store.open_entry(Kind.HISTORY, answer.key) is not None
    assert sizes == {"layer": 6, "upto": 20, "slack": 2, "deleted": 31, "history": 67}


def test_the_image_is_the_one_that_was_opened_whatever_became_of_its_name(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "image").rename(tmp_path / "elsewhere")
    assert workshop.make(Wanted("slack", 5)).key


def told(answer: Answer) -> bytes:
    assert answer.key == ""
    with os.fdopen(answer.fd, "rb") as file:
        file.seek(0)
        return file.read()


def test_a_report_is_a_file_without_a_name(workshop: Workshop, tmp_path: Path) -> None:
    names = set(os.listdir(tmp_path / "cache"))
    assert told(workshop.make(Wanted("report", name="count"))) == b"5 layers, 37 versions\n"
    assert set(os.listdir(tmp_path / "cache")) == names


def test_errors_come_through_and_the_next_thing_is_made_all_the_same(workshop: Workshop) -> None:
    with pytest.raises(DamagedError, match=r"^nothing can be said$"):
        workshop.make(Wanted("report", name="damaged"))
    with pytest.raises(RuntimeError, match="AssertionError: a bug"):
        workshop.make(Wanted("report", name="mistaken"))
    with pytest.raises(MachineError, match="the process that writes the report lost was ended by signal 9"):
        workshop.make(Wanted("report", name="lost"))
    assert told(workshop.make(Wanted("report", name="count"))) == b"5 layers, 37 versions\n"


def test_a_process_that_is_gone_is_said_to_be(workshop: Workshop) -> None:
    workshop.close()
    workshop.close()
    with pytest.raises(MachineError, match="is gone; mount the image again"):
        workshop.make(Wanted("deleted"))
