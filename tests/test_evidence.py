"""Evidence maps: the class activation map where there is one, the object's and the windows' share in their places."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from networks import MODELS, build_network, find_system
from networks.crops import boxes_in_image
from networks.evidence import _lay_over, forward_with_evidence
from networks.localization import Localization
from networks.outputs import NetworkOutput, object_confidence

pytestmark = pytest.mark.usefixtures("thin_trunk")

WINDOWS = ((((5, 5),), 2),)


def build(model: str, **options) -> torch.nn.Module:
    torch.manual_seed(3)
    if any(field.name == "windows" for field in dataclasses.fields(find_system(model).Options)):
        options = {"windows": WINDOWS} | options
    return build_network(model, num_classes=4, backbone="resnet18", input_size=96, **options).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(5))


def test_for_a_plain_classifier_it_is_the_class_activation_map(images):
    network = build("resnet")
    output, evidence = forward_with_evidence(network, images, size=3)
    with torch.no_grad():
        final = network.backbone(images).final
    for index, label in enumerate(output.logits["raw"].argmax(dim=1).tolist()):
        expected = torch.einsum("c,chw->hw", network.classifier.weight[label], final[index]).clamp(min=0)
        # the gradient of a mean is the weight by the number of cells, and the density multiplies by it
        assert torch.allclose(evidence[index], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "options"), [*((model, {}) for model in MODELS), ("sgkrl", {"window_source": "stage3"})], ids=str
)
def test_the_output_is_the_plain_one_and_nothing_is_left_behind(model, options, images):
    network = build(model, **options)
    with torch.no_grad():
        expected = network(images, branches=network.evaluated)
    output, evidence = forward_with_evidence(network, images, size=24, branches=network.evaluated)
    for name, logits in expected.logits.items():
        assert torch.allclose(output.logits[name], logits, atol=1e-5), name
        assert not output.logits[name].requires_grad
    assert evidence.shape == (3, 24, 24)
    assert evidence.isfinite().all()
    assert (evidence >= 0).all()
    assert evidence.amax() > 0
    assert not network.backbone._forward_hooks
    assert not network.backbone._forward_pre_hooks
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_picture_does_not_change_the_evidence_of_another(images):
    network = build("sgkrl")
    _, together = forward_with_evidence(network, images, size=12)
    _, alone = forward_with_evidence(network, images[1:2], size=12)
    assert torch.allclose(together[1], alone[0], rtol=1e-3, atol=1e-5)


def test_a_prediction_from_the_object_points_into_its_box(images):
    network = build("mmal")
    found = torch.tensor([[31.0, 0.0, 63.0, 31.0]] * 3)

    class Fixed(torch.nn.Module):
        def forward(self, *arguments, **options):
            return network(*arguments, **options)._replace(object_boxes=found)

    fixed = Fixed()
    fixed.backbone, fixed.prediction, fixed.input_size = network.backbone, network.prediction, network.input_size
    fixed.predict_logits, fixed.colocalization = network.predict_logits, network.colocalization
    fixed.branch_weights = network.branch_weights
    _, evidence = forward_with_evidence(fixed, images, size=96)
    outside = torch.ones(96, 96, dtype=torch.bool)
    outside[0:32, 31:64] = False
    assert (evidence[:, outside] == 0).all()
    assert evidence[:, ~outside].amax() > 0


@pytest.mark.parametrize("branch", ["raw", "object", "graph"])
def test_a_branch_counts_as_much_as_in_the_prediction(branch, images):
    """One that has all the weight, three times as much as it has alone."""
    network = build("sgkrl")
    network.ensemble_weights = torch.tensor([3.0 * (name == branch) for name in network.prediction])
    _, evidence = forward_with_evidence(network, images, size=24)
    _, expected = forward_with_evidence(build("sgkrl", prediction=(branch,)), images, size=24)
    assert expected.amax() > 0
    torch.testing.assert_close(evidence, 3 * expected)


@pytest.mark.parametrize("ensembling", ["sum_logits", "mean_logits"])
@pytest.mark.parametrize("model", MODELS)
def test_every_system_says_how_much_a_branch_counts(model, ensembling):
    network = build(model, ensembling=ensembling)
    for view in network.own_views:
        network.use_own_view(view)
    logits = {name: torch.randn(1, 4, requires_grad=True) for name in network.prediction}
    network.predict_logits(NetworkOutput(logits))[0, 0].backward()
    slopes = torch.stack([logits[name].grad[0, 0] for name in network.prediction])
    weights = torch.ones(len(slopes)) if network.branch_weights() is None else network.branch_weights().float()
    torch.testing.assert_close(slopes / slopes.sum(), weights / weights.sum())


def test_evidence_of_a_branch_that_counts_a_tenth(images):
    """The sum over the branches, each alone times its weight: before what speaks against the class is cut off."""
    network = build("dflcnn")
    with torch.no_grad():
        network.bank.filters.weight.mul_(10)
        network.bank.filters.bias.fill_(5.0)
    weights = dict(zip(network.prediction, network.branch_weights().tolist(), strict=True))
    assert weights == pytest.approx({"global": 1.0, "parts": 1.0, "side": 0.1})
    features = network.backbone(images)
    maps = [map_.detach().requires_grad_() for map_ in (features.stage3, features.final)]
    network.backbone.register_forward_hook(lambda *_: features._replace(stage3=maps[0], final=maps[1]))
    prediction = network.predict_logits(network(images))
    prediction.gather(1, prediction.argmax(dim=1, keepdim=True)).sum().backward()
    whole = torch.tensor([[0.0, 0.0, 95.0, 95.0]]).expand(3, 1, 4)
    laid = [_lay_over((map_ * map_.grad).sum(dim=1)[:, None].detach(), whole, 96, 12) for map_ in maps]
    network.backbone._forward_hooks.clear()
    _, evidence = forward_with_evidence(network, images, size=12)
    torch.testing.assert_close(evidence, sum(laid).clamp(min=0))


class Corner(torch.nn.Module):
    """A colocalization that finds every object in the upper left cell of nine."""

    stride = 32

    def boxes(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[0.0, 0.0, 31.0, 31.0]]).expand(len(images), 4)

    def forward(self, images: torch.Tensor) -> Localization:
        cells = torch.zeros(len(images), 3, 3, dtype=torch.bool)
        cells[:, 0, 0] = True
        return Localization(cells, torch.tensor([[0, 0, 1, 1]]).expand(len(images), 4))


@pytest.mark.parametrize(
    ("model", "prediction", "sees_picture"),
    [
        ("resnet", None, False),
        ("mmal", ("object",), False),
        ("mmal", ("raw", "object"), True),
        ("flrdf", ("object",), False),
        ("sgkrl", ("object",), False),
        ("sgkrl", ("graph",), False),
        ("sgkrl", ("raw", "graph"), True),
    ],
)
def test_the_picture_is_left_out_where_it_is_not_looked_at(model, prediction, sees_picture, images):
    network = build(model, localization="colocalization", prediction=prediction)
    network.colocalization = Corner()
    output, evidence = forward_with_evidence(network, images, size=96, branches=network.prediction)
    assert (output.object_boxes == torch.tensor([0, 0, 31, 31])).all()
    inside = torch.zeros(96, 96, dtype=torch.bool)
    inside[:32, :32] = True
    assert evidence[:, inside].amax() > 0
    assert (evidence[:, ~inside] > 0).any() == sees_picture


def test_windows_of_cells_count_where_they_looked(images):
    """The prediction is that of the graph, to which only the windows' last maps lead."""
    network = build("sgkrl", window_source="stage3", prediction=("graph",))
    output, evidence = forward_with_evidence(network, images, size=96)
    assert evidence.amax() > 0
    places = boxes_in_image(output.window_boxes, output.object_boxes, 96)
    for number, boxes in enumerate(places.tolist()):
        outside = torch.ones(96, 96, dtype=torch.bool)
        for x0, y0, x1, y1 in boxes:
            outside[int(y0) : int(y1) + 2, int(x0) : int(x1) + 2] = False
        assert (evidence[number][outside] == 0).all()


