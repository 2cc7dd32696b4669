"""Data as people have them: parts and classes in many spellings, deeper than expected, or beside other things."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_pictures import write_picture
from PIL import Image

from config import Settings
from datasets import Catalogue, DataError, choose_split, read_catalogue
from utils.data.kinds import is_picture
from utils.data.parts import part_of
from utils.files import make_output_folder


def write_tree(root: Path, *folders: str, count: int = 2) -> Path:
    """So many pictures in each of the folders."""
    for folder in folders:
        for number in range(count):
            write_picture(root / folder / f"{number}.png")
    return root


def classes_in(*parts: str, names: Iterable[str] = ("ant", "bee")) -> list[str]:
    return [f"{part}/{name}" for part in parts for name in names]


def sizes(catalogue: Catalogue) -> dict[str, int]:
    return {part: len(entries) for part, entries in catalogue.parts.items()}


def notes_of(catalogue: Catalogue) -> str:
    return "\n".join(catalogue.notes)


@pytest.mark.parametrize("training", ["train", "Training", "TRAIN", "train_images", "TrainSet", "1-train"])
@pytest.mark.parametrize("validation", ["val", "Valid", "validation", "Val_Data", "dev"])
def test_parts_in_any_spelling(tmp_path: Path, training: str, validation: str) -> None:
    write_tree(tmp_path, *classes_in(training, validation, "Test"))
    catalogue = read_catalogue("folder", tmp_path)
    assert catalogue.class_names == ["ant", "bee"]
    assert sizes(catalogue) == {"training": 4, "validation": 4, "test": 4}
    assert {entry.source.parts[-3] for entry in catalogue.validation} == {validation}
    settings = Settings(dataset="folder")
    assert choose_split(settings, catalogue)[:2] == (catalogue.train, catalogue.validation)
    assert "4 validation images (the data's own validation part)" in choose_split(settings, catalogue)[2]
    on_test = SimpleNamespace(select_on="test")
    assert choose_split(on_test, catalogue)[:2] == ([*catalogue.train, *catalogue.validation], catalogue.test)


@pytest.mark.parametrize("name", ["trains", "constrain", "value", "vale", "attest", "contest", "tested_trains", "ant"])
def test_other_names_are_of_no_part(name: str) -> None:
    assert part_of(name) is None


def test_a_validation_part_is_never_the_test_set(tmp_path: Path) -> None:
    catalogue = read_catalogue("folder", write_tree(tmp_path, *classes_in("train", "valid"), count=5))
    assert sizes(catalogue) == {"training": 8, "validation": 10, "test": 2}
    assert not {entry.source for entry in catalogue.test} & {entry.source for entry in catalogue.validation}
    assert "no test part is given: 2 images are held back" in notes_of(catalogue)


def test_two_folders_for_one_part_are_refused(tmp_path: Path) -> None:
    write_tree(tmp_path, *classes_in("train", "test", "Testing"))
    with pytest.raises(DataError, match=r"Testing and .*/test both have a name of the test part"):
        read_catalogue("folder", tmp_path)


@pytest.mark.parametrize(
    ("prefix", "doubled"), [("cars", False), ("a/b", False), ("data/data", True), ("", True)], ids=str
)
def test_a_tree_that_lies_deeper(tmp_path: Path, prefix: str, doubled: bool) -> None:
    parts = ("train/train", "test/test") if doubled else ("train", "test")
    write_tree(tmp_path / prefix, *classes_in(*parts))
    (tmp_path / "__MACOSX/train/ant").mkdir(parents=True)
    (tmp_path / "README.txt").write_text("cars")
    catalogue = read_catalogue("folder", tmp_path)
    assert catalogue.class_names == ["ant", "bee"]
    assert sizes(catalogue) == {"training": 4, "test": 4}
    assert (str(tmp_path / prefix) in notes_of(catalogue)) == (prefix != "")


def test_one_tree_that_lies_deeper(tmp_path: Path) -> None:
    write_tree(tmp_path, *classes_in("birds/images"), count=5)
    (tmp_path / "birds/annotations").mkdir()
    catalogue = read_catalogue("folder", tmp_path)
    assert catalogue.class_names == ["ant", "bee"]
    assert sizes(catalogue) == {"training": 8, "test": 2}
    assert str(tmp_path / "birds/images") in notes_of(catalogue)


def test_several_trees_are_refused_with_a_command(tmp_path: Path) -> None:
    write_tree(tmp_path, *classes_in("fold1/train", "fold1/test", "fold2/train", "fold2/test"))
    with pytest.raises(DataError, match=rf"fold1 and fold2.*--data_root {tmp_path}/fold1"):
        read_catalogue("folder", tmp_path)


def test_a_test_folder_without_labels_is_left_out(tmp_path: Path) -> None:
    write_tree(tmp_path, *classes_in("train"), "test", count=5)
    catalogue = read_catalogue("folder", tmp_path)
    assert sizes(catalogue) == {"training": 8, "test": 2}
    assert all("/train/" in str(entry.source) for entry in catalogue.test)
    assert f"{tmp_path / 'test'} holds pictures and no folders of classes" in notes_of(catalogue)


@pytest.mark.parametrize("folders", [["train_images", "test_images"], ["images"], ["."]])
@pytest.mark.parametrize("file", ["train.csv", "data.parquet"])
def test_flat_pictures_are_refused_with_what_works(tmp_path: Path, folders: list[str], file: str) -> None:
    write_tree(tmp_path, *folders)
    (tmp_path / file).write_text("image_id,label\n0.png,1\n")
    with pytest.raises(DataError) as refusal:
        read_catalogue("folder", tmp_path)
    works = f"--dataset csv --data_root {tmp_path} --labels {tmp_path / file}" if file == "train.csv" else "settings.md"
    assert works in str(refusal.value) and "one folder of pictures per class" in str(refusal.value)


def test_parquet_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"train-00000.parquet: .* write its pictures into a folder per class first"):
        read_catalogue("folder", tmp_path)


def test_folders_of_folders_need_a_level(tmp_path: Path) -> None:
    write_tree(tmp_path, *(f"{make}/{model}/2011" for make in ("audi", "bmw") for model in ("one", "two")))
    with pytest.raises(DataError, match=r"\(audi/one\).*--class_level 1 .*'audi', or --class_level 2 .*'audi/one'"):
        read_catalogue("folder", tmp_path)
    names = {level: read_catalogue("folder", tmp_path, class_level=level).class_names for level in (1, 2, 3)}
    assert names[1] == ["audi", "bmw"]
    assert names[2] == ["audi/one", "audi/two", "bmw/one", "bmw/two"]
    assert names[3] == ["audi/one/2011", "audi/two/2011", "bmw/one/2011", "bmw/two/2011"]


def test_an_empty_class_is_refused_unless_it_is_not_wanted(tmp_path: Path) -> None:
    write_tree(tmp_path, *classes_in("train", "test"))
    (tmp_path / "train/wasp").mkdir()
    with pytest.raises(DataError, match="'wasp': add some, remove the class, or name those to train with --classes"):
        read_catalogue("folder", tmp_path)
    assert read_catalogue("folder", tmp_path, classes=("ant", "bee")).class_names == ["ant", "bee"]


def test_every_kind_that_pillow_opens_is_read(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    Image.init()
    kinds = {"jfif": "JPEG", "gif": "GIF", "jp2": "JPEG2000", "avif": "AVIF", "tga": "TGA", "JPG_large": "JPEG"}
    kinds = {ending: kind for ending, kind in kinds.items() if kind in Image.SAVE}
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for ending, kind in kinds.items():
            picture.save(tmp_path / name / f"a.{ending}", format=kind)
        picture.save(tmp_path / name / "no_ending", format="PNG")
        (tmp_path / name / "b.heic_").write_bytes(b"no picture")
        (tmp_path / name / "list.txt").write_text("no picture")
        (tmp_path / name / "Thumbs.db").write_text("no picture")
    catalogue = read_catalogue("folder", tmp_path)
    assert len(catalogue.entries) == 2 * (len(kinds) + 1)
    (left_out,) = (note for note in catalogue.notes if "left out" in note)
    assert "4 files" in left_out and "2 .heic_, 2 .txt" in left_out and str(tmp_path / "ant") in left_out


def test_a_class_of_photographs_that_pillow_does_not_read_is_refused_with_that_reason(tmp_path: Path) -> None:
    """As those of telephones."""
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for number in range(10):
            (tmp_path / name / f"IMG_{number}.HEIC").write_bytes(b"something that Pillow cannot read")
    reason = rf"20 .HEIC; the first is {tmp_path / 'ant'}.*\): convert the photographs among them, to JPEG for example"
    with pytest.raises(DataError, match=rf"has 0 training and 0 test pictures: expected some of each; .*{reason}$"):
        read_catalogue("folder", tmp_path)
    for number in range(10):
        write_picture(tmp_path / "bee" / f"{number}.jpg")
    with pytest.raises(DataError, match=rf"the first is 'ant': .* with --classes; .*{reason}"):
        read_catalogue("folder", tmp_path)


def test_a_kind_that_a_package_adds_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import utils.data.kinds

    (tmp_path / "a.HEIC").write_bytes(b"something that Pillow cannot read")
    assert not is_picture(tmp_path / "a.HEIC")
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
    monkeypatch.setitem(Image.OPEN, "HEIF", (None, None))
    utils.data.kinds.picture_endings.cache_clear()
    assert is_picture(tmp_path / "a.HEIC")
    monkeypatch.undo()
    utils.data.kinds.picture_endings.cache_clear()


def test_what_programs_wrote_is_never_read(tmp_path: Path) -> None:
    write_tree(tmp_path, "ant", "bee", count=5)
    before = read_catalogue("folder", tmp_path)
    run = tmp_path / "checkpoint/folder-sgkrl"
    for name in ("config.json", "log.jsonl", "cache.pictures", "pictures/epoch-001.png"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        write_picture(run / name) if name.endswith(".png") else (run / name).touch()
    make_output_folder(tmp_path / "predictions")
    write_tree(tmp_path, "predictions/ant")
    after = read_catalogue("folder", tmp_path)
    assert after == before
