"""Windows as cells cut from the object pass's stage-3 map: the cut, the last stage alone, and the gradient back."""

from __future__ import annotations

import pytest
import reference
import system_checks
import torch
from cases import slow_but_for
from small_systems import SIZE, Variant, make_images
from test_trunks import build_pair
from thin_trunk import THIN
from torch import Tensor, nn
from torchvision.ops import roi_align
from tracing import traced

from networks.backbone import Backbone
from networks.crops import crop_cells, crop_windows
from networks.outputs import Features

pytestmark = pytest.mark.usefixtures("thin_trunk")

INPUT = 96  # pixels: a map of 6 x 6 cells
BOXES = torch.tensor(
    [
        [0, 0, 95, 95],  # the whole crop
        [0, 0, 31, 31],
        [63, 63, 95, 95],  # to the far corner
        [31, 0, 63, 95],  # a strip over its whole height
        [31, 47, 79, 79],
        [5, 17, 70, 90],  # no edge between cells
        [95, 95, 95, 95],  # the last pixel
    ]
).float()
WHOLE = BOXES[:1]
SYSTEMS = {model: Variant(model, window_source="stage3") for model in ("mmal", "sgkrl")}


def random_maps(batch: int = 3, channels: int = 4, side: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0), dtype=dtype)


def boxes_of_each(batch: int = 3) -> Tensor:
    """`[B, N, 4]`: the boxes in another order for every picture."""
    return torch.stack([BOXES.roll(number, dims=0) for number in range(batch)])


