"""SG-KRL, every part trained: its passes, its parts with and without each other, and the method step by step."""

from __future__ import annotations

import object_checks
import pytest
import reference
import system_checks
import torch
import torch.nn.functional as F
from cases import slow_but_for
from object_checks import enlarged
from small_systems import CLASSES, SIZE, Variant, flat, learners, make_images, run
from torch import Tensor, nn

from networks.batch_norm import BatchNormPerPass
from networks.system import System
from networks.systems.sgkrl import SGKRL

pytestmark = pytest.mark.usefixtures("thin_trunk")

OWN_WINDOWS = ((((5, 7), (7, 5)), 2), (((9, 9),), 1))
ONE_WINDOW = ((((14, 14),), 1),)
DEFAULT = Variant("sgkrl")
VARIANTS = {
    "other choices": Variant(
        "sgkrl",
        graph_residual=False,
        spatial_weights="absolute",
        localization_stride=16,
        localization_threshold=1.2,
        crop_gradient=True,
        batch_norm="per_pass",
        graph_neighbours=2,
        graph_edges="overlap",
    ),
    "on pretrained weights": Variant("sgkrl", pretrained=None),
    "without fusion": Variant("sgkrl", without=("fusion",)),
    "without weighting": Variant("sgkrl", without=("weighting",)),
    "without parts": Variant("sgkrl", without=("fusion", "weighting")),
    "windows of cells": Variant("sgkrl", window_source="stage3"),
}
ALL = {"default": DEFAULT, **VARIANTS}
OF_PIXELS = [name for name in ALL if name != "windows of cells"]


