"""A localization that is taught by boxes found once: what it is taught, that it learns, and what then finds objects."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import system_checks
import torch
from small_systems import LABELS, SIZE, Variant, make_images, run
from thin_trunk import get_thin_model
from whole_runs import assert_same_run, interrupt_in_epoch

import test
import train
from config import parse_settings, rebuilt
from datasets import choose_split, evaluation_loader, load_catalogue, training_loader
from networks.colocalization import Colocalization, check_colocalization
from networks.learned_localization import LearnedLocalization, edges_within_cells, share_in_box
from networks.localization import adaptive_mask, cell_boxes_to_pixels
from networks.outputs import NetworkOutput
from networks.shared import Shared
from networks.system import System
from utils.checkpoint import load_checkpoint
from utils.options import SettingsError
from utils.training.building import build_from_settings
from utils.training.execution import Execution
from utils.training.found_boxes import find_boxes
from utils.training.schedule import plan_epoch

BOXES = torch.tensor([[10.0, 20, 100, 90], [0, 0, 60, 127], [31, 32, 32, 95], [64, 5, 127, 127]])
MODELS = ("mmal", "flrdf", "sgkrl")
pytestmark = pytest.mark.usefixtures("thin_trunk")


@functools.cache
def built(model: str = "sgkrl", **settings: object) -> System:
    return Variant(model, pretrained=None, localization="learned", **settings).build()


def fresh(model: str = "sgkrl", **settings: object) -> System:
    return copy.deepcopy(built(model, **settings))


# ---- What it is taught ----------------------------------------------------------------------------------------------


def test_the_share_of_a_cell_is_that_of_its_pixels_in_the_box() -> None:
    shares = share_in_box(BOXES, (8, 8), 16)
    for found, (x0, y0, x1, y1) in zip(shares, BOXES.int().tolist(), strict=True):
        pixels = np.zeros((128, 128))
        pixels[y0 : y1 + 1, x0 : x1 + 1] = 1
        expected = pixels.reshape(8, 16, 8, 16).mean(axis=(1, 3))
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_boxes_may_lie_between_pixels_and_reach_beyond_the_map() -> None:
    box = torch.tensor([[-20.0, 3.5, 7.25, 200]])  # from x -20 to 8.25, from y 3.5 on
    expected = torch.tensor([[8.25 / 16 * 12.5 / 16, 0.0], [8.25 / 16, 0.0]])
    torch.testing.assert_close(share_in_box(box, (2, 2), 16)[0], expected)


def test_the_loss_is_the_cross_entropy_of_cells_and_least_at_their_shares() -> None:
    learned = LearnedLocalization(4, stride=16)
    logits = torch.randn(len(BOXES), 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    shares, inside = share_in_box(BOXES, (8, 8), 16), logits.sigmoid()
    loss = learned.loss(logits, BOXES)
    expected = -(shares * inside.log() + (1 - shares) * (1 - inside).log()).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, (inside - shares) / logits.numel(), rtol=1e-5, atol=1e-9)


def test_it_learns_to_find_what_it_was_shown() -> None:
    """Cells of the object have something in common, whatever else they are and however large."""
    torch.manual_seed(0)
    learned, common = LearnedLocalization(16, stride=16), torch.randn(16)

    def pictures(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        corners = torch.randint(0, 4, (8, 2), generator=generator)
        cells = torch.cat([corners, corners + torch.randint(2, 5, (8, 2), generator=generator)], dim=1)
        inside = share_in_box(cells * torch.tensor([16, 16, 16, 16]) - torch.tensor([0, 0, 1, 1]), (8, 8), 16)
        noise = torch.randn(8, 16, 8, 8, generator=generator)
        scale = 10 ** (2 * torch.rand(8, 1, 1, 1, generator=generator))
        return scale * (noise + 3 * common[:, None, None] * inside[:, None]), cells

    optimizer = torch.optim.Adam(learned.parameters(), lr=0.05)
    for step in range(60):
        features, cells = pictures(step)
        optimizer.zero_grad()
        learned.loss(learned(features), cell_boxes_to_pixels(cells, 16)).backward()
        optimizer.step()
    features, cells = pictures(1000)
    found, localization = learned.localize(learned(features))
    assert torch.equal(localization.boxes, cells)
    edges = 16 * cells.float() - torch.tensor([0.0, 0, 1, 1])
    torch.testing.assert_close(found, edges, rtol=0, atol=4.0)


@pytest.mark.parametrize("seed", range(4))
def test_edges_lie_within_the_outermost_cells_where_shares_say(seed: int) -> None:
    """Of a box's own shares they are the box's; of others, what the sums written out cell by cell are."""
    generator = torch.Generator().manual_seed(seed)
    starts = 100 * torch.rand(6, 2, generator=generator)
    boxes = torch.cat([starts, starts + 40 + 80 * torch.rand(6, 2, generator=generator)], dim=1).clamp(max=223)
    shares = share_in_box(boxes, (14, 14), 16)
    whole = torch.cat([boxes[:, :2] / 16, (boxes[:, 2:] + 1) / 16], dim=1)
    around = torch.cat([whole[:, :2].floor(), whole[:, 2:].ceil()], dim=1).long()
    torch.testing.assert_close(edges_within_cells(shares, around), whole, rtol=0, atol=1e-4)

    shares = torch.rand(6, 14, 14, generator=generator)
    for found, one, (x0, y0, x1, y1) in zip(
        edges_within_cells(shares, around).tolist(), shares.numpy(), around.tolist(), strict=True
    ):
        expected = []
        for line, start, end in ((one[y0:y1].max(axis=0), x0, x1), (one[:, x0:x1].max(axis=1), y0, y1)):
            line = line[start:end] / line[start:end].max()
            middle = (start + end) // 2
            expected.append((middle - line[: middle - start].sum(), middle + line[middle - start :].sum()))
        assert found == pytest.approx([*(pair[0] for pair in expected), *(pair[1] for pair in expected)], abs=1e-4)


def test_where_no_cell_is_the_objects_the_whole_picture_is_looked_at() -> None:
    logits = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    logits -= torch.tensor([9.0, 99, 999])[:, None, None]
    found, localization = LearnedLocalization(4, stride=16).localize(logits)
    assert not localization.cells.any()
    assert found.tolist() == [[0, 0, 127, 127]] * 3


def test_a_cell_is_the_objects_where_that_is_likelier_than_not() -> None:
    logits = torch.full((1, 6, 6), -0.1)
    logits[0, 2:4, 1:5] = 0.1
    _, localization = LearnedLocalization(4, stride=16).localize(logits)
    assert torch.equal(localization.cells, logits > 0)


# ---- In a system ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_training_looks_at_the_boxes_that_teach(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = fresh(model).train(), make_images(SIZE, 4)
    monkeypatch.setattr(network.learned_localization, "localize", None)  # it does not look for others besides
    network.dropout.p = 0.0
    output, given = run(network, images, boxes=BOXES)
    assert torch.equal(output.object_boxes, BOXES)
    assert output.object_masks is None
    other = run(network, images, boxes=BOXES.flip(0))[1]
    assert torch.equal(given[0], other[0])
    assert not torch.allclose(given[1], other[1])
    terms = network.losses(output, LABELS)
    expected = network.learned_localization.loss(output.extras["inside"], BOXES)
    assert torch.equal(terms["localization"], expected)
    assert terms.keys() == network.loss_weights.keys()


@pytest.mark.parametrize("model", MODELS)
def test_evaluation_finds_objects_by_what_was_learnt(model: str) -> None:
    network, images = fresh(model).eval(), make_images(SIZE, 4)
    with torch.no_grad():
        output = network(images)
        assert torch.equal(network(images, boxes=BOXES).object_boxes, output.object_boxes)
        assert output.extras is None
        network.learned_localization.inside.bias.fill_(100.0)
        torch.testing.assert_close(network(images).object_boxes, torch.tensor([[0.0, 0, 127, 127]] * 4))
        alone = torch.cat([network.predict_logits(network(image)) for image in images.split(1)])
        torch.testing.assert_close(network.predict_logits(network(images)), alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "settings"),
    [*((model, {}) for model in MODELS), ("sgkrl", {"without": ("fusion",)})],
    ids=[*MODELS, "without-fusion"],
)
def test_the_first_epochs_teach_it_by_the_pass_over_the_picture_alone(model: str, settings: dict) -> None:
    network, images = fresh(model, **settings).train(), make_images(SIZE, 4)
    plan = plan_epoch(network, 1, network.loss_weights, warmup_epochs=1)
    assert plan.branches == ("raw",)
    output, given = run(network, images, branches=plan.branches, boxes=BOXES)
    assert len(given) == 1
    terms = network.losses(output, LABELS)
    assert terms.keys() >= {"raw", "localization"}
    terms["localization"].backward()
    taught = [network.learned_localization.inside.weight, network.backbone.trunk.conv1.weight]
    taught += [network.fusion.stage3.out.weight] if model == "sgkrl" and not settings else []
    assert all(parameter.grad.abs().max() > 0 for parameter in taught)


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_gets_a_gradient(model: str) -> None:
    network = fresh(model).train()
    output = network(make_images(SIZE, 4), boxes=BOXES)
    sum(network.losses(output, LABELS).values()).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
    heads = {id(parameter) for parameter in network.parameter_groups()["heads"]}
    assert heads >= {id(parameter) for parameter in network.learned_localization.parameters()}


def test_where_the_background_is_masked_boxes_and_masks_are_its_own() -> None:
    network, images = fresh().train(), make_images(SIZE, 4)
    network.dropout.p = 0.0
    output = network(images, boxes=BOXES, mask_background=True)
    own, localization = network.learned_localization.localize(output.extras["inside"])
    assert torch.equal(output.object_boxes, own)
    assert torch.equal(output.object_masks, adaptive_mask(localization))
    assert torch.equal(output.extras["boxes"], BOXES)  # the loss is of the boxes that teach all the same


def test_the_teacher_is_a_frozen_copy_that_is_no_part_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("networks.colocalization.SMALLEST_SIDE", 192)
    network, batches = fresh(), [(make_images(SIZE, 4, seed), LABELS) for seed in (1, 2)]
    state = copy.deepcopy(network.state_dict())
    network.train().prepare(iter(batches))
    expected = Colocalization(network.backbone, SIZE)
    expected.fit(images for images, _ in batches)
    found = network.find_objects(batches[0][0])
    (teacher,) = network.learned_localization.teacher
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(found, expected.boxes(batches[0][0]))
    assert len(found.unique(dim=0)) > 1
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert network.training
    network.objects_are_found()
    assert network.learned_localization.teacher == ()


@pytest.mark.parametrize("check", [system_checks.host_waits_nowhere, system_checks.output_keeps_the_contract])
@pytest.mark.parametrize("model", MODELS)
def test_evaluation_is_as_that_of_every_system(model: str, check: Callable[[Variant], None]) -> None:
    check(Variant(model, pretrained=None, localization="learned"))


@pytest.mark.slow
def test_it_can_be_compiled() -> None:
    system_checks.forward_traces_without_graph_break(fresh("mmal"), make_images(SIZE))


def test_half_precision_teaches_it_too() -> None:
    network = fresh().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(make_images(SIZE, 4), branches=("raw",), boxes=BOXES)
    term = network.losses(output, LABELS)["localization"]
    term.backward()
    assert term.dtype == torch.float32
    assert network.learned_localization.inside.weight.grad.abs().max() > 0


def test_settings_that_have_nothing_to_go_by_are_refused() -> None:
    for model in MODELS:
        with pytest.raises(SettingsError, match="localization is 'learned'; expected another one where pretrained"):
            Variant(model, localization="learned").build()
    without_its_loss = Shared(pretrained="DEFAULT", loss_weights={"localization": 0.0})
    with pytest.raises(SettingsError, match="loss_weights is .* nothing else teaches it"):
        check_colocalization("learned", 32, without_its_loss)
    with pytest.raises(SettingsError, match="crop_gradient"):
        built("sgkrl", crop_gradient=True)
    with pytest.raises(SettingsError, match="box_agreement"):
        built("flrdf", box_agreement=True)


@pytest.mark.parametrize("localization", ["learned", "colocalization"])
@pytest.mark.parametrize(("model", "own", "other"), [("sgkrl", "1.2", "1.0"), ("mmal", "1.0", "1.2")])
def test_a_threshold_that_nothing_would_look_at_is_refused(localization: str, model: str, own: str, other: str) -> None:
    flags = ["--dataset", "cub", "--data_root", "somewhere", "--model", model, "--localization", localization]
    for accepted in ([], ["--localization_threshold", own]):
        assert parse_settings([*flags, *accepted]).options["localization_threshold"] == float(own)
    with pytest.raises(SettingsError, match=f"localization_threshold is {other}; expected {own} where localization"):
        parse_settings([*flags, "--localization_threshold", other])


# ---- Runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_that_learns(tiny_run, tmp_path_factory):
    """A function: the command line of such a run whose trunk has weights that may be called pretrained."""
    torch.manual_seed(3)
    weights = tmp_path_factory.mktemp("weights") / "thin.pth"
    torch.save(get_thin_model("resnet18", weights=None).state_dict(), weights)

    def arguments(folder: Path, *more: str) -> list[str]:
        run = [*tiny_run(folder, model="sgkrl"), "--pretrained", str(weights), "--localization", "learned"]
        return [*run, "--epochs", "2", "--schedule", "one_cycle", *more]

    return arguments


@pytest.mark.slow
def test_a_run_finds_boxes_once_learns_from_them_and_goes_on_bit_for_bit(
    run_that_learns, tmp_path, monkeypatch, capsys
) -> None:
    looked_at: list[int] = []
    forward = Colocalization.forward

    def counted(self, images: torch.Tensor) -> NetworkOutput:
        looked_at.append(len(images))
        return forward(self, images)

    monkeypatch.setattr("networks.colocalization.SMALLEST_SIDE", 192)
    monkeypatch.setattr(Colocalization, "forward", counted)
    train.main(run_that_learns(tmp_path / "whole"))
    assert sum(looked_at) == 12  # those to select by are not
    assert "finding the objects in 12 pictures" in capsys.readouterr().out
    folder = tmp_path / "whole" / "folder-sgkrl"
    saved = load_checkpoint(folder / "last.pth")
    assert saved["found_boxes"].keys() == {"training"}
    settings = rebuilt(saved["settings"])
    untrained = build_from_settings(settings, 3, load_weights=True)
    training, _, _ = choose_split(settings, load_catalogue(settings)[0])
    execution = Execution(torch.device("cpu"))
    untrained.prepare(execution.batches(training_loader(settings, training)))
    whole = dataclasses.replace(settings, image_size=settings.resize_size)
    expected = find_boxes(untrained, evaluation_loader(whole, training), execution, len(training))
    assert torch.equal(saved["found_boxes"]["training"], expected)

    arguments = run_that_learns(tmp_path / "parts")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_in_epoch(patch, 2)
        train.main(arguments)
    looked_at.clear()
    train.main(arguments)
    assert looked_at == []
    assert_same_run(folder, tmp_path / "parts" / "folder-sgkrl")
    test.main([str(folder / "best.pth")])
    assert looked_at == []
