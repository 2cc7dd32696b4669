"""What a checkpoint is evaluated on: the run's own test images, changed data, other data; never what it learnt from."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import config
import train
from utils.checkpoint import load_checkpoint
from utils.data.catalogue import Catalogue, Entry
from utils.data.errors import DataError
from utils.data.evaluated import Evaluated, Labelled, choose_evaluated
from utils.data.record import record_pictures, repeated_pictures
from utils.files import SavingError
from utils.options import SettingsError
from utils.training.evaluated_data import Readers, validation_images

pytestmark = pytest.mark.usefixtures("thin_trunk")

NAMES = ["ant", "bee"]


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Twelve files, which are no pictures: that does not matter to what is chosen."""
    paths = [tmp_path / "data" / f"{number:02d}.png" for number in range(12)]
    paths[0].parent.mkdir()
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 50)
    return paths


def entries_of(paths: list[Path]) -> list[Entry]:
    return [Entry(path, int(path.stem) % 2) for path in paths]


def choose(record, own, every=None, **options):
    def read_all() -> Labelled:
        if every is None:
            pytest.fail("these are the run's own data")
        return every

    options = {"selected_on_test": False} | options
    return choose_evaluated(NAMES, record, own, read_all, **options)


@pytest.fixture
def record(files):
    return record_pictures(*map(entries_of, (files[:4], files[4:6], files[6:8])))


def test_an_unchanged_test_set_is_evaluated_as_it_is(files, record):
    """Even where one of its images was trained on: official lists hold such copies, and figures are compared."""
    files[6].write_bytes(files[0].read_bytes())
    record = record_pictures(*map(entries_of, (files[:4], files[4:6], files[6:8])))
    chosen = choose(record, Catalogue(entries_of(files[:6]), entries_of(files[6:8]), NAMES))
    assert (chosen.entries, chosen.own) == (entries_of(files[6:8]), True)
    (note,) = chosen.notes
    assert note.startswith("1 of 2 test images seem to be in training or validation, too")
    assert "the first is 06.png" in note
    assert chosen.selection() == entries_of(files[4:6])


def test_copies_of_validation_images_are_not_taken_for_them(files, record):
    """By where they lie; of those that have moved, once each."""
    for copy, original in ((files[7], files[4]), (files[3], files[5])):
        copy.write_bytes(original.read_bytes())
    record = record_pictures(*map(entries_of, (files[:4], files[4:6], files[6:8])))
    own = Catalogue(entries_of(files[:6]), entries_of(files[6:8]), NAMES)
    assert choose(record, own).selection() == entries_of(files[4:6])
    assert repeated_pictures(record, selected_on_test=True) == []
    test, validation = repeated_pictures(record, selected_on_test=False)
    assert test.startswith("1 of 2 test images") and "the first is 07.png" in test
    assert validation.startswith("1 of 2 validation images") and "the first is 05.png" in validation
    files[5].rename(files[5].with_name("99.png"))
    moved = Catalogue(entries_of([*files[:5], files[5].with_name("99.png")]), entries_of(files[6:8]), NAMES)
    assert [entry.source.name for entry in choose(record, moved).selection()] == ["03.png", "04.png"]


def test_of_changed_data_nothing_is_evaluated_that_was_learnt_from(files, record):
    """A new split: of the test images 0 and 1 were trained on, 4 chose the epoch, 8 and 9 are new, 6 is now trained."""
    mixed = [files[number] for number in (0, 1, 4, 7, 8, 9)]
    own = Catalogue(entries_of([path for path in files[:10] if path not in mixed]), entries_of(mixed), NAMES)
    chosen = choose(record, own)
    assert [entry.source.name for entry in chosen.entries] == ["07.png", "08.png", "09.png", "06.png"]
    assert "3 images are left out" in chosen.notes[-1]
    assert "--include_trained" in chosen.notes[-1]
    assert chosen.trained_on == 0
    asked = choose(record, own, include_trained=True)
    assert (len(asked.entries), asked.trained_on) == (7, 3)
    assert asked.notes[-1].startswith("3 of 7 images are ones that the run was trained on or chose its best epoch by")
    assert len(choose(record, own, selected_on_test=True).entries) == 5


