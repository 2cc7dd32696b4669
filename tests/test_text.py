"""Names of any bytes, in tables, on terminals and in reports."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import pytest
import torch
from made_pictures import write_picture

import export
import predict
import train
from networks.outputs import NetworkOutput
from utils.errors import exit_with_one_sentence
from utils.reporting.class_tables import write_classes, write_confusions
from utils.reporting.results import ResultCollector, read_predictions
from utils.text import cell, json_line, one_line, visible

pytestmark = pytest.mark.usefixtures("thin_trunk")


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_name_is_a_formula_in_a_table(name: str) -> None:
    assert cell(name)[0] == "'"
    assert cell("a" + name) == one_line("a" + name)


def test_no_name_moves_the_cursor() -> None:
    for text in ("red\x1b[2J", "a\nb", "a\rb", "b\udcf6se", "\u202ereversed", "\x07"):
        for shown in (one_line(text), json_line(text)):
            assert shown.isprintable(), ascii(text)
    assert one_line("Möwe, 海鷗 'x'") == "Möwe, 海鷗 'x'"
    assert visible("two\nlines\x1b[2J") == "two\nlines\\x1b[2J"


def test_formulas_in_names_are_text_in_the_table_of_predictions(tmp_path: Path) -> None:
    collector = ResultCollector(96)
    batch = type("Batch", (), {"labels": torch.tensor([0]), "boxes": None, "paths": ["=cmd.jpg"]})
    collector(batch, NetworkOutput({"raw": torch.tensor([[0.0, 1.0]])}), torch.tensor([[0.0, 1.0]]))
    collector.write(tmp_path / "predictions.csv", ["-a", "@b"])
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    assert table[1][:3] == ["'=cmd.jpg", "'-a", "'@b"]


def test_formulas_in_names_are_text_in_the_tables_of_classes(tmp_path: Path) -> None:
    names, matrix = ["=1+1", "@b\x1b[31m", "auk"], torch.eye(3, dtype=torch.long)
    write_classes(tmp_path / "classes.csv", matrix, names)
    write_confusions(tmp_path / "confusions.csv", matrix, names)
    for file in ("classes.csv", "confusions.csv"):
        with (tmp_path / file).open(encoding="utf-8", newline="") as table:
            header, *rows = csv.reader(table)
        assert [row[0] for row in rows] == ["'=1+1", "'@b\\x1b[31m", "auk"]
    assert header[1:] == [row[0] for row in rows]


@pytest.mark.skipif(os.name == "nt", reason="file names are text on Windows")
def test_classes_named_in_bytes_that_are_no_text_are_trained_and_evaluated(
    picture_tree, tiny_run, evaluation_script, tmp_path, capsys
) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(picture_tree, tree)
    (tree / "red").rename(tree / os.fsdecode(b"M\xf6we"))
    train.main([*tiny_run(tmp_path / "runs"), "--data_root", str(tree)])
    best = tmp_path / "runs" / "folder-resnet" / "best.pth"
    evaluation_script.main([str(best)])
    capsys.readouterr().out.encode("utf-8", "backslashreplace")
    assert {path.name for path in best.parent.iterdir()} >= {"report.html", "report.json", "predictions.csv"}
    assert len(read_predictions(best.parent / "predictions.csv")) == 6


def test_a_picture_whose_end_was_never_written_is_refused_by_predict_too(tmp_path: Path) -> None:
    write_picture(tmp_path / "whole.jpg", size=(200, 200))
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "zeros.jpg").write_bytes(content[: len(content) // 2] + bytes(4096))
    pictures = predict.ReadablePictures(
        [tmp_path / "whole.jpg", tmp_path / "zeros.jpg"], image_size=96, resize_size=96, keep_aspect_ratio=False
    )
    assert not isinstance(pictures[0], str)
    assert "its end was never written" in pictures[1]


def test_a_full_disk_is_one_sentence_and_no_half_file_for_export(tiny_run, tmp_path, capsys, monkeypatch) -> None:
    train.main(tiny_run(tmp_path))
    out = tmp_path / "out" / "model.pt2"

    def refuse(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence(elsewhere="--out"):
        export.main(["--checkpoint", str(tmp_path / "folder-resnet" / "best.pth"), "--out", str(out)])
    assert ending.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert "No space left on device" in sentence
    assert not list(out.parent.iterdir())
