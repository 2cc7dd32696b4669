"""The reader that docs/settings.md shows, used as it stands there, and readers with a slip."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import config
from datasets import DataError, load_catalogue, read_catalogue
from utils.data import readers
from utils.options import SettingsError

DOCUMENT = Path(config.__file__).parent / "docs" / "settings.md"
SECTION = DOCUMENT.read_text(encoding="utf-8").partition("### A reader of your own\n")[2].partition("\n## ")[0]
(EXAMPLE,) = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)


@pytest.fixture
def write_reader(tmp_path, monkeypatch):
    """A function: put a file `mine.py` into a folder that belongs to `utils/data/readers/` for this test."""

    def write(source: str) -> None:
        (tmp_path / "mine.py").write_text(source, encoding="utf-8")

    monkeypatch.setattr(readers, "__path__", [*readers.__path__, str(tmp_path)])
    monkeypatch.setattr(readers, "READERS", (*readers.READERS, "mine"))
    monkeypatch.setitem(config.DATASETS, "mine", {"epochs": 7})
    yield write
    sys.modules.pop(f"{readers.__name__}.mine", None)


def test_the_example_reads_what_a_run_asks_for(write_reader, picture_tree):
    write_reader(EXAMPLE.replace("*.jpg", "*.png"))
    settings = config.parse_settings(
        ["--dataset", "mine", "--data_root", str(picture_tree), "--classes", "blue", "red"]
    )
    assert settings.epochs == 7
    catalogue, _ = load_catalogue(settings)
    expected, _ = load_catalogue(config.complete(config.Settings(dataset="folder", data_root=str(picture_tree))))
    assert catalogue.class_names == ["blue", "red"]
    assert len(catalogue.train) > len(catalogue.test) > 0
    assert {entry.source for entry in catalogue.entries} < {entry.source for entry in expected.entries}


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("def read(", "def reed(", r"mine\.py has no function read: it makes a Catalogue of a Source$"),
        ("Entry(path, label)", "Entry(str(path), label)", r"reader lists '.*png': expected a pathlib\.Path"),
        ("Entry(path, label)", "Entry(path, label + 1)", r"the label 3: expected an int from 0 to 2, the place of"),
        ("Entry(path, label)", "Entry(path, name)", r"the label 'blue': expected an int from 0 to 2"),
        ("Entry(path, label)", "Entry(path, __import__('numpy').int64(label))", r"the label .*0.*: expected an int"),
        ("Entry(path, label)", "(path, label)", r"reader lists \(.*png'\), 0\): expected an Entry$"),
    ],
)
def test_slips_in_a_reader_are_one_sentence(old, new, sentence, write_reader, picture_tree):
    assert old in EXAMPLE
    write_reader(EXAMPLE.replace("*.jpg", "*.png").replace(old, new))
    with pytest.raises(DataError, match=sentence):
        read_catalogue("mine", picture_tree)


def test_a_reader_without_a_row_is_found(tmp_path, monkeypatch):
    others = {name: row for name, row in config.DATASETS.items() if name != "pets"}
    monkeypatch.setattr(config, "DATASETS", others)
    with pytest.raises(SettingsError, match="unknown dataset 'pets'; .* or give its reader's file a row in DATASETS"):
        config.parse_settings(["--dataset", "pets", "--data_root", str(tmp_path)])
    with pytest.raises(SettingsError, match="unknown dataset 'pet'; choose one of demo, .*, csv$"):
        config.parse_settings(["--dataset", "pet", "--data_root", str(tmp_path)])
