"""Pictures with a table that says what they are, as people write such tables."""

from __future__ import annotations

import ast
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from layouts import write_lines
from made_pictures import write_picture
from PIL import Image

from config import parse_settings
from datasets import DataError, choose_split, load_catalogue, load_labelled, read_catalogue
from utils.data.readers.csv import locate
from utils.data.record import pack, record_pictures
from utils.training.building import Trained
from utils.training.evaluated_data import Readers, find_data


def write_flat(root: Path, *names: str) -> Path:
    for name in names:
        write_picture(root / name)
    return root


TABLES = {
    "names and endings": ("image_id,label", "{}.jpg,{}"),
    "no endings": ("id,breed", "{},{}"),
    "relative to the root": ("file_name,class", "train_images/{}.jpg,{}"),
    "of another machine": ("path;species", "/kaggle/input/train_images/{}.jpg;{}"),
    "of Windows": ("Image Path\tClass Name", "train_images\\{}.jpg\t{}"),
    "no header": (None, "{}.jpg,{}"),
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_beside_flat_pictures(tmp_path: Path, table: str) -> None:
    write_flat(tmp_path, *(f"train_images/{n}.jpg" for n in range(10)), "test_images/0.jpg", "test_images/x.jpg")
    header, row = TABLES[table]
    rows = [row.format(number, "wren" if number < 5 else "auk") for number in range(10)]
    write_lines(tmp_path / "train.csv", ([header] if header else []) + rows)
    catalogue = read_catalogue("csv", tmp_path, labels="train.csv")
    assert catalogue.class_names == ["auk", "wren"]
    assert (len(catalogue.train), len(catalogue.test)) == (8, 2)
    assert {entry.source.parent.name for entry in catalogue.entries} == {"train_images"}
    assert {(int(entry.source.stem) < 5, entry.label) for entry in catalogue.entries} == {(True, 1), (False, 0)}
    assert any("2 pictures" in note and "in none of the tables" in note for note in catalogue.notes)
    assert read_catalogue("csv", tmp_path) == catalogue  # it is the only table


def test_parts_of_a_table(tmp_path: Path) -> None:
    write_flat(tmp_path, *(f"{n}.jpg" for n in range(6)))
    parts = ["train", "Train", "valid", "valid", "TEST", "test"]
    write_lines(tmp_path / "all.csv", ["image,label,split", *(f"{n}.jpg,{n % 2},{p}" for n, p in enumerate(parts))])
    catalogue = read_catalogue("csv", tmp_path, labels="all.csv")
    assert {part: len(entries) for part, entries in catalogue.parts.items()} == dict.fromkeys(catalogue.parts, 2)
    assert list(catalogue.parts) == ["training", "validation", "test"] and catalogue.class_names == ["0", "1"]
    write_lines(tmp_path / "all.csv", ["image,label,is_train", *(f"{n}.jpg,{n % 2},{int(n < 4)}" for n in range(6))])
    assert (len(read_catalogue("csv", tmp_path).train), len(read_catalogue("csv", tmp_path).test)) == (4, 2)


def test_tables_of_their_own_for_validation_and_test(tmp_path: Path) -> None:
    write_flat(tmp_path, *(f"{part}/{n}.jpg" for part in ("train", "val", "test") for n in range(2)))
    for part in ("train", "val", "test"):
        write_lines(tmp_path / f"{part}/metadata.csv", ["file_name,label", "0.jpg,auk", "1.jpg,wren"])
    tables = {"labels": "train/metadata.csv", "validation_labels": "val/metadata.csv"}
    catalogue = read_catalogue("csv", tmp_path, **tables, test_labels=str(tmp_path / "test/metadata.csv"))
    for part, entries in zip(("train", "val", "test"), catalogue.parts.values(), strict=True):
        assert [entry.source for entry in entries] == [tmp_path / part / "0.jpg", tmp_path / part / "1.jpg"]


TABLE_FAULTS = {
    "no such column": (["photo_nr,kind", "0.jpg,a"], {}, ["photo_nr, kind", "--image_column"]),
    "no label column": (["image,kind", "0.jpg,a"], {}, ["image, kind", "--label_column"]),
    "a column that is not there": (["image,label", "0.jpg,a"], {"label_column": "kind"}, ["'kind'", "image, label"]),
    "a short row": (["image,label", "0.jpg"], {}, ["line 2", "expected 2 fields"]),
    "two pictures of a name": (["image,label", "1.jpg,a"], {}, ["a/1.jpg", "b/1.jpg", "folder into the table"]),
    "a comma without quotes": (["image,label", "0.jpg,Gull, Herring"], {}, ["line 2", "expected 2", "comma in quotes"]),
    "a quote left open": (["image,label", '0.jpg,"a', "1.jpg,b"], {}, ["t.csv line 2: a quote is opened"]),
    "a quote closed too late": (["image,label", '0.jpg,"a', '1.jpg,b"'], {}, ["line 3", "close the quote"]),
    "a strange part": (["image,label,split", "0.jpg,a,holdout"], {}, ["'holdout'", "train, validation or test"]),
    "a path that leaves": (["image,label", "../0.jpg,a"], {}, ["lies outside"]),
    "of another folder": (["image,label", "/x/c/0.jpg,a"], {}, ["line 2", "0.jpg' lies in none of its folders here"]),
    "not on disk": (["image,label", "0.jpg,a", "7.jpg,a", "8.jpg,b", "9.jpg,b"], {}, ["not on disk"]),
    "no rows": (["image,label"], {}, ["no rows"]),
    "one column": (["image"], {}, ["no two columns"]),
    "no file": (["image,label", "0.jpg,a"], {"labels": "nowhere.csv"}, ["nowhere.csv is a file"]),
    "two ways": (["image,label", "0.jpg,a", "0.jpg,b"], {}, ["listed twice"]),
}


@pytest.mark.parametrize("fault", TABLE_FAULTS)
def test_wrong_tables(tmp_path: Path, fault: str) -> None:
    lines, choices, words = TABLE_FAULTS[fault]
    write_flat(tmp_path, "0.jpg", "a/1.jpg", "b/1.jpg")
    write_lines(tmp_path / "t.csv", lines)
    with pytest.raises(DataError) as refusal:
        read_catalogue("csv", tmp_path, **choices, **({} if fault == "two ways" else {"test_fraction": 0.5}))
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert str(refusal.value).isprintable()


def test_of_several_tables_one_is_to_be_named(tmp_path: Path) -> None:
    write_flat(tmp_path, "0.jpg")
    for name in ("train.csv", "sample_submission.csv"):
        write_lines(tmp_path / name, ["image,label", "0.jpg,a"])
    with pytest.raises(DataError, match=r"2 tables .*--labels "):
        read_catalogue("csv", tmp_path)


def class_of_each(root: Path, *lines: str, **choices: object) -> dict[str, str]:
    """Write a table and return the class that it gives each picture."""
    write_lines(root / "t.csv", lines)
    catalogue = read_catalogue("csv", root, labels=str(root / "t.csv"), **choices)
    return {entry.source.stem: catalogue.class_names[entry.label] for entry in catalogue.entries}


def test_names_with_commas(tmp_path: Path) -> None:
    write_flat(tmp_path, *(f"{n}.jpg" for n in range(4)))
    rows = ('0.jpg,"Gull, Herring"', '1.jpg, "Gull, Herring"', '2.jpg, "Wren" ,,', '"3.jpg" ,Wren,')
    found = class_of_each(tmp_path, "image,label", *rows)
    assert found == {"0": "Gull, Herring", "1": "Gull, Herring", "2": "Wren", "3": "Wren"}


def test_a_header_may_be_called_as_a_picture_is(tmp_path: Path) -> None:
    write_flat(tmp_path, "image.jpg", *(f"{n}.jpg" for n in range(4)))
    rows = [f"{n}.jpg,{'ab'[n % 2]}" for n in range(4)]
    assert class_of_each(tmp_path, "image,label", *rows) == dict(zip("0123", "abab", strict=True))
    assert class_of_each(tmp_path, "image,a", *rows, "1,b")["image"] == "a"  # no header: no column has a usual name


def test_a_column_of_parts_may_be_called_after_one(tmp_path: Path) -> None:
    write_flat(tmp_path, *(f"{n}.jpg" for n in range(4)))
    rows = [f"{n}.jpg,{'ab'[n % 2]},{'train' if n < 2 else 'test'}" for n in range(4)]
    write_lines(tmp_path / "t.csv", ["image,label,train_test_split", *rows])
    catalogue = read_catalogue("csv", tmp_path, split_column="train_test_split")
    assert [[entry.source.stem for entry in part] for part in (catalogue.train, catalogue.test)] == [
        ["0", "1"],
        ["2", "3"],
    ]


def test_a_column_that_only_might_be_the_split_is_left(tmp_path: Path) -> None:
    write_flat(tmp_path, *(f"{n}.jpg" for n in range(4)))
    write_lines(tmp_path / "t.csv", ["image,label,dataset", *(f"{n}.jpg,{'ab'[n % 2]},inat" for n in range(4))])
    catalogue = read_catalogue("csv", tmp_path, test_fraction=0.5)
    assert (len(catalogue.train), len(catalogue.test)) == (2, 2)
    assert any("'dataset' is a part" in note for note in catalogue.notes)
    with pytest.raises(DataError, match="dataset is 'inat', expected train"):
        read_catalogue("csv", tmp_path, split_column="dataset")


@pytest.mark.parametrize("seed", range(6))
def test_a_row_that_comes_twice_is_one_picture_whatever_the_split(tmp_path: Path, seed: int) -> None:
    write_flat(tmp_path, *(f"{n}.jpg" for n in range(4)))
    write_lines(tmp_path / "t.csv", ["image,label", *(f"{n}.jpg,{'ab'[n % 2]}" for n in range(4)), "0.jpg,a"])
    catalogue = read_catalogue("csv", tmp_path, test_fraction=0.5, seed=seed)
    assert (len(catalogue.train), len(catalogue.test)) == (2, 2)


def test_classes_that_are_numbers_come_in_their_order_in_every_process(tmp_path: Path) -> None:
    """Equal numbers are two names all the same; a set's order is another in every process."""
    write_flat(tmp_path, *(f"{n}.jpg" for n in range(12)))
    names = ["10", "2", "1", "01", "002", "9" * 5001]
    write_lines(tmp_path / "t.csv", ["image,label", *(f"{n}.jpg,{names[n % 6]}" for n in range(12))])
    program = "from utils.data.readers import read_catalogue; "
    program += f"print(read_catalogue('csv', {str(tmp_path)!r}).class_names)"
    for seed in ("0", "3"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert ast.literal_eval(done.stdout) == ["01", "1", "002", "2", "10", "9" * 5001]


def test_paths_of_another_machine(tmp_path: Path) -> None:
    """The longest common end decides; with class folders, a name alone does not."""
    write_flat(tmp_path, *(f"{folder}/{n}.jpg" for folder in ("cats", "dogs") for n in range(2)))
    rows = [f"C:\\x\\cats\\{n}.jpg,cat" for n in range(2)] + [f"/home/x/dogs/{n}.jpg,dog" for n in range(2)]
    write_lines(tmp_path / "t.csv", ["image,label", *rows])
    catalogue = read_catalogue("csv", tmp_path)
    assert {(e.source.parent.name, catalogue.class_names[e.label]) for e in catalogue.entries} == {
        ("cats", "cat"),
        ("dogs", "dog"),
    }


@pytest.mark.parametrize("given", (".", ".."))
def test_the_folder_may_be_the_one_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    write_flat(tmp_path, *(f"{n}.jpg" for n in range(4)))
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path if given == "." else tmp_path / "inner")
    write_lines(tmp_path / "t.csv", ["image,label", *(f"{n},{'ab'[n % 2]}" for n in range(4))])
    write_lines(tmp_path / "._t.csv", ["what a Mac leaves beside it"])
    assert len(read_catalogue("csv", given).entries) == 4


def test_a_table_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the name may be two files, it is none of them without a word."""
    here, data = tmp_path / "here", tmp_path / "data"
    for folder in (here, data):
        write_lines(folder / "t.csv", ["image,label"])
    monkeypatch.chdir(here)
    with pytest.raises(DataError, match="t.csv may be .*data.* or .*here.*: write the whole path"):
        locate(data, "t.csv")
    assert locate(data, str(here / "t.csv")) == here / "t.csv"
    assert locate(here, "t.csv") == here / "t.csv"  # twice the same
    with pytest.raises(DataError, match="neither .* is a file"):
        locate(data, "~nobody-of-this-name/t.csv")


def test_other_pictures_are_what_their_own_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's table lies elsewhere, and knows pictures of the same names."""
    for place, names in (("run", "ab"), ("other", "ba")):
        write_flat(tmp_path / place, *(f"{n}.png" for n in range(8)))
        for n in range(8):
            Image.new("RGB", (40, 40), (n, 0, len(place))).save(tmp_path / place / f"{n}.png")
        table = tmp_path / ("run.csv" if place == "run" else "other/labels.csv")
        write_lines(table, ["image,label", *(f"{n}.png,{names[n % 2]}" for n in range(8))])
    readers = Readers(load_catalogue, load_labelled, choose_split)

    def settings_of(place: str, labels: str):
        return parse_settings(
            ["--dataset", "csv", "--data_root", str(tmp_path / place), "--labels", str(tmp_path / labels)]
        )

    run = settings_of("run", "run.csv")
    catalogue, _ = load_catalogue(run)
    saved = {"class_names": ["a", "b"], "pictures": pack(record_pictures(catalogue.train, [], catalogue.test))}

    def found(settings, **asked: bool) -> dict[str, int]:
        trained = Trained(None, settings, saved, None, None)
        evaluated = find_data(trained, tmp_path / "best.pth", readers, **asked)
        return {entry.source.stem: entry.label for entry in evaluated.entries}

    expected = {str(n): 1 - n % 2 for n in range(8)}
    assert found(settings_of("other", "run.csv"), asked=True) == expected
    monkeypatch.chdir(tmp_path)
    for given in ("run.csv", "~/run.csv"):
        monkeypatch.setenv("HOME", str(tmp_path))
        settings = dataclasses.replace(settings_of("other", "run.csv"), labels=given)
        assert found(settings, asked=True) == expected
    with pytest.raises(DataError, match="nobody-of-this-name"):
        found(dataclasses.replace(settings, data_root="~nobody-of-this-name"), asked=True)
    assert found(settings_of("other", "other/labels.csv"), asked=True, with_labels=True) == expected
    assert found(run) == {entry.source.stem: entry.label for entry in catalogue.test}
    shutil.copytree(tmp_path / "run", tmp_path / "moved")  # the run's own pictures, which its table knows
    assert found(settings_of("moved", "run.csv"), asked=True) == found(run)
