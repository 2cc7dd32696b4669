"""`test.py --save_logits`: what every branch says of every test image, as one file of arrays."""

from __future__ import annotations

import csv

import numpy
import pytest
import torch
from torch import Tensor

import train
from networks.outputs import combine_logits

pytestmark = pytest.mark.usefixtures("thin_trunk")


def test_the_logits_are_those_that_were_reported(tiny_run, tmp_path, evaluation_script) -> None:
    train.main(tiny_run(tmp_path, "--ensembling", "mean_probability", model="sgkrl"))
    folder = tmp_path / "folder-sgkrl"
    evaluation_script.main([str(folder / "last.pth"), "--save_logits", "--shuffle", "--workers", "0"])
    with (folder / "predictions-last-shuffled.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with numpy.load(folder / "logits-last-shuffled.npz") as file:  # no pickle in it
        saved = {name: file[name] for name in file.files}
    branches = ["prediction", "raw", "fused", "object", "window", "graph"]
    assert set(saved) == {"pictures", "labels", "class_names", *branches}
    assert saved["pictures"].tolist() == [row["picture"] for row in rows]
    assert [saved["class_names"][label] for label in saved["labels"]] == [row["label"] for row in rows]
    assert [saved["class_names"][row.argmax()] for row in saved["prediction"]] == [row["prediction"] for row in rows]
    for name in branches:
        assert (saved[name].shape, saved[name].dtype) == ((6, 3), numpy.float32)
        right = (saved[name].argmax(1) == saved["labels"]).astype(int)
        assert right.tolist() == [int(row["correct" if name == "prediction" else name]) for row in rows]
    ensembled = torch.stack([torch.from_numpy(saved[name]) for name in ("raw", "fused", "object", "graph")])
    expected: Tensor = combine_logits(ensembled, "mean_probability")
    torch.testing.assert_close(torch.from_numpy(saved["prediction"]), expected)


def test_without_the_flag_none_are_kept(tiny_run, tmp_path, evaluation_script) -> None:
    train.main(tiny_run(tmp_path))
    evaluation_script.main([str(tmp_path / "folder-resnet" / "best.pth"), "--workers", "0"])
    assert not list(tmp_path.rglob("*.npz"))
