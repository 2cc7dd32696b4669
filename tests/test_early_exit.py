"""Early exit: which images skip the windows, what is predicted for them, and the threshold that loses nothing."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import recorded_passes
from thin_trunk import THIN
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from whole_runs import read_log

import config
import predict
import train
from datasets import Pictures, choose_split, loading_of, read_catalogue
from networks import build_network
from networks.outputs import early_prediction, object_confidence
from utils.checkpoint import CheckpointError, load_checkpoint, load_run, save_checkpoint
from utils.data.image_batches import normalised
from utils.errors import UserError
from utils.options import SettingsError
from utils.reporting import panels
from utils.reporting.early_exit import (
    ExitCollector,
    ExitPoint,
    choose_threshold,
    costs_of_passes,
    curve_text,
    exit_curve,
)
from utils.training import exit_learning, kept_logits
from utils.training.building import build_to_train, load_trained
from utils.training.ensemble import EnsembleLearning

pytestmark = pytest.mark.usefixtures("thin_trunk")

SIZE, WINDOWS = 96, ((((6, 6),), 2),)


@pytest.fixture(scope="module", params=[None, ("object",), ("graph",), ("object", "graph")])
def network(request):
    torch.manual_seed(3)
    network = build_network(
        "sgkrl", num_classes=4, backbone="resnet18", input_size=SIZE, windows=WINDOWS, prediction=request.param
    ).eval()
    network.classifier.weight.data *= 3  # confidences that differ
    return network


def pictures(batch: int = 5) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * torch.arange(
        1, batch + 1
    ).view(-1, 1, 1, 1)


@torch.no_grad()
def run(network, images: Tensor, threshold: float, branches=None):
    network.exit_threshold = threshold
    try:
        with recorded_passes(network) as passes:
            output = network(images, branches=branches)
    finally:
        network.exit_threshold = 1.0
    return output, passes


def test_sure_images_skip_the_windows_and_the_others_are_untouched(network) -> None:
    images = pictures()
    full, _ = run(network, images, 1.0)
    confidence = object_confidence(full.logits)
    threshold = confidence.sort().values[2].item()  # as sure as the third: not surer
    output, passes = run(network, images, threshold)
    unsure = confidence <= threshold
    assert 0 < unsure.sum() < len(images)
    assert [len(images) for images in passes] == [5, 5, 2 * int(unsure.sum())]
    predicted, full_prediction = network.predict_logits(output), network.predict_logits(full)
    torch.testing.assert_close(predicted[unsure].softmax(1), full_prediction[unsure].softmax(1), rtol=1e-4, atol=1e-5)
    early = early_prediction(full.logits, network.prediction, network.ensembling, network.ensemble_weights)
    torch.testing.assert_close(predicted[~unsure].softmax(1), early[~unsure].softmax(1), rtol=1e-4, atol=1e-5)
    for name in ("raw", "fused", "object", "window", "graph"):
        assert output.logits[name].shape == full.logits[name].shape
        assert torch.isfinite(output.logits[name]).all()


@pytest.mark.parametrize("source", ["pixels", "stage3"])
def test_windows_of_unsure_images_alone_are_cut_out(source: str) -> None:
    """Of the right pictures, whatever they are cut from."""
    torch.manual_seed(3)
    options = {"num_classes": 4, "backbone": "resnet18", "input_size": SIZE, "windows": WINDOWS}
    network = build_network("sgkrl", window_source=source, **options).eval()
    network.classifier.weight.data *= 3
    images = pictures()
    full, _ = run(network, images, 1.0)
    confidence = object_confidence(full.logits)
    threshold = confidence.sort().values[2].item()
    output, passes = run(network, images, threshold)
    unsure = confidence <= threshold
    assert [len(seen) for seen in passes] == [5, 5, 2 * int(unsure.sum())]
    for name in ("window", "graph"):
        torch.testing.assert_close(output.logits[name][unsure], full.logits[name][unsure], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ensembling", ["mean_logits", "sum_logits"])
def test_images_that_exit_early_are_ensembled_alike(network, ensembling: str) -> None:
    network = copy.deepcopy(network)
    network.prediction = ("raw", "fused", "object", "graph")
    network.ensemble_by(ensembling)
    images = pictures(2)
    full, _ = run(network, images, 1.0)
    output, _ = run(network, images, 0.0)  # all exit
    early = sum(full.logits[name] for name in ("raw", "fused", "object")) / 3
    torch.testing.assert_close(output.logits["graph"], early)
    predicted = network.predict_logits(output)
    torch.testing.assert_close(predicted, 4 * early if ensembling == "sum_logits" else early)


def test_all_none_and_training(network) -> None:
    images = pictures()
    _, passes = run(network, images, 0.0)
    assert [len(images) for images in passes] == [5, 5]
    everything, passes = run(network, images, 0.99999999)
    full, _ = run(network, images, 1.0)
    torch.testing.assert_close(everything.logits["graph"], full.logits["graph"])
    _, passes = run(network, images, 0.0, branches=("object",))
    assert len(passes) == 2
    network.train()
    _, passes = run(network, images, 0.0)
    network.eval()
    assert [len(images) for images in passes] == [5, 5, 10]


def slow_curve(confidence, early, full, early_cost, rest_cost) -> dict[float, tuple]:
    """Every image's own confidence as the threshold, counted one by one."""
    found = {}
    for threshold in [0.0, *sorted(set(confidence.tolist()))]:
        exits = [c > threshold for c in confidence.tolist()]
        right = [bool(e if leaves else f) for leaves, e, f in zip(exits, early, full, strict=True)]
        costs = [early_cost + (0 if leaves else rest_cost) for leaves in exits]
        found[threshold] = (sum(exits) / len(exits), sum(right) / len(right), sum(costs) / len(costs))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_the_curve_equals_counting_image_by_image(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    confidence = (torch.rand(40, generator=generator) * 20).round() / 20 + 0.001  # some are equal
    early = torch.rand(40, generator=generator) < 0.6
    full = torch.rand(40, generator=generator) < 0.7
    curve = exit_curve(confidence, early, full, early_cost=2.0, rest_cost=1.75)
    slow = slow_curve(confidence.double(), early, full, 2.0, 1.75)
    none = max(slow)  # nobody is surer than the surest
    expected = {(1.0 if threshold == none else threshold): values for threshold, values in slow.items()}
    assert [point.threshold for point in curve] == pytest.approx(sorted(expected))
    for point, values in zip(curve, (expected[t] for t in sorted(expected)), strict=True):
        assert tuple(point[1:]) == pytest.approx(values)
    chosen = choose_threshold(curve)
    assert chosen.accuracy >= full.double().mean().item() - 1e-9
    assert all(point.cost >= chosen.cost for point in curve if point.accuracy >= curve[-1].accuracy)


def test_a_threshold_that_costs_a_right_prediction_is_not_chosen() -> None:
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.6])
    early = torch.tensor([True, True, False, False])
    full = torch.tensor([True, True, True, False])
    curve = exit_curve(confidence, early, full, early_cost=2, rest_cost=2)
    chosen = choose_threshold(curve)
    assert chosen == ExitPoint(pytest.approx(0.7), 0.5, 0.75, 3.0)
    assert "<- chosen" in curve_text(curve, chosen)
    with pytest.raises(ValueError, match="no image"):
        exit_curve(torch.empty(0), torch.empty(0), torch.empty(0), early_cost=1, rest_cost=1)


