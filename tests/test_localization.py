"""Localization: batched components, boxes and masks against scikit-image, one image at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from torch import Tensor
from tracing import traced

from networks.localization import (
    Localization,
    activation_map,
    adaptive_mask,
    cell_boxes_to_pixels,
    largest_component,
    localize,
    soft_boxes,
    with_gradient,
)

DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
GRIDS = ((3, 3), (4, 4), (7, 7), (14, 14), (28, 28), (1, 12), (12, 1), (5, 17), (16, 3))


def snake(height: int, width: int) -> np.ndarray:
    """One cell wide, up and down through the whole grid: the longest way from end to end."""
    mask = np.zeros((height, width), dtype=bool)
    mask[:, ::2] = True
    for column in range(1, width, 2):
        mask[0 if column % 4 == 1 else -1, column] = True
    return mask


def spiral(size: int) -> np.ndarray:
    """One cell wide, from the corner to the middle, with one free cell between the turns."""
    mask = np.zeros((size, size), dtype=bool)
    row, column, row_step, column_step = 0, 0, 0, 1
    mask[0, 0] = True

    def free(row: int, column: int) -> bool:
        return not (0 <= row < size and 0 <= column < size and mask[row, column])

    while True:
        for _ in range(2):
            row_next, column_next = row + row_step, column + column_step
            inside = 0 <= row_next < size and 0 <= column_next < size
            if inside and free(row_next + row_step, column_next + column_step) and not mask[row_next, column_next]:
                break
            row_step, column_step = column_step, -row_step
        else:
            return mask
        row, column = row + row_step, column + column_step
        mask[row, column] = True
        if mask.sum() > size * size // 2 + size:
            return mask


def diagonal_zigzag(height: int, width: int) -> np.ndarray:
    """A chain whose cells touch only by their corners."""
    mask = np.zeros((height, width), dtype=bool)
    period = max(2 * (height - 1), 1)
    for column in range(width):
        position = column % period
        mask[position if position < height else period - position, column] = True
    return mask


def equal_squares(size: int) -> np.ndarray:
    """Blocks of two by two with a free line between: every area the same."""
    mask = np.ones((size, size), dtype=bool)
    mask[2::3] = False
    mask[:, 2::3] = False
    return mask[: size - size % 3 or size, : size - size % 3 or size]


def u_and_block() -> np.ndarray:
    """A U whose arms start at the top and meet last, round a block of the same area that is met in between."""
    mask = np.zeros((6, 9), dtype=bool)
    mask[0:6, 0] = mask[1:6, 8] = True
    mask[5, 0:9] = True
    mask[0, 2:7] = mask[1, 2:7] = mask[2, 2:7] = mask[3, 4] = True
    mask[3, 2:5] = True
    return mask


def separate_columns(size: int) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[:, ::2] = True
    return mask


def checkerboard(height: int, width: int) -> np.ndarray:
    return np.add.outer(np.arange(height), np.arange(width)) % 2 == 0


def one_cell(height: int, width: int, row: int, column: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[row, column] = True
    return mask


ADVERSARIAL = {
    "snake": snake(28, 28),
    "snake of odd sides": snake(15, 23),
    "snake in thirds": snake(20, 20) & (np.arange(20) % 7 != 6),
    "spiral": spiral(21),
    "diagonal": np.eye(20, dtype=bool),
    "two diagonals": np.eye(13, dtype=bool) | np.eye(13, dtype=bool)[::-1],
    "zigzag": diagonal_zigzag(4, 40),
    "zigzag of two rows": diagonal_zigzag(2, 40),
    "equal squares": equal_squares(14),
    "U and block": u_and_block(),
    "separate columns": separate_columns(9),
    "checkerboard": checkerboard(14, 14),
    "odd checkerboard": checkerboard(7, 10),
    "empty": np.zeros((7, 7), dtype=bool),
    "full": np.ones((7, 9), dtype=bool),
    "one cell of one": np.ones((1, 1), dtype=bool),
    "nothing of one": np.zeros((1, 1), dtype=bool),
    "first cell": one_cell(5, 6, 0, 0),
    "last cell": one_cell(5, 6, 4, 5),
    "row": np.array([[1, 1, 0, 1, 1, 0, 1]], dtype=bool),
    "column": np.array([[1, 0, 1, 1, 1, 0, 1, 1, 1]], dtype=bool).T,
    "ring round a cell": np.pad(one_cell(3, 3, 1, 1), 1, constant_values=True)[:, :-1],
}
TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda mask: mask,
    "upside down": lambda mask: mask[::-1],
    "mirrored": lambda mask: mask[:, ::-1],
    "transposed": lambda mask: mask.T,
    "turned": lambda mask: mask.T[::-1, ::-1],
}


def random_masks(count: int, height: int, width: int, density: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((count, height, width)) < density


def maps_with_masks(masks: np.ndarray) -> Tensor:
    """Activation maps whose cells above the mean are these (not of a full mask: nothing is above its own mean)."""
    return torch.from_numpy(masks.astype(np.float32))


def expected_localization(masks: np.ndarray, penultimate: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    located = [reference.localize(*pair) for pair in zip(masks, penultimate, strict=True)]
    cells = np.stack([cells for cells, _ in located])
    boxes = np.array([box for _, box in located], dtype=np.int64)
    return cells, boxes, np.stack([reference.adaptive_mask(*one) for one in located])


def assert_localized(masks: np.ndarray, penultimate: np.ndarray) -> Localization:
    result = localize(maps_with_masks(masks), maps_with_masks(penultimate))
    cells, boxes, adaptive = expected_localization(masks, penultimate)
    assert result.cells.dtype == torch.bool
    assert result.boxes.dtype == torch.int64
    np.testing.assert_array_equal(result.cells.numpy(), cells)
    np.testing.assert_array_equal(result.boxes.numpy(), boxes)
    filled = adaptive_mask(result)
    assert filled.dtype == torch.bool
    np.testing.assert_array_equal(filled.numpy(), adaptive)
    return result


# ---- the reference itself -----------------------------------------------------------------------------------------


def test_reference_component_equals_flood_fill() -> None:
    cases = list(ADVERSARIAL.values())
    for density in DENSITIES:
        cases += list(random_masks(6, 6, 9, density, seed=1))
    for mask in cases:
        np.testing.assert_array_equal(reference.largest_component(mask), reference.largest_component_by_flood(mask))


def test_adversarial_masks_are_what_they_say() -> None:
    for name in ("snake", "snake of odd sides", "spiral", "diagonal", "zigzag", "checkerboard"):
        mask = ADVERSARIAL[name]
        np.testing.assert_array_equal(reference.largest_component(mask), mask, err_msg=name)
    assert ADVERSARIAL["spiral"].sum() > 21 * 21 * 0.45
    squares = ADVERSARIAL["equal squares"]
    assert reference.largest_component(squares).sum() == 4
    assert squares.sum() > 4


# ---- the largest component ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_largest_component_of_adversarial_masks(name: str, turn: str) -> None:
    mask = TURNS[turn](ADVERSARIAL[name]).copy()
    result = largest_component(torch.from_numpy(mask)[None])
    assert result.dtype == torch.bool
    np.testing.assert_array_equal(result[0].numpy(), reference.largest_component_by_flood(mask))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_largest_component_of_random_masks(grid: tuple[int, int]) -> None:
    count = 24 if max(grid) < 20 else 2
    masks = np.concatenate([random_masks(count, *grid, density, seed=index) for index, density in enumerate(DENSITIES)])
    expected = np.stack([reference.largest_component(mask) for mask in masks])
    np.testing.assert_array_equal(largest_component(torch.from_numpy(masks)).numpy(), expected)


def test_equal_areas_first_met_row_by_row() -> None:
    mask = torch.zeros(2, 5, 8, dtype=torch.bool)
    mask[0, 0:2, 6] = mask[0, 1:3, 0] = True  # the one in the right-hand columns starts a row earlier
    mask[1, 1, 6:8] = mask[1, 1:3, 0] = True  # the same row: the left one is met first
    result = largest_component(mask)
    assert result[0].nonzero().tolist() == [[0, 6], [1, 6]]
    assert result[1].nonzero().tolist() == [[1, 0], [2, 0]]


def test_largest_component_batch_equals_one_by_one() -> None:
    masks = torch.from_numpy(random_masks(20, 14, 14, 0.45, seed=5))
    masks[3], masks[7] = False, True
    one_by_one = torch.cat([largest_component(mask[None]) for mask in masks])
    assert torch.equal(largest_component(masks), one_by_one)


# ---- boxes, masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_localize_random_masks(grid: tuple[int, int]) -> None:
    count = 12 if max(grid) < 20 else 1
    masks = np.concatenate([random_masks(count, *grid, density, seed=index) for index, density in enumerate(DENSITIES)])
    penultimate = np.concatenate([random_masks(3 * count, *grid, density, seed=50) for density in (0.2, 0.5, 0.9)])
    keep = ~(masks.all(axis=(1, 2)) | penultimate.all(axis=(1, 2)))  # a full mask has no map above its own mean
    assert_localized(masks[keep], penultimate[keep])


@pytest.mark.parametrize("turn", TURNS)
def test_localize_adversarial_masks(turn: str) -> None:
    for seed, mask in enumerate(ADVERSARIAL.values()):
        mask = TURNS[turn](mask).copy()[None]
        if mask.all():
            continue
        for density in (0.15, 0.6):
            penultimate = random_masks(1, *mask.shape[1:], density, seed=seed)
            if not penultimate.all():
                assert_localized(mask, penultimate)
        assert_localized(mask, mask)


@pytest.mark.parametrize("threshold", (0.5, 1.25, 4.0))
def test_localize_at_another_threshold(threshold: float) -> None:
    maps = np.random.default_rng(5).integers(0, 9, (40, 2, 6, 6)).astype(np.float32)
    above = maps > threshold * maps.mean(axis=(2, 3), keepdims=True, dtype=np.float64)
    result = localize(*torch.from_numpy(maps).unbind(1), threshold=threshold)
    cells, boxes, _ = expected_localization(above[:, 0], above[:, 1])
    np.testing.assert_array_equal(result.cells.numpy(), cells)
    np.testing.assert_array_equal(result.boxes.numpy(), boxes)


def test_localize_thresholds_each_image_at_its_own_mean() -> None:
    generator = np.random.default_rng(3)
    # Integers with an integer mean, some of them equal to it: those are not above it.
    maps = generator.integers(-4, 5, (60, 6, 6)).astype(np.float32)
    maps[:, -1, -1] -= maps.sum(axis=(1, 2))
    assert (maps.mean(axis=(1, 2)) == 0).all()
    penultimate = generator.integers(0, 9, (60, 6, 6)).astype(np.float32)
    offsets = torch.arange(60.0).reshape(-1, 1, 1) * 64  # a threshold shared by the batch would be far off
    result = localize(torch.from_numpy(maps) + offsets, torch.from_numpy(penultimate))
    cells, boxes, _ = expected_localization(
        np.stack([reference.mask_above_mean(one) for one in maps]),
        np.stack([reference.mask_above_mean(one) for one in penultimate]),
    )
    np.testing.assert_array_equal(result.cells.numpy(), cells)
    np.testing.assert_array_equal(result.boxes.numpy(), boxes)


def test_intersection_may_fall_apart_and_is_boxed_whole() -> None:
    mask = np.zeros((1, 5, 7), dtype=bool)
    mask[0, 2] = True
    penultimate = np.zeros_like(mask)
    penultimate[0, 2, [1, 5]] = penultimate[0, 0, 0] = True
    result = assert_localized(mask, penultimate)
    assert result.boxes.tolist() == [[1, 2, 6, 3]]
    assert adaptive_mask(result)[0, 2].tolist() == [False, True, True, True, True, True, False]


def test_component_is_chosen_before_the_intersection() -> None:
    mask = np.zeros((1, 6, 6), dtype=bool)
    mask[0, 0:3, 0:3] = mask[0, 5, 4:6] = True
    penultimate = np.zeros_like(mask)
    penultimate[0, 5, 4:6] = penultimate[0, 2, 2] = True
    assert assert_localized(mask, penultimate).boxes.tolist() == [[2, 2, 3, 3]]


@pytest.mark.parametrize("grid", ((3, 3), (7, 7), (14, 14), (4, 9), (1, 1)))
def test_disjoint_masks_give_the_whole_image(grid: tuple[int, int]) -> None:
    height, width = grid
    activation = torch.zeros(2, height, width)
    activation[:, 0, 0] = 1
    penultimate = torch.zeros(2, height, width)
    penultimate[:, -1, -1] = 1 if height * width > 1 else 0
    result = localize(activation, penultimate)
    assert result.boxes.tolist() == [[0, 0, width, height]] * 2
    assert not result.cells.any()
    assert adaptive_mask(result).all()
    pixels = cell_boxes_to_pixels(result.boxes, 32)
    assert pixels.tolist() == [[0, 0, 32 * width - 1, 32 * height - 1]] * 2


@pytest.mark.parametrize("value", (0.0, 1.0, -3.0, 0.1, 1e-8, 12345.678, -1e30))
def test_constant_maps_give_the_whole_image(value: float) -> None:
    for grid in (3, 7, 14):
        constant = torch.full((2, grid, grid), value)
        varied = torch.rand(2, grid, grid, generator=torch.Generator().manual_seed(0))
        result = localize(constant, constant)
        assert result.boxes.tolist() == [[0, 0, grid, grid]] * 2
        assert adaptive_mask(result).all()
        for pair in ((constant, varied), (varied, constant)):
            result = localize(*pair)
            x0, y0, x1, y1 = result.boxes.unbind(dim=1)
            assert ((x0 >= 0) & (x0 < x1) & (x1 <= grid) & (y0 >= 0) & (y0 < y1) & (y1 <= grid)).all()
            assert adaptive_mask(result).flatten(1).any(dim=1).all()


def test_adaptive_mask_grows_one_cell_to_either_side_inside_the_box_only() -> None:
    rows = ["........", "...#.#..", ".#......", "......#.", "..####..", "........"]
    expected = ["........", "..#####.", ".##.....", ".....##.", ".######.", "........"]
    cells = torch.tensor([[[cell == "#" for cell in row] for row in rows]])
    boxes = torch.tensor([[1, 1, 7, 5]])
    filled = adaptive_mask(Localization(cells, boxes))
    assert ["".join(".#"[int(cell)] for cell in row) for row in filled[0]] == expected


def test_cell_boxes_to_pixels_by_hand() -> None:
    boxes = torch.tensor([[0, 0, 14, 14], [3, 0, 5, 1], [0, 2, 1, 14], [13, 13, 14, 14]])
    pixels = cell_boxes_to_pixels(boxes, 32)
    assert pixels.dtype == torch.float32
    assert pixels.tolist() == [[0, 0, 447, 447], [95, 0, 159, 31], [0, 63, 31, 447], [415, 415, 447, 447]]
    assert cell_boxes_to_pixels(torch.tensor([[1, 0, 2, 3]]), 8).tolist() == [[7, 0, 15, 23]]


@pytest.mark.parametrize("stride", (8, 16, 32))
def test_cell_boxes_to_pixels_equals_reference(stride: int) -> None:
    generator = np.random.default_rng(0)
    starts = generator.integers(0, 13, (50, 2))
    boxes = np.concatenate([starts, starts + generator.integers(1, 6, (50, 2))], axis=1)
    expected = [reference.cell_box_to_pixels(tuple(box), stride) for box in boxes.tolist()]
    np.testing.assert_array_equal(cell_boxes_to_pixels(torch.from_numpy(boxes), stride).numpy(), np.array(expected))


# ---- soft boxes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", (16, 32))
def test_soft_box_of_an_even_rectangle_is_its_bounding_box(stride: int) -> None:
    features = torch.zeros(2, 3, 9, 12)
    features[0, :, 2:5, 3:10] = 1
    features[1, :, 0:8, 11:12] = 2
    expected = torch.tensor([[3, 2, 10, 5], [11, 0, 12, 8]]) * stride - torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(soft_boxes(features, stride), expected.float(), atol=0.5, rtol=0)


def test_soft_boxes_follow_a_moving_object() -> None:
    line = torch.arange(14.0)

    def features(x: Tensor) -> Tensor:
        return torch.exp(-((line[None, :] - x) ** 2 + (line[:, None] - 6) ** 2) / 8).expand(1, 4, 14, 14)

    x = torch.tensor(6.5, requires_grad=True)
    boxes = soft_boxes(features(x), 32)
    (gradient,) = torch.autograd.grad(boxes[0, 0] + boxes[0, 2], x)
    assert gradient.item() == pytest.approx(2 * 32, rel=0.1)  # both sides by 32 pixels a cell
    (gradient,) = torch.autograd.grad(soft_boxes(features(x), 32)[0, 2] - soft_boxes(features(x), 32)[0, 0], x)
    assert abs(gradient.item()) < 8  # but hardly wider


def test_soft_boxes_have_the_gradient_of_finite_differences() -> None:
    features = torch.rand(2, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features.requires_grad_()
    # Computed in float32 on purpose, hence the coarse step.
    assert torch.autograd.gradcheck(lambda f: soft_boxes(f, 32), features, eps=1e-3, atol=0.5, rtol=0.02)


@pytest.mark.parametrize("value", (0.0, 0.3, -2.0))
def test_soft_box_of_a_constant_map_is_the_whole_image(value: float) -> None:
    features = torch.full((1, 3, 7, 7), value, requires_grad=True)
    boxes = soft_boxes(features, 32)
    torch.testing.assert_close(boxes, torch.tensor([[0.0, 0.0, 223.0, 223.0]]), atol=0.01, rtol=0)
    boxes.sum().backward()
    assert features.grad.isfinite().all()


def test_boxes_with_gradient_are_the_same_boxes() -> None:
    features = torch.rand(3, 4, 7, 7, requires_grad=True)
    boxes = torch.tensor([[0.0, 31, 95, 223], [0, 0, 223, 223], [31, 31, 63, 63]])
    result = with_gradient(boxes, features, 32)
    assert torch.equal(result, boxes)
    assert result.requires_grad and not boxes.requires_grad


# ---- maps, batches, devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_activation_map_is_the_channel_sum_in_float32(dtype: torch.dtype) -> None:
    features = torch.randn(2, 65, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = activation_map(features)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, features.double().sum(dim=1).float(), rtol=1e-5, atol=1e-4)


def test_batch_equals_one_by_one() -> None:
    generator = torch.Generator().manual_seed(1)
    activation, penultimate = torch.rand(2, 12, 7, 9, generator=generator).unbind()
    together = localize(activation, penultimate)
    filled = adaptive_mask(together)
    for index in range(12):
        alone = localize(activation[index, None], penultimate[index, None])
        assert torch.equal(alone.cells[0], together.cells[index])
        assert torch.equal(alone.boxes[0], together.boxes[index])
        assert torch.equal(adaptive_mask(alone)[0], filled[index])


def everything(activation: Tensor, penultimate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    located = localize(activation, penultimate)
    return located.cells, cell_boxes_to_pixels(located.boxes, 32), adaptive_mask(located)


@pytest.mark.parametrize("grid", ((7, 7), (14, 14), (5, 9)))
def test_no_host_synchronisation(grid: tuple[int, int]) -> None:
    activation, penultimate = torch.rand(2, 3, *grid, generator=torch.Generator().manual_seed(2)).unbind()
    expected = everything(activation, penultimate)
    with reference.ForbidHostReads():
        result = everything(activation, penultimate)
    for one, other in zip(result, expected, strict=True):
        assert torch.equal(one, other)


def test_traces_without_graph_break() -> None:
    activation, penultimate = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(2)).unbind()
    result = traced(everything)(activation, penultimate)
    for one, other in zip(result, everything(activation, penultimate), strict=True):
        assert torch.equal(one, other)


def test_carries_no_gradient() -> None:
    activation = torch.rand(2, 6, 6, requires_grad=True)
    assert not any(result.requires_grad for result in everything(activation, activation * 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_on_a_gpu() -> None:
    activation, penultimate = torch.rand(2, 8, 14, 14, generator=torch.Generator().manual_seed(4)).unbind()
    expected = everything(activation, penultimate)
    on_device = activation.cuda(), penultimate.cuda()
    everything(*on_device)  # tables that are made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = everything(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(result, expected, strict=True):
        assert torch.equal(one.cpu(), other)
