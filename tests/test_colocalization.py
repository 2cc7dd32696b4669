"""Colocalization: the object of all pictures together, against NumPy's principal component and scikit-image."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import reference
import torch
from cases import slow_but_for
from skimage.measure import label
from small_systems import SIZE, Variant, assert_same, make_images, run
from torch import nn

from networks.colocalization import SHARE_OF_MAXIMUM, Colocalization
from networks.outputs import Features
from networks.system import System
from utils.options import SettingsError
from utils.reporting.early_exit import costs_of_passes

SYSTEMS = {
    model: Variant(model, pretrained=None, localization="colocalization")
    for model in ("resnet", "mmal", "flrdf", "sgkrl")
}
GRID = 6  # cells along a side, where a system looks for the object
pytestmark = pytest.mark.usefixtures("thin_trunk")


class Cells(nn.Module):
    """A trunk whose final map is the picture's three colours and, with `squares`, their squares, cell by cell."""

    stride = 32
    batch_norm = "shared"

    def __init__(self, *, squares: bool = True) -> None:
        super().__init__()
        self.squares, self.embedding_channels = squares, 6 if squares else 3

    def forward(self, images: torch.Tensor) -> Features:
        cells = nn.functional.avg_pool2d(images, 32)
        final = torch.cat([cells, cells.square()], dim=1) if self.squares else cells
        return Features(final, final, final, final, final.mean(dim=(2, 3)))


def fitted(batches: list[torch.Tensor]) -> Colocalization:
    colocalization = Colocalization(Cells(), input_size=448)
    colocalization.fit(batches)
    return colocalization


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    """Blobs that differ from cell to cell, seven pictures in batches of unequal size."""
    images = make_images(448, batch=7, seed=3) + torch.tensor([0.3, -0.1, 0.2])[:, None, None]
    return list(images.split([4, 2, 1]))