def test_a_threshold_as_printed_lets_as_many_exit() -> None:
    """The surest of trained networks differ in the eighth digit only."""
    confidence = 1 - torch.tensor([6e-8, 1.2e-7, 2.4e-7, 1e-6, 3e-6, 2e-5, 4e-5, 0.1, 0.10001, 0.26874])
    right = torch.ones(10, dtype=torch.bool)
    curve = exit_curve(confidence, right, right, early_cost=2, rest_cost=2)
    assert len(curve) == 11
    for line in curve_text(curve, curve[-1], rows=11).splitlines()[1:]:
        threshold, share, *_ = line.split()
        exits = confidence > float(threshold)  # as `look_where_unsure` compares them
        assert f"{exits.double().mean().item():.1%}" == share


def test_collected_batches_make_the_curve_of_all(network) -> None:
    images, labels = pictures(6), torch.tensor([0, 1, 2, 3, 0, 1])
    collector, whole = ExitCollector(network), ExitCollector(network)
    with torch.no_grad():
        for part in (slice(0, 4), slice(4, 6)):
            output = network(images[part])
            collector(SimpleNamespace(labels=labels[part]), output, network.predict_logits(output))
        output = network(images)
        whole(SimpleNamespace(labels=labels), output, network.predict_logits(output))
    for one, other in zip(collector.curve(), whole.curve(), strict=True):
        assert tuple(one) == pytest.approx(tuple(other), abs=1e-4)
    before, window = costs_of_passes(network)
    assert whole.curve()[-1].cost == pytest.approx(before + 2 * window)
    assert whole.curve()[0].cost == pytest.approx(before)