def test_maps_laid_over_boxes_equal_a_slow_reference():
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand(2, 2, 3, 3, generator=generator)
    boxes = torch.tensor([[[0, 0, 95, 95], [32, 16, 63, 79]], [[-16, 8, 31, 55], [48, 48, 111, 111]]]).float()
    laid = _lay_over(maps, boxes, 96, 96)
    for picture in range(2):
        expected = torch.zeros(96, 96)
        for number in range(2):
            x0, y0, x1, y1 = boxes[picture, number].long().tolist()
            width, height = x1 - x0 + 1, y1 - y0 + 1
            spread = F.interpolate(maps[picture, number][None, None], (height, width), mode="bilinear")[0, 0]
            density = 9 * 96 * 96 / (width * height)
            for y in range(max(y0, 0), min(y1, 95) + 1):
                for x in range(max(x0, 0), min(x1, 95) + 1):
                    expected[y, x] += spread[y - y0, x - x0] * density
        assert torch.allclose(laid[picture], expected, rtol=1e-4)


def test_the_evidence_of_a_cell_is_the_same_however_large_its_box():
    """Laid over the whole picture or over a corner of it, a map adds up to the same."""
    maps = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(2))
    sums = [
        _lay_over(maps, torch.tensor([[box]]).float(), 96, 96).sum()
        for box in ([0, 0, 95, 95], [0, 0, 47, 47], [24, 48, 95, 71])
    ]
    assert torch.allclose(torch.stack(sums), sums[0].expand(3), rtol=1e-4)


def test_windows_of_images_that_exit_early_have_no_evidence(images):
    """And those of the others the same as one by one."""
    network = build("sgkrl")
    network.classifier.weight.data *= 3
    with torch.no_grad():
        confidence = object_confidence(network(images).logits)
    network.exit_threshold = confidence.sort().values[1:].mean().item()  # the surest exits
    output, evidence = forward_with_evidence(network, images, size=12)
    assert output.unsure.tolist() == (confidence <= network.exit_threshold).tolist()
    assert output.unsure.sum() == 2
    for index in range(3):
        alone, expected = forward_with_evidence(network, images[index : index + 1], size=12)
        assert torch.allclose(evidence[index], expected[0], rtol=1e-3, atol=1e-5)
        assert torch.allclose(output.logits["graph"][index], alone.logits["graph"][0], atol=1e-5)