def assert_fitted(colocalization: Colocalization, batches: list[torch.Tensor], *, within: float = 1e-6) -> None:
    """Mean and component are those of NumPy's singular value decomposition of all cells in float64."""
    maps = [colocalization.trunk(batch).final for batch in batches]
    cells = np.concatenate([final.movedim(1, -1).flatten(0, -2).double().numpy() for final in maps])
    mean = cells.mean(axis=0)
    _, _, directions = np.linalg.svd(cells - mean, full_matrices=False)
    component = directions[0]
    if np.corrcoef((cells - mean) @ component, cells.sum(axis=1))[0, 1] < 0:
        component = -component
    np.testing.assert_allclose(colocalization.mean.numpy(), mean, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(colocalization.component.numpy(), component, rtol=0, atol=within)


def test_finds_mean_and_first_principal_component_of_all_cells(batches: list[torch.Tensor]) -> None:
    assert_fitted(fitted(batches), batches, within=1e-5)  # the second one has nine tenths of its variance


def test_a_tenth_of_the_highest_indicator_is_the_objects() -> None:
    assert SHARE_OF_MAXIMUM == 0.1


def test_looks_at_large_pictures_scaled_down_with_antialiasing() -> None:
    colocalization, seen = Colocalization(Cells(), input_size=448), []
    colocalization.trunk.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    images = torch.randn(1, 3, 896, 896, generator=torch.Generator().manual_seed(0))
    colocalization(images)
    expected = nn.functional.interpolate(images, size=(448, 448), mode="bilinear", antialias=True)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_component_keeps_its_digits_where_cells_are_far_from_zero(
    batches: list[torch.Tensor], autocast: bool
) -> None:
    """A thousand times as far as they differ, and in another place for each batch; also in half precision's context."""
    offsets = torch.tensor([900.0, 1000.0, 1100.0])[:, None, None]
    batches = [batch + offsets + number for number, batch in enumerate(batches)]
    colocalization = Colocalization(Cells(squares=False), input_size=448)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        colocalization.fit(batches)
    assert_fitted(colocalization, batches)


def test_processes_find_it_together(batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each looks at other pictures, which lie elsewhere; the sums of all are what is reduced."""
    batches = [batch + 100 * number for number, batch in enumerate(batches)]
    shares, summed = (batches[:1], batches[1:]), []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: summed.append(sums.clone()))
    for share in shares:
        fitted(share)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.copy_(sum(summed)))
    found = [fitted(share) for share in shares]
    assert_fitted(found[0], batches)
    assert torch.equal(found[0].mean, found[1].mean)
    assert torch.equal(found[0].component, found[1].component)


def test_finds_the_largest_component_of_cells_that_indicate_the_object(batches: list[torch.Tensor]) -> None:
    colocalization, images = fitted(batches), torch.cat(batches)
    found = colocalization(images)
    mean, component = (buffer.double().numpy() for buffer in (colocalization.mean, colocalization.component))
    several = 0
    for index, final in enumerate(Cells()(images).final.double().numpy()):
        indicator = np.einsum("chw,c->hw", final - mean[:, None, None], component)
        mask = indicator > SHARE_OF_MAXIMUM * max(indicator.max(), 0)
        labels = label(mask, connectivity=2)
        sizes = np.bincount(labels.flat)[1:]
        several += len(sizes) > 1
        expected = labels == 1 + sizes.argmax()
        np.testing.assert_array_equal(found.cells[index].numpy(), expected)
        rows, columns = expected.any(axis=1).nonzero()[0], expected.any(axis=0).nonzero()[0]
        assert found.boxes[index].tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert several > 0


def test_finds_everything_where_no_cell_indicates_an_object(batches: list[torch.Tensor]) -> None:
    colocalization = fitted(batches)
    colocalization.component.neg_()
    darkest = torch.cat(batches)[:1].amax(dim=(2, 3), keepdim=True).expand(1, 3, 448, 448)
    found = colocalization(darkest)
    assert not found.cells.any() or found.boxes[0].tolist() == [0, 0, 14, 14]
    assert found.boxes[0].tolist() == [0, 0, 14, 14]


def test_looks_at_small_pictures_enlarged() -> None:
    colocalization = Colocalization(Cells(), input_size=224)
    colocalization.fit([make_images(224, batch=3)])
    assert colocalization.stride == 16
    assert colocalization(make_images(224)).cells.shape == (2, 14, 14)
    assert colocalization(make_images(448)).cells.shape == (2, 14, 14)
    assert Colocalization(Cells(), input_size=512).stride == 32


@functools.cache
def prepared(model: str) -> System:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("networks.colocalization.SMALLEST_SIDE", 32 * GRID)
        network = SYSTEMS[model].build()
    network.prepare((make_images(SIZE, 4, seed), torch.arange(4)) for seed in (1, 2))
    return network.eval()


@pytest.mark.parametrize("model", slow_but_for(("sgkrl",), SYSTEMS))
def test_boxes_stay_while_the_network_learns(model: str) -> None:
    network, images = copy.deepcopy(prepared(model)), make_images(SIZE, 3)
    before, state = network.eval()(images), copy.deepcopy(network.colocalization.state_dict())
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.9)
    network.train()(images)
    after = network.eval()(images)
    assert torch.equal(before.object_boxes, after.object_boxes)
    for branch, logits in before.logits.items():
        assert not torch.allclose(logits, after.logits[branch]), branch
    for name, value in network.colocalization.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("model", SYSTEMS)
def test_crops_what_it_finds(model: str) -> None:
    network, images = prepared(model), make_images(SIZE, 2)
    found = network.colocalization(images)
    with reference.recorded_passes(network) as given:
        output = network(images)
    stride = SIZE / GRID
    for index, cells in enumerate(found.boxes.tolist()):
        starts, ends = ([edge * stride - 1 for edge in edges] for edges in (cells[:2], cells[2:]))
        expected = [max(start, 0.0) for start in starts] + ends
        torch.testing.assert_close(output.object_boxes[index], torch.tensor(expected))
    first_crop = given[0 if model == "resnet" else 1]
    assert first_crop.shape == images.shape
    assert not torch.equal(first_crop, images)


@pytest.mark.parametrize("model", SYSTEMS)
def test_a_prediction_does_not_depend_on_the_batch(model: str) -> None:
    network, images = prepared(model), make_images(SIZE, 3)
    together = network.predict_logits(network(images))
    alone = torch.cat([network.predict_logits(network(image)) for image in images.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_the_copy_of_the_trunk_learns_nothing() -> None:
    network = prepared("resnet")
    groups = {id(parameter) for group in network.parameter_groups().values() for parameter in group}
    assert not groups & {id(parameter) for parameter in network.colocalization.parameters()}
    assert not copy.deepcopy(network).train().colocalization.trunk.training


@pytest.mark.parametrize("model", SYSTEMS)
def test_needs_pretrained_weights_and_has_a_grid_of_its_own(model: str) -> None:
    with pytest.raises(SettingsError, match="localization is 'colocalization'; expected another one where pretrained"):
        Variant(model, localization="colocalization").build()
    if model != "resnet":
        with pytest.raises(SettingsError, match="localization_stride"):
            Variant(model, pretrained=None, localization="colocalization", localization_stride=16).build()


# ---- boxes that are known before the pass ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", SYSTEMS)
@torch.no_grad()
def test_known_boxes_are_looked_at_without_the_copy(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = prepared(model), make_images(SIZE, 2)
    expected = network(images)
    boxes = network.find_objects(images)
    assert network.takes_boxes
    assert torch.equal(boxes, expected.object_boxes)
    monkeypatch.setattr(network.colocalization, "forward", None)
    output = network(images, boxes=boxes)
    assert_same(output, expected._replace(object_masks=None))
    others = torch.tensor([[10.0, 20, 100, 90], [0, 0, 60, 127]])
    output = network(images, boxes=others)
    assert torch.equal(output.object_boxes, others)
    assert not torch.allclose(output.logits["object"], expected.logits["object"])


@pytest.mark.parametrize("model", SYSTEMS)
@torch.no_grad()
def test_the_picture_is_passed_only_where_its_own_branches_are_wanted(model: str) -> None:
    network, images = prepared(model), make_images(SIZE, 2)
    expected = network(images)
    output, given = run(network, images, branches=("object",))
    assert len(given) == 1
    assert list(output.logits) == ["object"]
    torch.testing.assert_close(output.logits["object"], expected.logits["object"])


@torch.no_grad()
def test_masks_of_the_background_are_found_all_the_same() -> None:
    network, images = prepared("sgkrl"), make_images(SIZE, 2)
    others = torch.tensor([[10.0, 20, 100, 90], [0, 0, 60, 127]])
    assert_same(network(images, boxes=others, mask_background=True), network(images, mask_background=True))


@torch.no_grad()
def test_images_that_exit_early_have_what_they_exit_with() -> None:
    network, images = copy.deepcopy(prepared("sgkrl")), make_images(SIZE, 2)
    network.exit_threshold = 0.0
    assert torch.equal(network(images, branches=("graph",)).logits["graph"], network(images).logits["graph"])


@torch.no_grad()
@pytest.mark.parametrize(("prediction", "looks"), [(("object", "graph"), False), (("raw", "graph"), True)])
def test_an_early_exit_looks_at_the_picture_only_for_its_prediction(prediction: tuple[str, ...], looks: bool) -> None:
    network, images = copy.deepcopy(prepared("sgkrl")), make_images(SIZE, 2)
    network.prediction, network.exit_threshold = prediction, 0.0
    output = network(images, branches=("object", "graph"))
    assert ("raw" in output.logits) == looks
    of_picture_and_copy = costs_of_passes(network)[0] - 1
    network.prediction = ("raw", "object", "graph")
    assert (of_picture_and_copy < costs_of_passes(network)[0] - 1) == (not looks)


def test_boxes_of_a_learning_trunk_are_not_taken() -> None:
    for variant in (Variant("resnet"), Variant("mmal")):
        assert not variant.evaluated.takes_boxes


def test_flrdf_has_nothing_to_confirm_them_by() -> None:
    with pytest.raises(SettingsError, match="box_agreement"):
        Variant("flrdf", pretrained=None, localization="colocalization", box_agreement=True).build()
