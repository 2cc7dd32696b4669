"""The benchmarks run, and their figures add up; no test depends on how fast anything is."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from cases import slow_but_for

import train
from networks import MODELS
from networks.backbone import Backbone
from utils.training.learning import Learning

pytestmark = pytest.mark.usefixtures("thin_trunk")

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """A function that imports a script of benchmarks/ as it imports its neighbours when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.setattr(sys, "path", list(sys.path))
        yield importlib.import_module


@pytest.mark.parametrize("model", slow_but_for(("sgkrl",), MODELS))
def test_throughput_of_every_system(model: str, benchmark, tmp_path: Path, capsys) -> None:
    path = tmp_path / "folder" / "figures.json"
    words = f"--model {model} --backbone resnet18 --input_size 96 --classes 5 --device cpu --rounds 1"
    benchmark("throughput").main(
        [*words.split(), "--inference_batches", "1", "--train_batches", "2", "--json", str(path)]
    )
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["date"]
    inference, train = report["measurements"]
    assert (inference["mode"], train["mode"]) == ("inference", "train")
    shown = 4 if model == "dcl" else 2  # every picture whole and in pieces, in one pass
    assert inference["passes"][0] == [1, 3, 96, 96] and train["passes"][0] == [shown, 3, 96, 96]
    if model in ("sgkrl", "sgkrl_published"):  # raw, object, seven windows of half the size
        assert inference["passes"][1:] == [[1, 3, 96, 96], [7, 3, 48, 48]]
    for result in report["measurements"]:
        assert set(result["variants"]) == {"off", "on", "floor"}
        for timing in result["variants"].values():
            assert timing["images_per_second"] == pytest.approx(result["batch_size"] / timing["median"])
            assert timing["backbone_tflop_per_second"] > 0
    printed = capsys.readouterr().out
    assert "train 2 floor" in printed and "inference 1 on" in printed


@pytest.mark.slow
def test_throughput_with_a_system_s_own_settings(benchmark, capsys) -> None:
    words = "--model sgkrl --backbone resnet18 --input_size 128 --classes 5 --device cpu --rounds 1"
    words += " --inference_batches 1 --train_batches 2 --own raw_size=96 window_source=stage3"
    report = benchmark("throughput").main(words.split())
    assert report["options"]["own"] == {"raw_size": 96, "window_source": "stage3"}
    for result in report["measurements"]:
        assert list(result["variants"]) == ["off", "on", "own", "floor"]
        assert result["variants"]["own"]["backbone_tflop_per_second"] is None  # it has other passes
    assert "train 2 own" in capsys.readouterr().out


def test_backbone_flops_are_those_of_the_literature(benchmark) -> None:
    """ResNet-50 at 224 pixels: 4.1 thousand million multiplications and additions, each pair two operations."""
    variants = benchmark("throughput_variants")
    shapes = [torch.Size((2, 3, 224, 224))]
    forward = variants.backbone_flops(Backbone("resnet50"), shapes, training=False)
    assert forward / 2 == pytest.approx(2 * 4.09e9, rel=0.01)
    both = variants.backbone_flops(Backbone("resnet50"), shapes, training=True)
    assert 2.9 * forward < both < 3 * forward  # the pictures themselves need no gradient


def test_costs_beside_the_plain_network(benchmark, tmp_path: Path, capsys) -> None:
    path = tmp_path / "systems.json"
    words = f"--models resnet sgkrl_published --backbone resnet18 --input_size 96 --classes 5 --json {path}"
    words += " --device cpu --precision float32 --rounds 1 --inference_batch 2 --train_batch 2"
    benchmark("systems").main(words.split())
    plain, sgkrl = json.loads(path.read_text(encoding="utf-8"))["systems"].values()
    assert plain["train"]["times_plain"] == plain["inference"]["times_plain"] == 1
    backbone = Backbone("resnet18")
    forward = benchmark("throughput_variants").backbone_flops(backbone, [torch.Size((1, 3, 96, 96))], training=False)
    head = backbone.embedding_channels * 5
    assert plain["parameters"] == sum(p.numel() for p in backbone.parameters()) + head + 5 < sgkrl["parameters"]
    assert plain["inference"]["gmac_per_image"] == pytest.approx((forward / 2 + head) / 1e9)
    assert sgkrl["inference"]["passes"] == [[2, 3, 96, 96], [2, 3, 96, 96], [14, 3, 48, 48]]
    assert sgkrl["train"]["gmac_per_image"] > 2 * sgkrl["inference"]["gmac_per_image"]  # the backward pass as well
    assert "| 96, 96, 7 x 48 |" in capsys.readouterr().out


