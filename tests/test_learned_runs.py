"""Runs with `--ensembling learned`: weights learnt after every epoch, kept, resumed, shared, and used afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import run_script, run_two_processes
from whole_runs import assert_same_run, interrupt_in_epoch, read_log

import config
import export
import predict
import train
from config import parse_settings
from datasets import Pictures, choose_split, loading_of, read_catalogue
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.data.image_batches import normalised
from utils.options import SettingsError
from utils.training.building import load_trained
from utils.training.ensemble import fit_weights

pytestmark = pytest.mark.usefixtures("thin_trunk")

LEARNED = ("--ensembling", "learned", "--prediction", "raw", "object", "--warmup_epochs", "0")
OPTIONS = (*LEARNED, "--epochs", "2", "--learning_rate", "0.02", "--ema_decay", "0.5", "--keep_checkpoints", "2")


@pytest.fixture(scope="module")
def learned(tiny_run, tmp_path_factory) -> Path:
    """The folder of a run over two epochs, with an average of the weights; tests only read it."""
    folder = tmp_path_factory.mktemp("learned")
    train.main(tiny_run(folder, *OPTIONS, model="mmal"))
    yield folder / "folder-mmal"
    shutil.rmtree(folder)


def weights_in(checkpoint: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the network and of its average."""
    saved = load_checkpoint(checkpoint)
    return saved["network"]["ensemble_weights"], saved["ema"]["module.ensemble_weights"]


