"""Which pictures a run was trained on: recorded, packed into checkpoints, compared with the data of today."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import train
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.data.catalogue import Entry
from utils.data.record import Record, difference, pack, record_pictures, unpack

pytestmark = pytest.mark.usefixtures("thin_trunk")


@pytest.fixture
def tree(tmp_path) -> Path:
    """Six files in two folders; what is in them is no picture, which does not matter here."""
    for label, name in enumerate(("ant", "bee")):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "tree" / name / f"{number}.png").write_bytes(bytes([label, number]) * 100)
    return tmp_path / "tree"


def record_of(tree: Path) -> Record:
    """Of each class the last picture selects; the first class's first one is for testing."""
    entries = [
        Entry(file, label) for label, name in enumerate(("ant", "bee")) for file in sorted((tree / name).iterdir())
    ]
    test = [entry for entry in entries if (entry.label, entry.source.name) == (0, "0.png")]
    selection = [entry for entry in entries if entry.source.name == "2.png"]
    return record_pictures([entry for entry in entries if entry not in (*test, *selection)], selection, test)


def test_a_record_is_the_same_wherever_the_data_lie(tree, tmp_path):
    moved = Path(shutil.copytree(tree, tmp_path / "elsewhere" / "deeper"))
    assert record_of(tree) == record_of(moved)
    assert difference(record_of(tree), record_of(moved)) is None
    assert [picture.path for picture in record_of(tree).training] == ["ant/1.png", "bee/0.png", "bee/1.png"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: (tree / "bee" / "9.png").write_bytes(b"new"), "1 added, the first is bee/9.png"),
        (lambda tree: (tree / "bee" / "1.png").unlink(), "1 removed, the first is bee/1.png"),
        (
            lambda tree: (tree / "ant" / "1.png").rename(tree / "bee" / "7.png"),
            "1 moved, the first is ant/1.png, now bee/7",
        ),
        (lambda tree: (tree / "bee" / "1.png").write_bytes(b"new"), "1 replaced, the first is bee/1.png"),
        (lambda tree: (tree / "bee" / "1.png").write_bytes(bytes([1, 9]) * 100), "1 replaced, the first is bee/1.png"),
        (lambda tree: (tree / "ant" / "0.png").write_bytes(b"new"), None),  # only tested with
    ],
    ids=["added", "removed", "moved", "replaced", "replaced by one as large", "of the test set"],
)
def test_what_differs_is_named(tree, change, words):
    before = record_of(tree)
    change(tree)
    found = difference(before, record_of(tree))
    assert found == words if words is None else words in found


def test_labels_parts_and_order_are_compared_too(tree):
    record = record_of(tree)
    first, *others = record.training
    assert "1 of another class, the first is ant/1.png" in difference(
        record, record._replace(training=[first._replace(label=1), *others])
    )
    assert "held back" in difference(record, Record(others, [first, *record.selection], record.test))
    assert "order" in difference(record, record._replace(training=[*others, first]))


def test_a_record_survives_its_packing_whatever_a_path_is(tree):
    (tree / "ant" / "1.png").rename(tree / "ant" / "M\udcf6we\n.png")
    record = record_of(tree)
    assert unpack(pack(record)) == record
    for packed in (torch.zeros(9, dtype=torch.uint8), pack(record)[:-5], pack([1, 2])):
        with pytest.raises(ValueError, match="no record"):
            unpack(packed)


def test_large_files_are_told_apart_at_both_ends_and_in_the_middle(tmp_path):
    content = bytearray(10**6)
    hashes = set()
    for position in (None, 0, 500_100, 999_999):
        if position is not None:
            content[position] = 1
        (tmp_path / "a.png").write_bytes(content)
        (picture,) = record_pictures([Entry(tmp_path / "a.png", 0)], [], []).training
        hashes.add(picture.content)
    assert len(hashes) == 4


# ---- Runs -----------------------------------------------------------------------------------------------------------


def exchange(one: Path, other: Path) -> None:
    waiting = one.with_name("waiting")
    one.rename(waiting)
    other.rename(one)
    waiting.rename(other)


def test_a_run_goes_on_only_with_the_pictures_it_was_begun_with(tiny_run, picture_tree, tmp_path):
    """As many pictures of the same names in the same classes: only their content differs."""
    tree = Path(shutil.copytree(picture_tree, tmp_path / "tree"))
    train.main(tiny_run(tmp_path / "runs", "--data_root", str(tree)))
    folder = tmp_path / "runs" / "folder-resnet"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    moved = Path(shutil.copytree(tree, tmp_path / "moved"))
    train.main(tiny_run(tmp_path / "runs", "--data_root", str(moved)))
    exchange(tree / "red" / "1.png", tree / "blue" / "1.png")
    with pytest.raises(
        CheckpointError, match=r"other pictures.*2 replaced, the first is blue/1.png.*--name"
    ) as refusal:
        train.main(tiny_run(tmp_path / "runs", "--data_root", str(tree)))
    assert len(str(refusal.value).splitlines()) == 1
    assert {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name in before and path.suffix == ".pth"
    } == {name: content for name, content in before.items() if name.endswith(".pth")}


def test_a_checkpoint_without_a_record_goes_on_as_before(tiny_run, tmp_path):
    arguments = tiny_run(tmp_path)
    train.main(arguments)
    path = tmp_path / "folder-resnet" / "last.pth"
    content = load_checkpoint(path)
    del content["pictures"]
    torch.save(content, path)
    train.main(arguments)
