"""Data sets that are broken, hostile or merely odd: one sentence each, or the clean set's catalogue."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from layouts import BIRD_FILES, HTML, make_aircraft, make_cars, make_cub, make_dogs, replace_line
from made_pictures import write_picture
from scipy.io import loadmat, savemat

from datasets import DataError, read_catalogue
from utils.data.checking import find_bad_pictures
from utils.data.decoding import load_picture

pytestmark = pytest.mark.usefixtures("no_hang")


def make_folder(root: Path) -> Path:
    for file in ("train/a/1.png", "train/a/deep/2.png", "train/b/3.png", "test/a/4.png", "test/b/5.png"):
        write_picture(root / file)
    return root


MAKERS: dict[str, Callable[[Path], Path]] = {
    "cub": make_cub,
    "nabirds": make_cub,  # the same layout
    "cars": make_cars,
    "aircraft": make_aircraft,
    "dogs": make_dogs,
    "folder": make_folder,
}
LISTS = {
    "cub": ["images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt"],
    "cars": ["devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"],
    "aircraft": [
        *("data/variants.txt", "data/images_variant_trainval.txt", "data/images_variant_test.txt"),
        "data/images_box.txt",
    ],
    "dogs": ["lists/train_list.mat", "lists/test_list.mat"],
}
LISTS["nabirds"] = LISTS["cub"]
EVERY_LIST = [(dataset, name) for dataset, names in LISTS.items() for name in names]
EVERY_TABLE = [(dataset, name) for dataset, name in EVERY_LIST if name.endswith(".txt")]


def refusal(dataset: str, root: Path) -> str:
    """The one sentence with which a data set is refused."""
    with pytest.raises(DataError) as error:
        read_catalogue(dataset, root)
    sentence = str(error.value)
    assert sentence.isprintable() and 20 < len(sentence) < 800
    return sentence


# ---------------------------------------------------------------------------------------------------------------------
# Lists
# ---------------------------------------------------------------------------------------------------------------------


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "blank": lambda path: path.write_text("\n \n\t\n"),
    "web page": lambda path: path.write_text("\n" + HTML),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 4000),
    "zeros": lambda path: path.write_bytes(bytes(1_000_000)),
    "folder": become_a_folder,
    "pipe": become_a_pipe,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("dataset", "name"), EVERY_LIST)
def test_damaged_lists_are_named(tmp_path: Path, dataset: str, name: str, damage: str) -> None:
    if damage == "missing" and "box" in name:
        DAMAGES[damage](MAKERS[dataset](tmp_path) / name)
        assert not read_catalogue(dataset, tmp_path).has_boxes  # they serve a figure, not training
        return
    DAMAGES[damage](MAKERS[dataset](tmp_path) / name)
    assert Path(name).name in refusal(dataset, tmp_path)


@pytest.mark.parametrize(("dataset", "name"), EVERY_TABLE)
def test_tables_in_another_encoding(tmp_path: Path, dataset: str, name: str) -> None:
    path = MAKERS[dataset](tmp_path) / name
    text = path.read_text(encoding="utf-8")
    for encoding in ("utf-16", "utf-32"):
        path.write_text(text, encoding=encoding)
        assert f"{path} is not UTF-8 text" in refusal(dataset, tmp_path)
    path.write_bytes(text.encode() + "Möwe".encode("latin-1"))
    assert f"{path} is not UTF-8 text" in refusal(dataset, tmp_path)


@pytest.mark.parametrize(("dataset", "name"), [pair for pair in EVERY_LIST if pair[1].endswith(".mat")])
def test_matlab_lists_cut_anywhere(tmp_path: Path, dataset: str, name: str) -> None:
    path = MAKERS[dataset](tmp_path) / name
    whole = path.read_bytes()
    clean = read_catalogue(dataset, tmp_path)
    for length in range(0, len(whole), 41):
        path.write_bytes(whole[:length])
        try:
            assert read_catalogue(dataset, tmp_path) == clean  # what was cut off is nothing that is read
        except DataError as error:
            assert str(path) in str(error) and str(error).isprintable()
    cut_in_half(path)
    assert f"{path} " in refusal(dataset, tmp_path)


# (data set, table, line, what it becomes, words of the sentence)
WRONG_LINES = [
    ("cub", "images.txt", 2, "1 002.Gull/x.jpg", ["images.txt line 2", "images.txt line 1", "'1'"]),
    ("cub", "images.txt", 2, f"2 {BIRD_FILES[0]}", ["a 1.jpg is listed twice", "training and for testing"]),
    ("cub", "images.txt", 3, f"3 {BIRD_FILES[0]}", ["a 1.jpg", "as '001.Auk' and as '002.Möwe_Gull'"]),
    ("cub", "images.txt", 2, "2 /etc/passwd", ["images.txt line 2", "'/etc/passwd' lies outside"]),
    ("cub", "images.txt", 2, "2 a/../../../b.jpg", ["images.txt line 2", "lies outside"]),
    ("cub", "images.txt", 2, "2 001.Auk/gone.jpg", ["1 of 5", "gone.jpg"]),
    ("cub", "images.txt", 2, "2 \0\x1b[31m.jpg", ["1 of 5", "\\x00\\x1b[31m.jpg"]),
    ("cub", "images.txt", 2, "2" + 100_000 * "x", ["images.txt line 2: expected 2 fields", "..."]),
    ("cub", "image_class_labels.txt", 2, "2 4", ["image_class_labels.txt line 2", "'4'"]),
    ("cub", "image_class_labels.txt", 2, "2 one", ["image_class_labels.txt line 2", "'one'"]),
    ("cub", "image_class_labels.txt", 2, "1 2", ["image_class_labels.txt line 2", "line 1", "'1'", "'2'"]),
    ("cub", "image_class_labels.txt", 4, "4 3\n4 2", ["image_class_labels.txt line 5", "line 4"]),
    ("cub", "image_class_labels.txt", 5, "5 2", []),  # a class of no picture is a node of a tree
    ("cub", "train_test_split.txt", 5, "5 0", ["'003.Wren'", "no training picture"]),
    ("cub", "train_test_split.txt", 2, "1 0", ["train_test_split.txt line 2", "line 1"]),
    ("cub", "train_test_split.txt", 2, "2 2", ["train_test_split.txt line 2", "'2'"]),
    ("cub", "bounding_boxes.txt", 2, "2 1 2 inf 4", ["bounding_boxes.txt line 2", "inf"]),
    ("cub", "bounding_boxes.txt", 2, "1 1 2 3 5", ["bounding_boxes.txt line 2", "line 1"]),
    ("cub", "classes.txt", 2, "1 002.Gull", ["classes.txt line 2", "'001.Auk'", "'002.Gull'"]),
    ("aircraft", "variants.txt", 4, "DC-3", ["'DC-3'", "no training picture"]),
    ("aircraft", "images_variant_test.txt", 1, "0698580 Zeppelin", ["images_variant_test.txt line 1", "'Zeppelin'"]),
    ("aircraft", "images_variant_test.txt", 1, "0034309 F/A-18", ["0034309.jpg is listed twice", "for testing"]),
    ("aircraft", "images_variant_test.txt", 1, "0034309 707-320", ["0034309.jpg", "'F/A-18' and as '707-320'"]),
    ("aircraft", "images_variant_trainval.txt", 2, "0034309 707-320", ["trainval.txt line 2", "line 1"]),
    ("aircraft", "images_variant_trainval.txt", 2, "../x 707-320", ["trainval.txt line 2", "'../x.jpg' lies outside"]),
    ("aircraft", "images_variant_trainval.txt", 3, "0056978 BAE 146-200", ["'707-320'", "no training picture"]),
    ("aircraft", "images_box.txt", 2, "0056978 2 3 4 x", ["images_box.txt line 2", "'2 3 4 x'"]),
    ("aircraft", "images_box.txt", 2, "0034309 1 1 8 7", ["images_box.txt line 2", "line 1"]),
]


@pytest.mark.parametrize(("dataset", "name", "number", "line", "words"), WRONG_LINES)
def test_wrong_lines(tmp_path: Path, dataset: str, name: str, number: int, line: str, words: list[str]) -> None:
    MAKERS[dataset](tmp_path)
    path = next(tmp_path.rglob(name))
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[: number - 1], line, *lines[number:]]) + "\n", encoding="utf-8")
    if words:
        sentence = refusal(dataset, tmp_path)
        assert all(word in sentence for word in words), sentence
    else:
        assert read_catalogue(dataset, tmp_path).class_names == ["001.Auk", "002.Möwe_Gull"]


def change_cars(root: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    path = root / name
    annotations = loadmat(path)["annotations"]
    change(annotations)
    savemat(path, {"annotations": annotations})


CAR_FAULTS = {
    "class": [
        (0, "record 1: class 0"),
        (3, "record 1: class 3"),
        (1.5, "class 1.5"),
        ("two", "'two'"),
        (-1, "class -1"),
    ]
    + [(float("nan"), "finite"), (np.zeros((0, 0)), "expected numbers"), (np.zeros((2, 2)), "expected numbers")],
    "fname": [("", "picture's name"), (7, "picture's name"), ("../x.jpg", "outside"), ("gone.jpg", "gone.jpg")]
    + [("00002.jpg", "00002.jpg is listed twice")],
    "bbox_x2": [("x", "record 1: expected numbers"), (float("inf"), "finite"), (-1, "ends before it begins")],
}


@pytest.mark.parametrize(("field", "value", "words"), [(f, *pair) for f, pairs in CAR_FAULTS.items() for pair in pairs])
def test_wrong_records_of_cars(tmp_path: Path, field: str, value: object, words: str) -> None:
    def change(annotations: np.ndarray) -> None:
        annotations[field][0, 0] = value

    change_cars(make_cars(tmp_path), "devkit/cars_train_annos.mat", change)
    sentence = refusal("cars", tmp_path)
    assert words in sentence and ("cars_train_annos.mat record 1" in sentence or str(value) in sentence)


@pytest.mark.parametrize(
    ("files", "labels", "words"),
    [
        (["n2-Beagle/n2_1.jpg", "n1-Pug/n1_1.jpg"], [2, 2], ["record 2", "class 2", "'n1-Pug'", "'n2-Beagle'"]),
        (["n2-Beagle/n2_1.jpg", "n2-Beagle/n2_1.jpg"], [2, 1], ["record 2", "'n2-Beagle'", "class 1", "2 before"]),
        (["n2-Beagle/n2_1.jpg", "n1-Pug/n1_1.jpg"], [2, float("nan")], ["record 2", "finite"]),
        (["n2-Beagle/n2_1.jpg", "n1-Pug/n1_1.jpg"], [2, 1.5], ["record 2", "1.5"]),
        (["n2-Beagle/n2_1.jpg"], [2, 1], ["1 files and 2 labels"]),
        (["n2-Beagle/n2_1.jpg", "../../x.jpg"], [2, 1], ["record 2", "outside"]),
        (["n2-Beagle/n2_1.jpg", "n1-Pug/gone.jpg"], [2, 1], ["n1-Pug/gone does not exist"]),
        (["n1-Pug/n1_1.jpg", "n2-Beagle/n2_2.jpg"], [1, 2], ["n2_2.jpg is listed twice", "for testing"]),
        (["n1-Pug/n1_1.jpg", "n1-Pug/n1_1.jpg"], [1, 1], ["'n2-Beagle'", "no training picture"]),
    ],
)
def test_wrong_records_of_dogs(tmp_path: Path, files: list[str], labels: list[float], words: list[str]) -> None:
    make_dogs(tmp_path)
    cells = np.empty((len(files), 1), dtype=object)
    cells[:, 0] = files
    savemat(tmp_path / "lists/train_list.mat", {"file_list": cells, "labels": np.array(labels, dtype=float)[:, None]})
    sentence = refusal("dogs", tmp_path)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize("content", ["", HTML, "<?xml version='1.0' encoding='nonsense'?><a/>", "\xff\xfe"])
def test_wrong_annotations_of_dogs(tmp_path: Path, content: str) -> None:
    path = make_dogs(tmp_path) / "Annotation/n1-Pug/n1_1"
    path.write_bytes(content.encode("latin-1"))
    assert str(path) in refusal("dogs", tmp_path)
    become_a_folder(path)
    assert f"{path} cannot be read" in refusal("dogs", tmp_path)


@pytest.mark.parametrize("dataset", MAKERS)
def test_data_root_that_is_no_folder(tmp_path: Path, dataset: str) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("file", "loop", "file/deeper", "nul\0", "~nobody_of_this_name/data"):
        assert "is not a folder" in refusal(dataset, Path(name) if name[0] == "~" else tmp_path / name)


@pytest.mark.parametrize("dataset", MAKERS)
def test_what_may_not_be_read_is_named(tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root everything may be read, so the system's answer is played."""
    MAKERS[dataset](tmp_path)

    def refuse(path: object, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    sentence = refusal(dataset, tmp_path)
    assert "cannot be read (Permission denied)" in sentence and str(tmp_path) in sentence


# ---------------------------------------------------------------------------------------------------------------------
# Folders of pictures
# ---------------------------------------------------------------------------------------------------------------------


def link(path: Path, target: Path | str) -> None:
    path.symlink_to(target)


FOLDER_FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no folder": (lambda root: shutil.rmtree(root / "train") or shutil.rmtree(root / "test"), ["holds no folder"]),
    "class without pictures": (lambda root: (root / "train/c").mkdir(), ["'c'", "no training picture"]),
    "class of a text": (lambda root: (root / "train/c").mkdir() or (root / "train/c/a.txt").touch(), ["'c'"]),
    "class only tested": (lambda root: shutil.copytree(root / "test/a", root / "test/c"), ["'c'"]),
    "training is empty": (lambda root: shutil.rmtree(root / "train") or (root / "train").mkdir(), ["0 training and 2"]),
    "testing is empty": (lambda root: shutil.rmtree(root / "test") or (root / "test").mkdir(), ["3 training and 0"]),
    "class in a class": (lambda root: link(root / "train/a/more", root / "train/b"), ["train/b", "train/a"]),
    "class of two names": (lambda root: link(root / "train/c", "a"), ["train/a", "train/c", "linked into both"]),
    "test in training": (lambda root: link(root / "train/a/more", root / "test/a"), ["test/a", "train/a"]),
    "test is training": (lambda root: shutil.rmtree(root / "test") or link(root / "test", "train"), ["linked into"]),
    "class is the root": (lambda root: link(root / "train/c", root), ["'c'", "no training picture"]),
    "class is the disk": (lambda root: link(root / "train/c", "/"), ["'c'", "no training picture"]),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_wrong_folders(tmp_path: Path, fault: str) -> None:
    damage, words = FOLDER_FAULTS[fault]
    damage(make_folder(tmp_path))
    sentence = refusal("folder", tmp_path)
    assert all(word in sentence for word in words), sentence


def add_loops(root: Path) -> None:
    """Two in every folder: without care, twice as many paths with every level."""
    for folder in (root / "train/a", root / "train/a/deep", root / "train/b", root / "test/a"):
        link(folder / "here", ".")
        link(folder / "again", folder)
        link(folder / "up", "..")
        link(folder / "root", root)
        link(folder / "disk", "/")
        link(folder / "itself", "itself")
    link(root / "train/a/alias", "deep")


def move_behind_links(root: Path) -> None:
    for number, path in enumerate(sorted(root.glob("t*/*/*.png"))):
        (root / ".store").mkdir(exist_ok=True)
        path.rename(root / f".store/{number}")
        link(path, root / f".store/{number}")


def move_classes_behind_links(root: Path) -> None:
    for number, path in enumerate(sorted(root.glob("t*/*"))):
        (root / ".store").mkdir(exist_ok=True)
        path.rename(root / f".store/{number}")
        link(path, root / f".store/{number}")
        link(root / f".store/{number}/back", path)


def add_clutter(root: Path) -> None:
    for name in (".DS_Store", "train/.hidden/x.png", "train/a/._1.png", "train/a/Thumbs.db", "train/a/.thumbs/1.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "train/a/empty").mkdir()
    (root / "train/a/picture.jpg").mkdir()
    (root / "train/notes.png").touch()


@pytest.mark.parametrize("oddity", [add_loops, move_behind_links, move_classes_behind_links, add_clutter])
def test_odd_folders_give_the_same_catalogue(tmp_path: Path, oddity: Callable[[Path], None]) -> None:
    clean = read_catalogue("folder", make_folder(tmp_path))
    oddity(tmp_path)
    assert read_catalogue("folder", tmp_path) == clean
    assert len(clean.train) == 3 and find_bad_pictures(clean.train + clean.test, thorough=True) == {}


def test_names_of_every_kind(tmp_path: Path) -> None:
    names = ["a b", " leading", "Möwe", "鳥", "%s {0}", "a\nb", "\x1b[31m"]
    for name in names:
        for split in ("train", "test"):
            write_picture(tmp_path / split / name / f"{name} .jpg")
    catalogue = read_catalogue("folder", tmp_path)
    assert catalogue.class_names == sorted(names)
    assert [entry.source for entry in catalogue.train] == [tmp_path / "train" / n / f"{n} .jpg" for n in sorted(names)]
    assert find_bad_pictures(catalogue.train, thorough=True) == {}
    for entry in catalogue.train:
        entry.source.write_bytes(b"broken")
        with pytest.raises(DataError) as error:
            load_picture(entry.source)
        assert str(error.value).isprintable()


def test_names_of_every_kind_in_a_table(tmp_path: Path) -> None:
    names = ["x/two  blanks.jpg", "x/鳥.jpg", "x/%s.jpg", "x/\u3000.jpg", "x/\u00a0b\u00a0.jpg"]
    make_cub(tmp_path)
    for number, name in enumerate(names, start=1):
        replace_line(tmp_path / "images.txt", number, f"{number}\t {name}  ")
        write_picture(tmp_path / "images" / name)
    catalogue = read_catalogue("cub", tmp_path)
    found = {str(entry.source.relative_to(tmp_path / "images")) for entry in catalogue.train + catalogue.test}
    assert found == set(names)


# ---------------------------------------------------------------------------------------------------------------------
# Tables that are odd and right
# ---------------------------------------------------------------------------------------------------------------------

ODDITIES: dict[str, Callable[[bytes], bytes]] = {
    "no final newline": lambda text: text.rstrip(b"\n"),
    "CRLF": lambda text: text.replace(b"\n", b"\r\n"),
    "CR": lambda text: text.replace(b"\n", b"\r"),
    "byte-order mark": lambda text: b"\xef\xbb\xbf" + text,
    "mark and CRLF": lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"),
    "blank lines": lambda text: b"\n\r\n" + text.replace(b"\n", b"\n \t\n") + b"\n\n",
    "blanks around": lambda text: b"  " + text.replace(b"\n", b" \t\n"),
    "joined with itself": lambda text: text + text,
    "every line twice": lambda text: b"".join(2 * line for line in text.splitlines(keepends=True)),
}


@pytest.mark.parametrize("oddity", ODDITIES)
@pytest.mark.parametrize("dataset", ["cub", "nabirds", "aircraft"])
def test_odd_tables_give_the_same_catalogue(tmp_path: Path, dataset: str, oddity: str) -> None:
    clean = read_catalogue(dataset, MAKERS[dataset](tmp_path))
    for name in LISTS[dataset]:
        path = tmp_path / name
        path.write_bytes(ODDITIES[oddity](path.read_bytes()))
        assert read_catalogue(dataset, tmp_path) == clean
    assert clean.has_boxes


def test_equal_records_count_once(tmp_path: Path) -> None:
    cars = read_catalogue("cars", make_cars(tmp_path / "cars"))
    path = tmp_path / "cars/devkit/cars_train_annos.mat"
    annotations = loadmat(path)["annotations"]
    savemat(path, {"annotations": np.concatenate((annotations, annotations), axis=1)})
    assert read_catalogue("cars", tmp_path / "cars") == cars
    dogs = read_catalogue("dogs", make_dogs(tmp_path / "dogs"))
    path = tmp_path / "dogs/lists/train_list.mat"
    values = loadmat(path)
    savemat(path, {name: np.concatenate((values[name], values[name])) for name in ("file_list", "labels")})
    assert read_catalogue("dogs", tmp_path / "dogs") == dogs


@pytest.mark.parametrize("dataset", MAKERS)
def test_linked_pictures_and_roots(tmp_path: Path, dataset: str) -> None:
    root = MAKERS[dataset](tmp_path / "set")
    clean = read_catalogue(dataset, root)
    for number, entry in enumerate(clean.train + clean.test):
        entry.source.rename(tmp_path / f"{number}")
        link(entry.source, tmp_path / f"{number}")
    assert read_catalogue(dataset, root) == clean
    assert find_bad_pictures(clean.train + clean.test, thorough=False) == {}
    link(tmp_path / "link", root)
    assert len(read_catalogue(dataset, tmp_path / "link").train) == len(clean.train)