def test_renamed_copies_of_training_images_are_known_again(files, record, tmp_path):
    (tmp_path / "new").mkdir()
    names = {"08.png": files[0], "09.png": files[5], "10.png": files[10], "11.png": files[11]}
    copies = [Path(shutil.copy(file, tmp_path / "new" / name)) for name, file in names.items()]
    own = Catalogue(entries_of(copies[:2]), entries_of(copies[2:]), NAMES)
    chosen = choose(record, own, Labelled(entries_of(copies), NAMES))
    assert [entry.source.name for entry in chosen.entries] == ["10.png", "11.png"]
    assert not chosen.own
    with pytest.raises(DataError, match="2 images are left out"):
        choose(record, own, Labelled(entries_of(copies[:2]), NAMES))


def test_classes_are_matched_by_name(files, record):
    every = Labelled([Entry(files[8], 0), Entry(files[9], 1), Entry(files[10], 2)], ["bee", "cat", "dog"])
    chosen = choose(record, None, every)
    assert chosen.entries == [Entry(files[8], 1)]
    assert "2 classes that the checkpoint does not know are left out, with 2 images: 'cat', 'dog'" in chosen.notes
    assert "1 of the checkpoint's 2 classes have no image: 'ant'" in chosen.notes
    with pytest.raises(DataError, match="'cat'"):
        choose(record, None, Labelled([Entry(files[9], 0)], ["cat"]))


def test_validation_images_that_are_gone_are_missed_in_a_sentence():
    settings, readers = config.parse_settings([]), Readers(None, None, None)
    with pytest.raises(SettingsError, match="--exit_curve needs the run's validation images, and none of them is left"):
        validation_images(settings, Evaluated([Entry(0, 0)], list), readers, "--exit_curve")


def test_without_a_record_the_data_are_the_runs_unless_others_were_asked_for(files):
    own, every = Catalogue(entries_of(files[:6]), entries_of(files[6:8]), NAMES), Labelled(entries_of(files), NAMES)
    assert choose(None, own) == Evaluated(own.test)
    changed = choose(None, own, as_many=False)
    moved = choose(None, own, asked=True)
    assert changed.entries == moved.entries == own.test
    assert changed.own and moved.own
    assert "it had another number of them" in changed.notes[0]
    assert "these are taken for its own data" in moved.notes[0]
    other = choose(None, own, every, asked=True, as_many=False)
    assert (other.entries, other.own) == (every.entries, False)
    assert "does not say which images it was trained on: some may be among these" in other.notes[0]
    chosen = choose(None, own._replace(class_names=["ant", "cat"]), Labelled(entries_of(files), ["ant", "cat"]))
    assert "does not say which images it was trained on" in chosen.notes[0]


# ---- Runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny_run, picture_tree, tmp_path_factory) -> Path:
    """The folder of a run on a tree of its own, `tree` beside it; tests copy both."""
    place = tmp_path_factory.mktemp("finished")
    shutil.copytree(picture_tree, place / "tree")
    train.main(tiny_run(place, "--data_root", str(place / "tree")))
    return place


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = numpy.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(path)


def test_what_is_in_the_way_of_the_pictures_costs_no_report(finished, tmp_path, evaluation_script):
    (tmp_path / "pictures").write_text("a file")
    with pytest.raises(SavingError, match="pictures could not be written .*move away what is in its place"):
        evaluation_script.main([str(finished / "folder-resnet" / "best.pth"), "--out", str(tmp_path)])
    assert {"report.html", "report.json", "predictions.csv"} <= {path.name for path in tmp_path.iterdir()}


def test_a_checkpoint_is_read_once(finished, tmp_path, evaluation_script, monkeypatch):
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: (read.append(path), load(path, **options))[1])
    evaluation_script.main([str(finished / "folder-resnet" / "best.pth"), "--out", str(tmp_path)])
    assert read == [finished / "folder-resnet" / "best.pth"]