@torch.no_grad()
def relearned(checkpoint: Path, weights: str) -> tuple[torch.Tensor, float]:
    """The weights that follow from a checkpoint's network and validation images, and the accuracy with them there."""
    trained = load_trained(checkpoint, config.rebuilt, weights=weights)
    catalogue = read_catalogue("folder", trained.settings.data_root, test_fraction=0.25)
    _, entries, _ = choose_split(trained.settings, catalogue)
    samples = list(Pictures(entries, **loading_of(trained.settings)))
    output = trained.network(normalised(torch.stack([sample.image for sample in samples])))
    labels = torch.tensor([sample.label for sample in samples])
    logits = torch.stack([output.logits[name] for name in ("raw", "object")]).log_softmax(-1)
    found = fit_weights(logits, labels)
    return found, ((found[:, None, None] * logits).sum(0).argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize(("epoch", "weights"), [(1, "plain"), (2, "plain"), (1, "ema"), (2, "ema")])
def test_every_checkpoint_holds_the_weights_learnt_for_it(learned, epoch: int, weights: str) -> None:
    checkpoint = learned / f"epoch-00{epoch}.pth"
    expected, accuracy = relearned(checkpoint, weights)
    held = weights_in(checkpoint)[weights == "ema"]
    torch.testing.assert_close(held.double(), expected, rtol=0, atol=1e-4)
    line, group = read_log(learned)[epoch - 1], "validation_ema" if weights == "ema" else "validation"
    assert line[f"{group}/accuracy/prediction"] == pytest.approx(accuracy)
    assert [line[f"{group}/ensemble_weight/{name}"] for name in ("raw", "object")] == held.tolist()


def test_best_is_chosen_with_them(learned) -> None:
    accuracies = [line["validation_ema/accuracy/prediction"] for line in read_log(learned)]
    best = load_checkpoint(learned / "best.pth")
    assert best["best"] == {"accuracy": max(accuracies), "epoch": accuracies.index(max(accuracies)) + 1}
    of_epoch = weights_in(learned / f"epoch-00{best['epoch']}.pth")
    assert all(map(torch.equal, weights_in(learned / "best.pth"), of_epoch))
    assert all(map(torch.equal, weights_in(learned / "last.pth"), weights_in(learned / "epoch-002.pth")))


def test_a_run_continues_as_if_never_stopped(learned, tiny_run, tmp_path, monkeypatch) -> None:
    arguments = tiny_run(tmp_path, *OPTIONS, model="mmal")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_in_epoch(patch, 2)
        train.main(arguments)
    train.main(arguments)
    assert_same_run(learned, tmp_path / learned.name)


@pytest.mark.slow
def test_killed_runs_end_as_one_that_was_not(tiny_run, tmp_path) -> None:
    places = [str(tmp_path / name) for name in ("whole", "killed")]
    result = run_script("tests/killed_runs.py", "3", "5", *places, *tiny_run(tmp_path, *OPTIONS, model="mmal"))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "killed" in result.stdout
    assert_same_run(*(Path(place) / "folder-mmal" for place in places))


@pytest.mark.slow
def test_two_processes_learn_the_weights_of_one(tiny_run, tmp_path) -> None:
    """Of a network that hardly learns, and of the validation images of both processes."""
    options = (*LEARNED, "--dropout", "0", "--flip", "0", "--brightness", "0", "--contrast", "0")
    found = []
    for name, launch in (("one", run_script), ("two", run_two_processes)):
        arguments = tiny_run(tmp_path / name, *options, "--learning_rate", "0.0001", model="mmal")
        result = launch("tests/frozen_statistics.py", *arguments, thin=True)
        assert result.returncode == 0, result.stderr[-2000:]
        found.append(load_checkpoint(tmp_path / name / "folder-mmal" / "best.pth")["network"]["ensemble_weights"])
    assert not torch.equal(found[0], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-3)


def test_reports_predictions_and_exports_use_the_weights(learned, tmp_path, evaluation_script, capsys) -> None:
    """With made-up ones, which leave nothing but `object` of the prediction, six times as sure."""
    best = Path(shutil.copytree(learned, tmp_path / learned.name)) / "best.pth"
    saved = load_checkpoint(best)
    saved["ema"]["module.ensemble_weights"] = torch.tensor([0.0, 6.0])
    save_checkpoint(best, saved)
    evaluation_script.main([str(best), "--workers", "0"])
    assert "weighted sum of the log-probabilities of raw (0.00), object (6.00)" in capsys.readouterr().out
    report = json.loads((best.parent / "report.json").read_text(encoding="utf-8"))
    assert report["ensemble_weights"] == {"raw": 0.0, "object": 6.0}
    assert report["branches"]["prediction"]["top1"] == report["branches"]["object"]["top1"]
    assert "object (6.00)" in (best.parent / "report.html").read_text(encoding="utf-8")

    trained = load_trained(best, config.rebuilt)
    tested = read_catalogue("folder", trained.settings.data_root, test_fraction=0.25).test
    sample = Pictures(tested, **loading_of(trained.settings))[0]
    with torch.no_grad():
        output = trained.network(normalised(sample.image[None]))
    expected = (6 * output.logits["object"]).softmax(1)
    capsys.readouterr()
    predict.main([sample.path, "--checkpoint", str(best), "--no_drawings", "--json", "--workers", "0"])
    (line,) = capsys.readouterr().out.splitlines()
    found = [prediction["probability"] for prediction in json.loads(line)["predictions"]]
    assert found == pytest.approx(expected[0].sort(descending=True).values.tolist(), abs=1e-5)
    pipeline = export.Pipeline(trained.network, mask_background=trained.plan.mask_background).eval()
    graph = export.trace(pipeline, 96).module()
    torch.testing.assert_close(graph(sample.image[None])["probabilities"], expected, rtol=0, atol=1e-5)


# ---- Refusals -----------------------------------------------------------------------------------------------------


def test_test_images_learn_no_weights(tiny_run, tmp_path) -> None:
    words = tiny_run(tmp_path, *LEARNED, "--select_on", "test", model="mmal")
    with pytest.raises(SettingsError, match="ensembling is 'learned'; expected another one where select_on is 'test'"):
        parse_settings(words)


def test_weights_are_neither_made_up_nor_left_out(learned, tiny_run, tmp_path, evaluation_script) -> None:
    best = learned / "best.pth"
    with pytest.raises(CheckpointError, match="unrecognized arguments: .*settings of training are read from"):
        evaluation_script.main([str(best), "--prediction", "raw"])
    for others in ({"prediction": ("raw",)}, {"prediction": None}, {"ensembling": "mean_logits"}):
        with pytest.raises(
            CheckpointError, match="has learnt weights of 2 branches, and its ensembling and prediction"
        ):
            load_trained(best, config.rebuilt, **others)
    saved = load_checkpoint(best)
    del saved["network"]["ensemble_weights"], saved["ema"]
    save_checkpoint(tmp_path / "best.pth", saved)
    with pytest.raises(CheckpointError, match="has no learnt weights of branches, and .* ask for learnt weights of 2"):
        load_trained(tmp_path / "best.pth", config.rebuilt)
    save_checkpoint(tmp_path / "published.pth", {"state_dict": saved["network"]})
    words = ["--model", "mmal", "--dataset", "folder", "--data_root", saved["settings"]["data_root"]]
    with pytest.raises(CheckpointError, match="has no learnt weights of its branches, as no published checkpoint has"):
        evaluation_script.main([str(tmp_path / "published.pth"), *words, "--ensembling", "learned"])


def test_weights_of_another_run_do_not_start_a_new_one(learned, tiny_run, tmp_path, capsys) -> None:
    options = (*LEARNED, "--initial_weights", str(learned / "best.pth"), "--save_every_steps", "1")
    train.main(tiny_run(tmp_path, *options, model="mmal"))
    assert "new: ensemble_weights (1)" in capsys.readouterr().out
    within_first_epoch = load_checkpoint(tmp_path / "folder-mmal" / "previous.pth")
    assert within_first_epoch["progress"] is not None
    assert within_first_epoch["network"]["ensemble_weights"].tolist() == [0.5, 0.5]


def test_where_test_images_choose_a_system_that_learns_weights_does_without(tiny_run, tmp_path) -> None:
    assert parse_settings(tiny_run(tmp_path, model="sgkrl")).ensembling == "learned"
    assert parse_settings(tiny_run(tmp_path, "--select_on", "test", model="sgkrl")).ensembling == "mean_probability"