@torch.no_grad()
def counted(network: nn.Module, threshold: float) -> int:
    """Operations of the trunk in all passes over a picture."""
    with FlopCounterMode(display=False) as counter:
        run(network, pictures(1), threshold)
    return sum(counter.get_flop_counts()[f"{type(network).__name__}.backbone"].values())


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("sgkrl", {}),
        ("sgkrl", {"localization_stride": 32}),
        ("sgkrl", {"window_source": "stage3"}),
        ("sgkrl_published", {"prediction": ("raw", "graph")}),
    ],
)
def test_passes_cost_what_the_trunk_computes(model: str, options: dict) -> None:
    shared = {"num_classes": 4, "backbone": "resnet18", "input_size": SIZE, "windows": WINDOWS}
    network = build_network(model, **shared, **options).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.backbone(pictures(1))
    plain = counter.get_total_flops()
    before, window = costs_of_passes(network)
    assert before == counted(network, 0.0) / plain
    assert before + 2 * window == pytest.approx(counted(network, 1.0) / plain)
    assert all(parameter.device.type == "cpu" for parameter in network.parameters())
    assert (before == 2) == (network.localization_stride == 32)


def test_a_smaller_first_pass_costs_less() -> None:
    settings = {"num_classes": 4, "backbone": "resnet18", "input_size": 2 * SIZE, "localization_stride": 32}
    assert costs_of_passes(build_network("sgkrl", raw_size=SIZE, **settings)) == (1.25, 0.25)


@pytest.mark.parametrize("name", THIN)
def test_passes_of_every_family_are_counted(name: str) -> None:
    network = build_network("sgkrl", num_classes=4, backbone=name, input_size=SIZE, windows=WINDOWS)
    before, window = costs_of_passes(network)
    assert 2 <= before < 3 and 0.2 < window < 0.6  # one that is attended to in windows is padded


def test_a_threshold_is_of_the_weights_that_branches_end_with(monkeypatch) -> None:
    """They are learnt after the last batch; until then the logits wait in parts, here of one batch each."""
    torch.manual_seed(3)
    options = {"num_classes": 4, "backbone": "resnet18", "input_size": SIZE, "windows": WINDOWS}
    network = build_network("sgkrl", ensembling="learned", **options).eval()
    outputs, labels = [run(network, pictures(n), 1.0)[0] for n in (3, 4)], torch.tensor([0, 1, 2, 3, 0, 1, 2])
    monkeypatch.setattr(kept_logits, "PART", 1)
    ensemble = EnsembleLearning(network, also=("object",))
    exits, expected = exit_learning.ExitLearning(network, ensemble), ExitCollector(network)
    for output, part in zip(outputs, (labels[:3], labels[3:]), strict=True):
        ensemble.add(output, part)
        exits.add(output, part)
    network.ensemble_weights.copy_(torch.tensor([0.0, 0.0, 3.0, 0.1]))
    for output, part in zip(outputs, (labels[:3], labels[3:]), strict=True):
        expected.add(output.logits, part)
    seen = []
    monkeypatch.setattr(exit_learning, "safe_threshold", lambda *collected: seen.extend(collected) or 0.5)
    assert exits.finish() == {"exit_threshold": 0.5}
    assert len(seen[0]) == 7
    assert all(torch.equal(one, other) for one, other in zip(seen, expected.collected(), strict=True))


def test_several_processes_learn_one_threshold(network, monkeypatch) -> None:
    """Also where one had no image."""
    outputs, labels = [run(network, pictures(n), 1.0)[0] for n in (2, 3)], torch.tensor([0, 1, 2, 3, 0])
    none, both = ExitCollector(network), ExitCollector(network)
    with pytest.raises(UserError, match="there is no image"):
        none.curve()
    both.add(outputs[0].logits, labels[:2])
    both.add(outputs[1].logits, labels[2:])
    monkeypatch.setattr(exit_learning, "LOST_AT_MOST", 0.9)  # five images are enough then
    expected = exit_learning.safe_threshold(*both.collected())
    second = ExitCollector(network)
    second.add(outputs[1].logits, labels[2:])
    monkeypatch.setattr(exit_learning, "gather", lambda own: [none.collected(), own, second.collected()])
    learning = exit_learning.ExitLearning(network)
    learning.add(outputs[0], labels[:2])
    assert learning.finish() == {"exit_threshold": expected}