def test_pictures_added_to_a_tree_do_not_bring_training_images_into_the_test(
    finished, tmp_path, evaluation_script, capsys
):
    place = Path(shutil.copytree(finished, tmp_path / "copy"))
    best = place / "folder-resnet" / "best.pth"
    evaluation_script.main([str(best), "--data_root", str(place / "tree")])
    before = {Path(row["picture"]).relative_to(place) for row in read(best.parent / "predictions.csv")}
    added = {Path("tree") / name / "added.png" for name in ("blue", "green", "red")}
    for seed, path in enumerate(sorted(added)):
        draw(place / path, seed)
    capsys.readouterr()
    evaluation_script.main([str(best), "--data_root", str(place / "tree")])
    printed = capsys.readouterr().out
    now = {Path(row["picture"]).relative_to(place) for row in read(best.parent / "predictions.csv")}
    assert before <= now <= before | added
    assert "images are left out, as the run was trained on them" in printed
    report = json.loads((best.parent / "report.json").read_text(encoding="utf-8"))
    assert any("left out" in note for note in report["data"]["notes"])


def test_another_tree_is_evaluated_whole_into_a_folder_of_its_own(finished, tmp_path, evaluation_script, capsys):
    """Two of the three classes, one that is unknown, one picture of each: no split would leave any for testing."""
    place = Path(shutil.copytree(finished, tmp_path / "copy"))
    best = place / "folder-resnet" / "best.pth"
    for seed, name in enumerate(("red", "blue", "yellow")):
        draw(tmp_path / "new" / name / "1.png", seed)
    before = sorted(path.name for path in best.parent.iterdir())
    evaluation_script.main([str(best), "--data_root", str(tmp_path / "new"), "--out", str(tmp_path / "out" / "here")])
    assert sorted(path.name for path in best.parent.iterdir()) == before
    rows = read(tmp_path / "out" / "here" / "predictions.csv")
    assert [(row["label"], Path(row["picture"]).parent.name) for row in rows] == [("blue", "blue"), ("red", "red")]
    assert "'yellow'" in capsys.readouterr().out
    classes = read(tmp_path / "out" / "here" / "classes.csv")
    assert [(row["class"], row["images"]) for row in classes] == [("blue", "1"), ("green", "0"), ("red", "1")]
    confusions = read(tmp_path / "out" / "here" / "confusions.csv")
    assert [list(row)[0] for row in confusions] == ["true class"] * 3
    assert [sum(int(row[name]) for name in ("blue", "green", "red")) for row in confusions] == [1, 0, 1]

    evaluation_script.main([str(best), "--data_root", str(tmp_path / "new")])
    assert (best.parent / "on-new" / "report.json").is_file()
    assert not (best.parent / "report.json").exists()


def test_a_table_is_for_data_of_tables(finished, evaluation_script):
    best = finished / "folder-resnet" / "best.pth"
    with pytest.raises(SettingsError, match="--labels names a table of data set csv, and .* is of data set folder"):
        evaluation_script.main([str(best), "--labels", "x.csv"])


def test_an_older_checkpoint_is_evaluated_on_its_test_images_as_before(finished, tmp_path, evaluation_script, capsys):
    place = Path(shutil.copytree(finished, tmp_path / "copy"))
    best = place / "folder-resnet" / "best.pth"
    evaluation_script.main([str(best)])
    expected = (best.parent / "predictions.csv").read_bytes()
    content = load_checkpoint(best)
    del content["pictures"]
    torch.save(content, best)
    evaluation_script.main([str(best)])
    assert (best.parent / "predictions.csv").read_bytes() == expected

    # Where the data were moved to, and where there are others of the same classes
    moved = shutil.copytree(place / "tree", tmp_path / "moved")
    evaluation_script.main([str(best), "--data_root", str(moved)])
    names = [
        (Path(row["picture"]).relative_to(moved), row["prediction"]) for row in read(best.parent / "predictions.csv")
    ]
    before = csv.DictReader(expected.decode().splitlines())
    assert names == [(Path(row["picture"]).relative_to(finished / "tree"), row["prediction"]) for row in before]
    kept = (best.parent / "report.json").read_bytes()
    for name in ("blue", "green", "red"):
        shutil.copy(place / "tree" / name / "0.png", moved / name / "copied.png")
    capsys.readouterr()
    evaluation_script.main([str(best), "--data_root", str(moved)])
    assert "does not say which images it was trained on" in capsys.readouterr().out
    assert len(read(best.parent / "on-moved" / "predictions.csv")) == 27
    assert (best.parent / "report.json").read_bytes() == kept
