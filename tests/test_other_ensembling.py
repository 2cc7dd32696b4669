"""`test.py --ensembling`: another ensembling than the run's is the one that a run trained with it would have had."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from cases import slow_but_for

import train
from utils.options import SettingsError

pytestmark = pytest.mark.usefixtures("thin_trunk")

OPTIONS = ("--prediction", "raw", "object", "--warmup_epochs", "0", "--learning_rate", "0.02", "--ema_decay", "0.5")


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory) -> dict[str, Path]:
    """The checkpoints of two runs that differ in nothing but their ensembling."""
    folder = tmp_path_factory.mktemp("ensemblings")
    for name in ("mean_probability", "learned"):
        train.main(tiny_run(folder, *OPTIONS, "--ensembling", name, "--name", name, model="mmal"))
    return {name: folder / f"folder-mmal-{name}" / "last.pth" for name in ("mean_probability", "learned")}


def evaluated(script, checkpoint: Path, out: Path, *flags: str) -> tuple[dict, list[dict]]:
    """The report and the predictions of an evaluation in a folder of its own."""
    script.main([str(checkpoint), "--out", str(out), "--workers", "0", *flags])
    (report,), (predictions,) = out.glob("report*.json"), out.glob("predictions*.csv")
    with predictions.open(encoding="utf-8", newline="") as file:
        return json.loads(report.read_text(encoding="utf-8")), list(csv.DictReader(file))


@pytest.mark.parametrize("weights", slow_but_for(["ema"], ["plain", "ema"]))
@pytest.mark.parametrize(("of_run", "asked"), [("mean_probability", "learned"), ("learned", "mean_probability")])
def test_it_is_that_of_a_run_trained_with_it(runs, of_run, asked, weights, tmp_path, evaluation_script) -> None:
    flags = ("--weights", weights)
    expected, its_predictions = evaluated(evaluation_script, runs[asked], tmp_path / "own", *flags)
    report, predictions = evaluated(evaluation_script, runs[of_run], tmp_path / "other", *flags, "--ensembling", asked)
    assert report["settings"]["ensembling"] == asked
    assert report["prediction"] == expected["prediction"]
    # rounding differs where batch norm is folded into the convolutions before the weights are learnt
    assert (report["ensemble_weights"] or {}) == pytest.approx(expected["ensemble_weights"] or {}, abs=1e-4)
    assert report["branches"] == expected["branches"]
    assert [line["prediction"] for line in predictions] == [line["prediction"] for line in its_predictions]
    sure = [[float(line["probability"]) for line in lines] for lines in (predictions, its_predictions)]
    assert sure[0] == pytest.approx(sure[1], abs=1e-4)


def test_its_report_lies_beside_that_of_the_run(runs, evaluation_script, capsys) -> None:
    checkpoint = runs["mean_probability"]
    evaluation_script.main([str(checkpoint), "--workers", "0"])
    own = (checkpoint.parent / "report-last.json").read_bytes()
    capsys.readouterr()
    evaluation_script.main([str(checkpoint), "--workers", "0", "--ensembling", "learned"])
    assert "note: the weights of the branches are learnt from 6 validation images of the run" in capsys.readouterr().out
    assert (checkpoint.parent / "report-last.json").read_bytes() == own
    other = json.loads((checkpoint.parent / "report-last-learned.json").read_text(encoding="utf-8"))
    assert set(other["ensemble_weights"]) == {"raw", "object"}
    evaluation_script.main(["--compare", *(str(checkpoint.parent / f"report-last{e}.json") for e in ("", "-learned"))])
    assert "learned" in capsys.readouterr().out


def test_the_ensembling_of_the_run_keeps_its_weights(runs, tmp_path, evaluation_script) -> None:
    expected, _ = evaluated(evaluation_script, runs["learned"], tmp_path / "own")
    report, _ = evaluated(evaluation_script, runs["learned"], tmp_path / "named", "--ensembling", "learned")
    assert report["ensemble_weights"] == expected["ensemble_weights"] is not None


def test_one_branch_needs_no_images_to_learn_from(tiny_run, tmp_path, evaluation_script) -> None:
    train.main(tiny_run(tmp_path, "--select_on", "validation"))
    report, _ = evaluated(
        evaluation_script, tmp_path / "folder-resnet" / "best.pth", tmp_path / "out", "--ensembling", "learned"
    )
    assert (report["prediction"], report["ensemble_weights"]) == ("raw", None)


# ---- Refusals -----------------------------------------------------------------------------------------------------


def test_test_images_teach_no_weights(tiny_run, tmp_path, evaluation_script) -> None:
    train.main(tiny_run(tmp_path, *OPTIONS, "--select_on", "test", model="mmal"))
    best = str(tmp_path / "folder-mmal" / "best.pth")
    with pytest.raises(SettingsError, match="--ensembling needs validation images, and this run trained on all"):
        evaluation_script.main([best, "--ensembling", "learned"])
    evaluation_script.main([best, "--ensembling", "mean_logits", "--workers", "0"])  # which learns nothing


def test_weights_are_not_learnt_from_other_pictures(runs, picture_tree, tmp_path, evaluation_script) -> None:
    (tmp_path / "new").mkdir()
    for name in ("blue", "green"):
        (tmp_path / "new" / name).mkdir()
        content = (picture_tree / name / "0.png").read_bytes()
        (tmp_path / "new" / name / "one.png").write_bytes(content)
    words = [str(runs["mean_probability"]), "--data_root", str(tmp_path / "new"), "--include_trained"]
    with pytest.raises(SettingsError, match="--ensembling needs the run's own validation images"):
        evaluation_script.main([*words, "--ensembling", "learned"])


def test_the_exit_threshold_of_training_goes_with_its_ensembling(tiny_run, tmp_path, evaluation_script) -> None:
    train.main(tiny_run(tmp_path, "--warmup_epochs", "0", "--ensembling", "mean_probability", model="sgkrl"))
    best = str(tmp_path / "folder-sgkrl" / "best.pth")
    with pytest.raises(SettingsError, match="was learnt for the run's ensembling, mean_probability, not for mean_log"):
        evaluation_script.main([best, "--ensembling", "mean_logits", "--exit_threshold", "learned"])