@pytest.mark.parametrize(
    ("model", "options", "skips"),
    [
        ("sgkrl", {}, True),
        ("sgkrl", {"prediction": ("graph",)}, True),
        ("sgkrl", {"prediction": ("raw", "object")}, False),
        ("sgkrl_published", {}, False),  # predicts by the object
        ("sgkrl_published", {"prediction": ("raw", "graph")}, True),
        ("sgkrl_published", {"prediction": ("graph",), "graph_scope": "batch"}, False),
        ("mmal", {}, False),
    ],
)
def test_a_threshold_is_learnt_where_a_prediction_can_do_without_windows(
    model: str, options: dict, skips: bool
) -> None:
    system = build_network(model, num_classes=4, backbone="resnet18", input_size=SIZE, windows=WINDOWS, **options)
    assert exit_learning.has_passes_to_skip(system) is skips


@pytest.mark.parametrize("images", [1, 298, 299, 472, 473, 800, 2000])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1])
def test_a_learnt_threshold_is_the_lowest_that_is_shown_to_be_safe(images: int, share: float) -> None:
    generator = torch.Generator().manual_seed(images)
    confidence = (100 * torch.rand(images, generator=generator)).round() / 100  # some are equal
    early, full = torch.rand(2, images, generator=generator) > torch.tensor([[share], [0.2]])
    safe = 1.0
    for threshold in [*sorted(confidence.unique().tolist(), reverse=True), 0.0]:
        lost = int(((confidence > threshold) & full & ~early).sum())
        chance = sum(math.comb(images, k) * 0.01**k * 0.99 ** (images - k) for k in range(lost + 1))
        if chance > 0.05:
            break
        safe = threshold
    learned = exit_learning.safe_threshold(confidence, early, full)
    assert ((confidence > learned) == (confidence > safe)).all()
    if images < 299 or not share:
        assert learned == (1 if images < 299 else 0)
    if images == 2000 and share == 0.01:
        assert 0 < learned < 1
    assert exit_learning.safe_threshold(torch.empty(0), early[:0], full[:0]) == 1