# ---- the cut --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", (1, 3, 6, 7))
def test_cells_are_those_of_a_loop(size: int) -> None:
    maps, boxes = random_maps(), boxes_of_each()
    found = crop_cells(maps, boxes, size, input_size=INPUT)
    expected = [
        torch.from_numpy(reference.crop_cells(map_.numpy(), tuple(box), size, INPUT))
        for map_, own in zip(maps, boxes.tolist(), strict=True)
        for box in own
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", (3, 4, 6))
def test_cells_and_their_gradient_are_those_of_torchvision(size: int) -> None:
    maps, boxes = random_maps().requires_grad_(), boxes_of_each()
    edges = torch.cat([boxes[..., :2], boxes[..., 2:] + 1], dim=-1).double()
    expected = roi_align(maps, list(edges), size, spatial_scale=6 / INPUT, aligned=True)
    found = crop_cells(maps, boxes, size, input_size=INPUT)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    gradients = [torch.autograd.grad((cells * weights).sum(), maps)[0] for cells in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_the_whole_crop_at_the_maps_own_size_is_the_map() -> None:
    maps = random_maps(dtype=torch.float32)
    assert torch.equal(crop_cells(maps, WHOLE.expand(3, 1, 4), 6, input_size=INPUT), maps)
    halved = crop_cells(maps, WHOLE.expand(3, 1, 4), 3, input_size=INPUT)
    torch.testing.assert_close(halved, nn.functional.avg_pool2d(maps, 2))


def test_cells_of_a_picture_do_not_depend_on_the_others() -> None:
    maps, boxes = random_maps(), boxes_of_each()
    together = crop_cells(maps, boxes, 3, input_size=INPUT).unflatten(0, (3, -1))
    for number in range(3):
        alone = crop_cells(maps[number : number + 1], boxes[number : number + 1], 3, input_size=INPUT)
        torch.testing.assert_close(together[number], alone)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_cut_in_float32_and_comes_back(dtype: torch.dtype) -> None:
    maps, boxes = random_maps(dtype=torch.float32).to(dtype), boxes_of_each()
    found = crop_cells(maps, boxes, 3, input_size=INPUT)
    assert found.dtype == dtype
    expected = crop_cells(maps.float(), boxes, 3, input_size=INPUT).to(dtype)
    assert torch.equal(found, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(crop_cells(maps, boxes, 3, input_size=INPUT), expected)


def test_the_gradient_of_the_cut() -> None:
    maps, boxes = random_maps(2, 1, 6).requires_grad_(), boxes_of_each(2)
    assert torch.autograd.gradcheck(lambda maps: crop_cells(maps, boxes, 3, input_size=INPUT), maps)


# ---- the last stage alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in THIN),
        ("resnet18", {"batch_norm": "frozen"}),
        ("resnet18", {"last_stride": 1}),
        ("regnet_y_400mf", {"last_stride": 1}),
        ("wide_resnet50_2", {"stride_on_first_conv": True}),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_whole_crop_gives_the_maps_of_the_whole_pass(name: str, options: dict) -> None:
    backbone, images = build_pair(name, **options)[0], make_images(INPUT, 3)
    expected = backbone(images)
    cells = crop_cells(expected.stage3, WHOLE.expand(3, 1, 4), 6, input_size=INPUT)
    found = backbone(cells, kind="part", start="stage3")
    assert found.stage2 is found.stage3_split is found.final_split is None
    assert found.stage3 is cells
    for stage in ("penultimate", "final", "embedding"):
        torch.testing.assert_close(getattr(found, stage), getattr(expected, stage), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_dense_and_split_maps_of_the_last_stage_alone() -> None:
    backbone, images = build_pair("resnet18")[0], make_images(INPUT, 1)
    expected = backbone(images, dense=True, split=True)
    found = backbone(expected.stage3, dense=True, split=True, start="stage3")
    assert torch.equal(found.final, expected.final)
    assert torch.equal(found.final_split.residual, expected.final_split.residual)


@pytest.mark.parametrize("name", slow_but_for(("resnet18",), THIN))
@torch.no_grad()
def test_the_last_stage_alone_is_traced_without_a_graph_break(name: str) -> None:
    backbone = build_pair(name)[0]
    cells = backbone(make_images(INPUT), until="stage3").stage3
    compiled = traced(backbone)
    assert torch.equal(compiled(cells, start="stage3").final, backbone(cells, start="stage3").final)


def test_statistics_per_pass_are_those_of_parts() -> None:
    network = SYSTEMS["mmal"].build(batch_norm="per_pass").train()
    network(make_images())
    trunk = network.backbone.trunk
    assert trunk.layer3[0].bn1.passes.tolist() == trunk.bn1.passes.tolist() == [1, 1, 0]
    assert trunk.layer4[0].bn1.passes.tolist() == [1, 1, 1]


# ---- in the systems -------------------------------------------------------------------------------------------------


def recorded_features(network: nn.Module, images: Tensor) -> tuple[list[Features], object]:
    """The features of every backbone pass, and the output."""
    passes: list[Features] = []
    handle = network.backbone.register_forward_hook(lambda module, inputs, features: passes.append(features))
    output = network(images)
    handle.remove()
    return passes, output


@pytest.mark.parametrize("name", ("resnet18", "regnet_y_400mf", "convnext_tiny", "swin_v2_t"))
@pytest.mark.parametrize("size", slow_but_for((160,), (96, 128, 160, 224)))
@torch.no_grad()
def test_as_many_cells_as_of_windows_of_pixels(name: str, size: int) -> None:
    shapes = []
    for source in ("stage3", "pixels"):
        network = Variant("mmal", window_source=source, backbone=name).build(input_size=size).eval()
        passes, _ = recorded_features(network, make_images(size, 1))
        shapes.append([getattr(passes[-1], stage).shape for stage in ("stage3", "penultimate", "final")])
    assert shapes[0] == shapes[1]
    assert shapes[0][0][-1] == size // 32


@pytest.mark.parametrize("model", SYSTEMS)
@torch.no_grad()
def test_windows_are_looked_at_by_the_last_stage(model: str) -> None:
    """Window by window, cut by hand; everything before the windows is as with those of pixels."""
    network, images = SYSTEMS[model].evaluated, make_images()
    passes, output = recorded_features(network, images)
    for number, boxes in enumerate(output.window_boxes):
        for index, box in enumerate(boxes.tolist()):
            map_ = passes[1].stage3[number].numpy()
            cells = torch.from_numpy(reference.crop_cells(map_, tuple(box), SIZE // 32, SIZE)).float()
            final = network.backbone.trunk.layer4(cells[None])
            logits = network.classifier(final.mean(dim=(2, 3)))[0]
            torch.testing.assert_close(output.logits["window"][number, index], logits, rtol=1e-4, atol=1e-4)
    by_pixels = Variant(model).evaluated(images)
    assert torch.equal(output.window_boxes, by_pixels.window_boxes)
    same = {name for name, logits in output.logits.items() if torch.equal(logits, by_pixels.logits[name])}
    assert same == output.logits.keys() - {"window", "graph"}


@pytest.mark.parametrize("model", SYSTEMS)
@torch.no_grad()
def test_pixels_are_what_they_were_by_default(model: str) -> None:
    network, images = Variant(model).evaluated, make_images()
    passes: list[Tensor] = []
    handle = network.backbone.register_forward_pre_hook(lambda module, inputs: passes.append(inputs[0]))
    output = network(images)
    handle.remove()
    windows = crop_windows(passes[1], output.window_boxes, input_size=SIZE)
    assert torch.equal(passes[2], windows)
    expected = network.classifier(network.backbone(windows, kind="part").embedding.unflatten(0, (2, -1)))
    assert torch.equal(output.logits["window"], expected)
    assert torch.equal(Variant(model, window_source="pixels").evaluated(images).logits["window"], expected)


@pytest.mark.parametrize("source", ("pixels", "stage3"))
@pytest.mark.parametrize("model", SYSTEMS)
def test_the_gradient_of_the_windows_goes_back_into_the_object_pass(model: str, source: str) -> None:
    network = Variant(model, window_source=source).build().train()
    passes, output = recorded_features(network, make_images())
    stage3 = passes[1].stage3
    trunk = network.backbone.trunk
    loss = output.logits["window"].logsumexp(dim=-1).sum()
    of_map, of_first, of_last = torch.autograd.grad(
        loss, [stage3, trunk.conv1.weight, trunk.layer4[0].conv1.weight], allow_unused=True
    )
    assert (of_map is not None) == (source == "stage3")
    if source == "stage3":
        assert of_map.isfinite().all()
        assert (of_map != 0).flatten(1).any(dim=1).all()  # in every picture
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in (of_first, of_last))


@pytest.mark.parametrize("model", slow_but_for(("mmal",), ("mmal", "sgkrl")))
def test_systems_trace_without_graph_break(model: str) -> None:
    system_checks.forward_traces_without_graph_break(SYSTEMS[model].build_scripted(), make_images(2 * SIZE))


def test_mixed_precision_on_a_real_trunk() -> None:
    system_checks.mixed_precision_keeps_logits_and_losses_in_float32(SYSTEMS["sgkrl"], scripted=False)


@pytest.mark.parametrize("check", (system_checks.output_keeps_the_contract,), ids=lambda check: check.__name__)
@pytest.mark.parametrize("settings", ({"last_stride": 1, "localization_stride": 16}, {"batch_norm": "frozen"}), ids=str)
def test_other_trunks_of_the_systems(settings: dict, check: system_checks.Check) -> None:
    check(Variant("sgkrl", window_source="stage3", **settings))


def test_a_backbone_by_itself_needs_no_system() -> None:
    """Channels of stage 3 come in, those of the final map go out."""
    with torch.device("meta"):
        backbone = Backbone("resnet50")
        features = backbone(torch.empty(14, 1024, 7, 7), start="stage3")
    assert features.final.shape == (14, 2048, 4, 4)