@pytest.mark.parametrize("check", system_checks.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", slow_but_for(("other choices", "without fusion", "windows of cells"), VARIANTS))
def test_variant(variant: str, check: system_checks.Check) -> None:
    check(VARIANTS[variant])


# ---- branches and passes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ALL)
def test_branches(variant: str) -> None:
    network = ALL[variant].evaluated
    fused = () if variant in ("without fusion", "without parts") else ("fused",)
    assert isinstance(network, SGKRL)
    assert network.branches == network.evaluated == ("raw", *fused, "object", "window", "graph")
    assert network.prediction == ("raw", *fused, "object", "graph")
    assert network.loss_weights == dict.fromkeys(network.branches, 1.0)
    assert network.heads() == [network.classifier, network.graph]
    assert all(parameter.requires_grad for parameter in network.parameters())
    parts = {name.partition(".")[0] for name, _ in network.named_parameters()}
    left_out = set(ALL[variant].settings.get("without", ()))
    assert parts == {"backbone", "classifier", "graph", "fusion", "weighting"} - left_out


@pytest.mark.parametrize(
    ("pretrained", "input_size", "expected"),
    (("none", 128, (32, 1.0, "shared")), (None, 128, (16, 1.2, "frozen")), (None, 448, (32, 1.2, "frozen"))),
    ids=str,
)
def test_defaults_on_random_and_on_pretrained_weights(pretrained, input_size: int, expected: tuple) -> None:
    with torch.device("meta"):
        network = Variant("sgkrl", pretrained=pretrained).build(input_size=input_size)
    found = network.localization_stride, network.localization_threshold, network.backbone.batch_norm
    assert found == expected


def test_other_choices_reach_the_parts() -> None:
    network = VARIANTS["other choices"].evaluated
    assert (network.localization_stride, network.localization_threshold) == (16, 1.2)
    assert (network.graph.neighbours, network.graph.edges) == (2, "overlap")
    assert network.crop_gradient and not network.graph_residual
    assert any(isinstance(module, BatchNormPerPass) for module in network.backbone.modules())


@pytest.mark.parametrize("variant", ALL)
@torch.no_grad()
def test_output(variant: str) -> None:
    network = ALL[variant].evaluated
    for images in (make_images(), make_images(2 * SIZE)):
        output, given = run(network, images)
        assert tuple(output.logits) == network.branches
        assert output.logits["window"].shape == (2, 7, CLASSES)
        others = ["object_boxes", "window_boxes", "object_masks"]
        assert list(flat(output)) == [*(f"logits.{name}" for name in network.branches), *others]
        cells = (2 * 7, network.backbone.channels["stage3"], SIZE // 32, SIZE // 32)
        half = cells if variant == "windows of cells" else (2 * 7, 3, SIZE // 2, SIZE // 2)
        assert [tuple(x.shape) for x in given] == [(2, 3, SIZE, SIZE), (2, 3, SIZE, SIZE), half]


@pytest.mark.parametrize("variant", ALL)
@torch.no_grad()
def test_passes_of_a_branch(variant: str) -> None:
    network = ALL[variant].evaluated
    passes = {"raw": 1, "fused": 1, "object": 2, "window": 3, "graph": 3}
    for branch in network.branches:
        _, given = run(network, make_images(), branches=(branch,))
        assert len(given) == passes[branch], branch


@torch.no_grad()
def test_images_of_these_tests_tell_something() -> None:
    """Boxes that cut something away, differ among images, and masks with holes: else much below would prove nothing."""
    output = DEFAULT.evaluated(make_images(batch=8))
    areas = (output.object_boxes[:, 2:] - output.object_boxes[:, :2] + 1).prod(dim=1) / SIZE**2
    assert (areas < 0.8).sum() >= 3
    assert len(output.object_boxes.unique(dim=0)) >= 3
    assert len(output.window_boxes.flatten(1).unique(dim=0)) >= 3


@pytest.mark.parametrize(
    ("size", "windows"), ((96, "vehicles"), (160, ONE_WINDOW), (224, OWN_WINDOWS), (448, "birds")), ids=str
)
def test_contract_with_other_windows(size: int, windows: str | tuple) -> None:
    system_checks.output_keeps_the_contract_at_other_input_sizes(Variant("sgkrl", windows=windows), (size,))


@torch.no_grad()
def test_before_it_is_learnt_the_prediction_is_the_mean_log_probability_in_float32() -> None:
    network = DEFAULT.evaluated
    output = network(make_images())
    mean = torch.stack([output.logits[name].log_softmax(-1) for name in network.prediction]).mean(dim=0)
    torch.testing.assert_close(network.predict_logits(output), mean)
    low = output._replace(logits={name: logits.bfloat16() for name, logits in output.logits.items()})
    assert network.predict_logits(low).dtype == torch.float32


def test_background_is_masked_from_an_epoch_on() -> None:
    network = Variant("sgkrl", mask_from_epoch=3).build_scripted()
    assert [network.masks_background(epoch) for epoch in (1, 2, 3, 4)] == [False, False, True, True]
    assert [DEFAULT.evaluated.masks_background(epoch) for epoch in (45, 46)] == [False, True]


# ---- objects ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ALL)
@torch.no_grad()
def test_objects_of_larger_images_are_cut_out_of_these(variant: str) -> None:
    network, images = ALL[variant].evaluated, make_images(2 * SIZE)
    from_large = network(images)
    from_small = network(F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True))
    assert torch.equal(from_large.object_boxes, from_small.object_boxes)
    assert not torch.allclose(from_large.logits["object"], from_small.logits["object"], atol=1e-5)


@pytest.mark.parametrize("variant", OF_PIXELS)
def test_crops_of_larger_images_have_more_detail(variant: str) -> None:
    object_checks.crops_of_larger_images_have_more_detail(ALL[variant])


@pytest.mark.parametrize("factor", (1, 2))
def test_background_is_blanked_outside_the_mask(factor: int) -> None:
    object_checks.background_is_blanked_outside_the_mask(DEFAULT, factor)


@pytest.mark.parametrize("maps", object_checks.ODD_MAPS)
@pytest.mark.parametrize("variant", slow_but_for(("default", "other choices"), ALL))
def test_maps_without_an_object_give_the_whole_image(variant: str, maps: str) -> None:
    object_checks.maps_without_an_object_give_the_whole_image(ALL[variant], maps)


# ---- learning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ALL)
def test_who_learns_from_a_branch(variant: str) -> None:
    """Nothing flows through boxes, masks and windows, but where it is asked for; all branches reach the trunk."""
    found = learners(ALL[variant].build_scripted(dropout=0.0), make_images())
    through_the_crop = {"fusion"} if variant == "other choices" else set()
    expected = {
        "raw": {"backbone", "classifier"},
        "fused": {"backbone", "classifier", "fusion"},
        "object": {"backbone", "classifier", "weighting"} | through_the_crop,
        "window": {"backbone", "classifier"} | through_the_crop,
        "graph": {"backbone", "graph"} | through_the_crop,
    }
    if variant != "other choices":  # the graph is added to what the windows are classified as
        expected["graph"].add("classifier")
    left_out = set(ALL[variant].settings.get("without", ()))
    assert found == {branch: expected[branch] - left_out for branch in ALL[variant].evaluated.branches}


@pytest.mark.parametrize("variant", [name for name in OF_PIXELS if name != "other choices"])
def test_no_gradient_flows_through_the_crops(variant: str) -> None:
    object_checks.no_gradient_flows_through_the_crops(ALL[variant])


def test_crop_gradient_changes_nothing_but_the_gradient() -> None:
    """With it, the object's loss reaches the fusion, which only the box connects to it."""
    found = {}
    for crop_gradient in (False, True):
        network = DEFAULT.build_scripted(crop_gradient=crop_gradient)
        with torch.no_grad():  # so that boxes cut something away
            network.fusion.stage3.out.weight.normal_(std=0.01)
        output = network(make_images())
        output.logits["object"].logsumexp(dim=1).sum().backward()
        found[crop_gradient] = output, [attention.out.weight.grad for attention in network.fusion.children()]
    for without, with_it in zip(found[False][0].logits.values(), found[True][0].logits.values(), strict=True):
        assert torch.equal(without, with_it)
    assert torch.equal(found[False][0].object_boxes, found[True][0].object_boxes)
    assert not any(gradient is not None and gradient.any() for gradient in found[False][1])
    assert all(gradient is not None and gradient.any() for gradient in found[True][1])
    assert not found[True][0].object_boxes.requires_grad


@pytest.mark.parametrize("variant", ALL)
def test_dropout_acts_on_every_branch(variant: str) -> None:
    system_checks.dropout_acts_on_every_branch(ALL[variant])


def test_mixed_precision_on_a_real_trunk() -> None:
    system_checks.mixed_precision_keeps_logits_and_losses_in_float32(DEFAULT, scripted=False)


# ---- step by step -------------------------------------------------------------------------------------------------


def step_by_step(network: System, image: Tensor) -> dict[str, Tensor]:
    """What the system makes of one `[3, S, S]` image with the mask, from its parts and slow references."""
    factor = image.shape[-1] // SIZE
    small = F.interpolate(image[None], size=(SIZE, SIZE), mode="bilinear", antialias=True)
    features = network.backbone(small)
    fused = network.fusion(features)
    cells, cell_box = reference.localize(
        *(reference.mask_above_mean(maps[0].sum(dim=0).numpy()) for maps in (fused, features.penultimate))
    )
    box = reference.cell_box_to_pixels(cell_box, 32)
    mask = torch.from_numpy(reference.adaptive_mask(cells, cell_box))
    kept = mask.repeat_interleave(32 * factor, dim=0).repeat_interleave(32 * factor, dim=1)

    crop = reference.crop_and_resize(image * kept, enlarged(box, factor), factor * SIZE)
    seen = F.interpolate(crop[None], size=(SIZE, SIZE), mode="bilinear", antialias=True) if factor > 1 else crop[None]
    weighted = network.weighting(network.backbone(seen).final)
    windows = reference.select_windows(weighted[0], reference.scale_window_set(reference.BIRDS, SIZE // 32), 32)
    nodes = torch.cat(
        [
            network.backbone(reference.crop_and_resize(crop, enlarged(window, factor), SIZE // 2)[None]).embedding
            for window in windows
        ]
    )
    edges = reference.neighbour_edges(windows[:, :2], 3)
    edges = sorted({*edges, *((target, source) for source, target in edges)})
    hidden = nodes
    for convolution in network.graph.convolutions:
        hidden = reference.graph_convolution(hidden, edges, convolution.lin.weight, convolution.bias).relu()
    _, cells_without_fusion = reference.localize(
        *(reference.mask_above_mean(maps[0].sum(dim=0).numpy()) for maps in (features.final, features.penultimate))
    )
    return {
        "raw": network.classifier(features.embedding)[0],
        "fused": network.classifier(fused.mean(dim=(2, 3)))[0],
        "object": network.classifier(weighted.mean(dim=(2, 3)))[0],
        "window": network.classifier(nodes),
        "graph": network.graph.classifier(hidden.mean(dim=0)) + network.classifier(nodes).mean(dim=0),
        "object_boxes": torch.tensor(box).float(),
        "window_boxes": torch.from_numpy(windows).float(),
        "object_masks": mask,
        "cells": torch.tensor(cell_box),
        "cells_without_fusion": torch.tensor(cells_without_fusion),
    }


@pytest.mark.parametrize("factor", (1, 2))
@torch.no_grad()
def test_step_by_step(factor: int) -> None:
    network = DEFAULT.build().eval()
    for attention in (network.fusion.stage3, network.fusion.stage2):
        nn.init.normal_(attention.out.weight, std=1.0)  # far from the start, where the fused map is the final one
    for gate in (network.weighting.channel.mlp[2], network.weighting.spatial.conv):
        nn.init.normal_(gate.weight, std=0.5)
    nn.init.normal_(network.graph.classifier.weight)
    images = make_images(factor * SIZE, batch=4)
    output = network(images, mask_background=True)
    steps = [step_by_step(network, image) for image in images]
    expected = {name: torch.stack([one[name] for one in steps]) for name in steps[0]}
    assert (expected["cells"] != expected["cells_without_fusion"]).any()
    for name in ("object_boxes", "window_boxes", "object_masks"):
        assert torch.equal(getattr(output, name), expected[name]), name
    for name, logits in output.logits.items():
        torch.testing.assert_close(logits, expected[name], rtol=1e-3, atol=1e-3, msg=lambda text, n=name: n + text)


# ---- what cannot be built -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    (
        ({"graph_scope": "batch"}, ("graph_scope", "sgkrl_published", "not of sgkrl")),
        ({"spatial_weights": "none"}, ("none", "relative", "absolute")),
        ({"without": ("graph",)}, ("graph", "fusion", "weighting")),
        ({"without": ("weighting",), "spatial_weights": "absolute"}, ("without", "weighting", "absolute")),
        ({"without": ("fusion",), "prediction": ("fused",)}, ("fused", "raw, object, graph")),
        ({"prediction": ("raw", "crown")}, ("crown", "raw", "fused", "object", "graph")),
        ({"prediction": ("window",)}, ("window", "raw", "fused", "object", "graph")),
        ({"windows": ((((4, 4),), 1), (((13, 13),), 5))}, ("2", "5")),
        ({"windows": "fish"}, ("fish", "birds", "vehicles")),
        ({"windows": ((4, 4), 2)}, ("windows",)),
        ({"exit_threshold": 1.5}, ("exit_threshold", "1.5", "0", "1")),
        ({"window_source": "stage2"}, ("window_source", "stage2", "pixels", "stage3")),
    ),
    ids=str,
)
def test_what_cannot_be_built_is_refused(settings: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught, torch.device("meta"):
        DEFAULT.build(**settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)