RUN = ("--warmup_epochs", "0", "--epochs", "2", "--keep_checkpoints", "2", "--ema_decay", "0.5")


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory) -> Path:
    """The folder of a run over two epochs with an average of the weights; six images choose. Tests only read it."""
    folder = tmp_path_factory.mktemp("exits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exit_learning, "LOST_AT_MOST", 0.5)
        train.main(tiny_run(folder, *RUN, model="sgkrl"))
    return folder / "folder-sgkrl"


@torch.no_grad()
def relearned(checkpoint: Path, weights: str) -> float:
    """The threshold that follows from a checkpoint's network and validation images."""
    loaded = load_trained(checkpoint, config.rebuilt, weights=weights)
    catalogue = read_catalogue("folder", loaded.settings.data_root, test_fraction=0.25)
    samples = list(Pictures(choose_split(loaded.settings, catalogue)[1], **loading_of(loaded.settings)))
    collector = ExitCollector(loaded.network)
    images = normalised(torch.stack([sample.image for sample in samples]))
    collector.add(loaded.network(images).logits, torch.tensor([sample.label for sample in samples]))
    return exit_learning.safe_threshold(*collector.collected())


@pytest.mark.parametrize(("epoch", "weights"), [(1, "ema"), pytest.param(2, "plain", marks=pytest.mark.slow)])
def test_every_checkpoint_holds_the_threshold_learnt_for_it(
    trained, evaluation_script, epoch, weights, tmp_path, monkeypatch
) -> None:
    checkpoint, group = trained / f"epoch-00{epoch}.pth", "validation_ema" if weights == "ema" else "validation"
    held = load_checkpoint(checkpoint)["exit_threshold"]
    assert held.keys() == {"plain", "ema"}
    assert held[weights] == read_log(trained)[epoch - 1][f"{group}/exit_threshold"]
    monkeypatch.setattr(exit_learning, "LOST_AT_MOST", 0.5)
    assert held[weights] == pytest.approx(relearned(checkpoint, weights), abs=1e-3)
    words = ["--exit_threshold", "learned", "--weights", weights, "--out", str(tmp_path), "--workers", "0"]
    evaluation_script.main([str(checkpoint), *words])
    (report,) = tmp_path.glob("*.json")
    settings = json.loads(report.read_text(encoding="utf-8"))["settings"]
    assert settings["options"]["exit_threshold"] == held[weights]


def test_in_training_no_image_exits(tiny_run, tmp_path) -> None:
    settings = config.parse_settings(tiny_run(tmp_path, "--exit_threshold", "0.5", model="sgkrl"))
    assert build_to_train(settings, 3, torch.device("cpu"), load_weights=True).exit_threshold == 1.0


def test_a_checkpoint_within_an_epoch_holds_no_threshold_of_other_weights(tiny_run, tmp_path) -> None:
    words = ("--warmup_epochs", "0", "--epochs", "2", "--save_every_steps", "2")
    train.main(tiny_run(tmp_path, *words, model="sgkrl"))
    within = load_checkpoint(tmp_path / "folder-sgkrl" / "previous.pth")
    assert (within["epoch"], within["progress"]["step"]) == (1, 2)
    assert "exit_threshold" not in within


def test_test_images_choose_no_threshold(tiny_run, tmp_path) -> None:
    train.main(tiny_run(tmp_path, "--warmup_epochs", "0", "--select_on", "test", model="sgkrl"))
    assert "exit_threshold" not in load_checkpoint(tmp_path / "folder-sgkrl" / "best.pth")
    assert "test/exit_threshold" not in read_log(tmp_path / "folder-sgkrl")[-1]


def names_of(arguments: list[str], monkeypatch, capsys) -> tuple[list[dict], list[int]]:
    """What predict.py says, and how many images each pass of its network saw."""
    seen: list[int] = []

    def load(*words, **options):
        loaded = load_trained(*words, **options)
        loaded.network.backbone.register_forward_pre_hook(lambda _, images: seen.append(len(images[0])))
        return loaded

    monkeypatch.setattr(predict, "load_trained", load)
    capsys.readouterr()
    predict.main([*arguments, "--json", "--workers", "0", "--device", "cpu"])
    return [json.loads(line)["predictions"] for line in capsys.readouterr().out.splitlines()], seen


def test_predict_py_lets_sure_pictures_exit(trained, picture_tree, tmp_path, monkeypatch, capsys) -> None:
    saved = load_checkpoint(trained / "best.pth")
    for name, value in (saved["network"] | saved["ema"]).items():
        if name.endswith("ensemble_weights"):
            value.fill_(0.25)  # so that what exiting leaves out counts
    tree, checkpoint = str(picture_tree / "red"), tmp_path / "best.pth"
    given = ["--checkpoint", str(checkpoint), tree, "--out", str(tmp_path / "out")]
    save_checkpoint(checkpoint, saved | {"exit_threshold": {"plain": 1.0, "ema": 1.0}})
    everything, passes = names_of([*given, "--no_drawings"], monkeypatch, capsys)
    assert passes[:2] == [8, 8] and passes[2] % 8 == 0 and len(passes) == 3
    save_checkpoint(checkpoint, saved | {"exit_threshold": {"plain": 1.0, "ema": 0.0}})
    early, passes = names_of([*given, "--no_drawings"], monkeypatch, capsys)
    assert passes == [8, 8]
    assert early != everything
    drawn, passes = names_of(given, monkeypatch, capsys)
    assert passes == [8, 8]
    assert [[p["name"] for p in names] for names in drawn] == [[p["name"] for p in names] for names in early]
    for asked in (["--exit_threshold", "1"], ["--weights", "plain", "--exit_threshold", "learned"]):
        _, passes = names_of([*given, "--no_drawings", *asked], monkeypatch, capsys)
        assert len(passes) == 3
    assert names_of([*given, "--no_drawings", "--exit_threshold", "1"], monkeypatch, capsys)[0] == everything
    save_checkpoint(checkpoint, {name: value for name, value in saved.items() if name != "exit_threshold"})
    assert names_of([*given, "--no_drawings"], monkeypatch, capsys)[0] == everything  # an older run


def test_windows_are_drawn_of_pictures_that_did_not_exit(network, monkeypatch) -> None:
    monkeypatch.setattr(panels, "prediction_panel", lambda *_, **found: found)
    images = pictures(2)
    confidence = object_confidence(run(network, images, 1.0)[0].logits)
    for threshold, drawn in ((1.0, [True, True]), (confidence.min().item(), (confidence == confidence.min()).tolist())):
        output, _ = run(network, images, threshold)
        found = [panels.image_panel(None, output, index, [], []) for index in range(2)]
        assert ["window_boxes" in one for one in found] == drawn
        assert all("object_box" in one for one in found)
    monkeypatch.setattr(panels, "localization_panel", lambda *_, **found: found)
    uint8 = (255 * torch.rand(2, 3, SIZE, SIZE)).byte()
    found = panels.output_panel(uint8, output, output.logits["object"], input_size=SIZE, class_names="abcd")
    assert [boxes is not None for boxes in found["window_boxes"]] == drawn


@pytest.mark.parametrize("asked", ["2", "0.5", "soon"])
def test_predict_py_refuses_what_is_no_threshold_here(tiny_run, trained, picture_tree, tmp_path, asked) -> None:
    if asked == "0.5":
        train.main(tiny_run(tmp_path))
    checkpoint = tmp_path / "folder-resnet" / "best.pth" if asked == "0.5" else trained / "best.pth"
    with pytest.raises(SettingsError, match="'soon'; expected a prob" if asked == "soon" else "exit_threshold is"):
        predict.main(["--checkpoint", str(checkpoint), str(picture_tree), "--exit_threshold", asked])


def test_a_threshold_that_is_none_is_a_damaged_checkpoint(trained, tmp_path) -> None:
    content = load_checkpoint(trained / "best.pth")
    for wrong in (0.5, {"plain": 1.5}, {"other": 0.5}, {"plain": "high"}):
        save_checkpoint(tmp_path / "best.pth", content | {"exit_threshold": wrong})
        with pytest.raises(CheckpointError, match="its exit_threshold is not probabilities"):
            load_run(tmp_path / "best.pth")


def test_test_py_says_where_no_threshold_was_learnt(tiny_run, tmp_path, evaluation_script) -> None:
    train.main(tiny_run(tmp_path))
    with pytest.raises(SettingsError, match="best.pth holds none.*--exit_curve"):
        evaluation_script.main([str(tmp_path / "folder-resnet" / "best.pth"), "--exit_threshold", "learned"])


def test_test_py_prints_the_curve_and_uses_the_threshold(tiny_run, tmp_path, evaluation_script, capsys) -> None:
    train.main(tiny_run(tmp_path, "--warmup_epochs", "0", model="sgkrl"))
    best = tmp_path / "folder-sgkrl" / "best.pth"
    evaluation_script.main([str(best), "--exit_curve", "--workers", "0"])
    printed = capsys.readouterr().out
    assert "passes per image" in printed and "6 validation images" in printed
    (chosen,) = (float(line.split()[0]) for line in printed.splitlines() if line.endswith("<- chosen"))
    report = json.loads((best.parent / "report-exit_curve.json").read_text(encoding="utf-8"))
    assert torch.tensor(report["settings"]["options"]["exit_threshold"]) == torch.tensor(chosen)  # to float32's digits
    evaluation_script.main([str(best), "--exit_threshold", "0", "--workers", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("object") for line in lines)
    assert not any(line.startswith(("window", "graph")) for line in lines)  # they would repeat the others' predictions
    assert (best.parent / "report-exit_0.0.json").exists() and not (best.parent / "report.json").exists()


def test_the_curve_is_of_one_view(trained, evaluation_script) -> None:
    with pytest.raises(SettingsError, match="--exit_curve measures pictures that are looked at once"):
        evaluation_script.main([str(trained / "best.pth"), "--exit_curve", "--views", "mirror"])


def test_test_py_refuses_what_cannot_exit(tiny_run, tmp_path, evaluation_script) -> None:
    train.main(tiny_run(tmp_path))
    with pytest.raises(ValueError, match="exit_threshold.*sgkrl"):
        evaluation_script.main([str(tmp_path / "folder-resnet" / "best.pth"), "--exit_curve"])