@pytest.mark.slow
def test_costs_of_a_system_with_other_options(benchmark, tmp_path: Path) -> None:
    """Windows of cells: the same system, whose last pass takes the last stage of the trunk alone."""
    path = tmp_path / "systems.json"
    words = f"--models sgkrl sgkrl-stage3-windows --backbone resnet18 --input_size 96 --classes 5 --json {path}"
    words += " --device cpu --precision float32 --rounds 1 --inference_batch 2 --train_batch 2"
    systems = benchmark("systems")
    systems.main(words.split())
    plain, cells = json.loads(path.read_text(encoding="utf-8"))["systems"].values()
    assert plain["parameters"] == cells["parameters"]
    assert systems.as_passes(plain["inference"]["passes"]) == "96, 96, 7 x 48"
    assert systems.as_passes(cells["inference"]["passes"]) == "96, 96, 7 x 3 cells"
    for mode in ("inference", "train"):
        assert cells[mode]["gmac_per_image"] < plain[mode]["gmac_per_image"]


def test_ratios_compare_times_of_the_same_round(benchmark) -> None:
    ratio = benchmark("measuring").ratio
    assert ratio({"seconds": [2.0, 40.0, 6.0]}, {"seconds": [1.0, 20.0, 2.0]}) == 2.0


def test_every_part_equals_its_reference(benchmark, tmp_path: Path, capsys) -> None:
    path = tmp_path / "parts.json"
    words = "--batches 2 --input_size 96 --channels 16 --rounds 1 --device cpu"
    report = benchmark("parts").main([*words.split(), "--json", str(path)])
    assert json.loads(path.read_text(encoding="utf-8"))["parts"] == report["parts"]
    assert len(report["parts"]) == 8
    assert all(part["equal"] for part in report["parts"])
    assert "anchor NMS" in capsys.readouterr().out


@pytest.mark.slow
def test_a_part_that_is_wrong_ends_the_benchmark_with_an_error(benchmark, monkeypatch) -> None:
    parts = benchmark("parts")
    suppress = parts.suppress
    monkeypatch.setattr(parts, "suppress", lambda features, share: suppress(features, share) + 1)
    with pytest.raises(SystemExit) as end:
        parts.main(["--batches", "1", "--input_size", "96", "--channels", "16", "--rounds", "1", "--device", "cpu"])
    assert end.value.code == 1


def test_startup_ends_with_the_first_step(benchmark, monkeypatch) -> None:
    """Its processes run here, where everything has been imported."""
    startup, steps = benchmark("startup"), []
    learn_from = Learning.learn_from
    monkeypatch.setattr(train, "train_one_epoch", train.train_one_epoch)  # so that it is put back
    monkeypatch.setattr(Learning, "learn_from", lambda *arguments: steps.append(1) or learn_from(*arguments))

    def run(flag: str, code: str, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", [flag, *words])
        with pytest.raises(SystemExit) if words else contextlib.nullcontext() as end:
            exec(code, {})
        assert not words or end.value.code == 0

    monkeypatch.setattr(startup, "run", run)
    report = startup.main(["--images", "300"])
    assert len(steps) == 1
    assert list(report["seconds"])[2:] == ["index", "check", "fingerprint", "first step"]


def test_agreement_of_folded_float32_is_complete(benchmark, tiny_run, tmp_path: Path) -> None:
    words = tiny_run(tmp_path, model="sgkrl")
    report = benchmark("agreement").main(words)
    values = report["agreement"]["folded, channels_last, float32"]
    assert values["same box"] == 1 and values["same windows"] == 1 and values["same prediction"] == 1
    assert report["images"] == 6
    assert benchmark("agreement").main([*words, "--images", "2"])["images"] == 2
    train.main(words)
    report = benchmark("agreement").main(["--checkpoint", str(tmp_path / "folder-sgkrl" / "last.pth"), "--images", "2"])
    assert report["settings"]["model"] == "sgkrl"
    assert report["agreement"]["folded, channels_last, float32"]["same prediction"] == 1
