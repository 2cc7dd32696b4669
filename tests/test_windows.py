"""Windows: grid, scores, overlaps and the batched greedy selection against loops over single windows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import reference
import torch
from tracing import traced

from networks.localization import activation_map
from networks.windows import (
    WINDOW_SETS,
    WindowSelector,
    greedy_selection,
    overlap_conflicts,
    resolve_window_set,
    scale_window_set,
    window_grid,
    window_scores,
)
from utils.errors import UserError

SETS = {"birds": reference.BIRDS, "vehicles": reference.VEHICLES}
GRIDS = (3, 4, 7, 14, 28)


def as_tuples(window_set: tuple) -> reference.WindowSet:
    """The same nesting in plain tuples, whatever named types it is made of."""
    return tuple((tuple(tuple(size) for size in sizes), int(quota)) for sizes, quota in window_set)


# ---- window sets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_published_window_sets(name: str) -> None:
    assert as_tuples(WINDOW_SETS[name]) == SETS[name]
    assert as_tuples(resolve_window_set(name)) == SETS[name]
    assert as_tuples(resolve_window_set(SETS[name])) == SETS[name]


@pytest.mark.parametrize(("name", "counts"), (("birds", (361, 241, 315)), ("vehicles", (241, 235, 115))))
def test_published_window_counts(name: str, counts: tuple[int, ...]) -> None:
    assert tuple(len(window_grid(sizes, 14, 32)) for sizes, _ in WINDOW_SETS[name]) == counts


def test_scaling_by_hand() -> None:
    assert as_tuples(scale_window_set(reference.BIRDS, 14)) == reference.BIRDS
    # Halves go up: 3 -> 1.5 -> 2 and 5 -> 2.5 -> 3, 7 -> 3.5 -> 4 and 9 -> 4.5 -> 5.
    assert as_tuples(scale_window_set(reference.BIRDS, 7)) == (
        (((2, 2), (2, 3), (3, 2)), 2),
        (((3, 3), (3, 4), (4, 3)), 3),
        (((4, 4), (3, 5), (5, 3), (4, 5), (5, 4)), 2),
    )
    assert as_tuples(scale_window_set(reference.VEHICLES, 28))[2] == (
        ((20, 20), (18, 22), (22, 18), (16, 24), (24, 16)),
        1,
    )
    assert as_tuples(scale_window_set(reference.BIRDS, 3)) == (
        (((1, 1),), 2),
        (((1, 1), (1, 2), (2, 1)), 3),
        (((2, 2), (1, 2), (2, 1)), 2),
    )
    assert as_tuples(scale_window_set((((((1, 14), (14, 1), (1, 1)), 1)),), 3)) == ((((1, 3), (3, 1), (1, 1)), 1),)


@pytest.mark.parametrize("grid_size", (1, 2, *GRIDS, 10, 15, 31))
@pytest.mark.parametrize("name", SETS)
def test_scaling_equals_reference(name: str, grid_size: int) -> None:
    assert as_tuples(scale_window_set(SETS[name], grid_size)) == reference.scale_window_set(SETS[name], grid_size)


@pytest.mark.parametrize(
    "wrong",
    (
        "fish",
        "",
        (),
        ((),),
        (((), 2),),
        ((((4, 4),), 0),),
        ((((4, 4),), -1),),
        ((((4, 4),), 1.5),),
        ((((4, 4),), "2"),),
        ((((0, 4),), 1),),
        ((((4, -3),), 1),),
        ((((4, 4, 4),), 1),),
        ((((4.5, 4),), 1),),
        (((4, 4), 2),),
        (((4, 4), (3, 5)),),
        3,
        None,
    ),
    ids=str,
)
def test_malformed_window_sets_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError):
        resolve_window_set(wrong)


def test_unknown_name_is_told_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="fish.*") as caught:
        resolve_window_set("fish")
    assert all(name in str(caught.value) for name in SETS)


# ---- grid ---------------------------------------------------------------------------------------------------------


def test_pixel_boxes_by_hand() -> None:
    boxes = window_grid(((4, 4), (3, 5)), 14, 32)
    assert boxes.dtype == torch.float32
    assert boxes[0].tolist() == [0, 0, 127, 127]  # cell (0, 0): 128 pixels
    assert boxes[1].tolist() == [31, 0, 159, 127]  # cell (0, 1): the clipped start is one pixel further out, 129 wide
    assert boxes[11].tolist() == [0, 31, 127, 159]  # cell (1, 0), eleven placements in a row
    assert boxes[11 + 1].tolist() == [31, 31, 159, 159]
    assert boxes[11 * 11 - 1].tolist() == [319, 319, 447, 447]  # cell (10, 10), the last of this size
    assert boxes[11 * 11].tolist() == [0, 0, 159, 95]  # three cells high, five wide
    assert boxes[11 * 11 + 10].tolist() == [0, 31, 159, 127]  # cell (1, 0), ten placements in a row
    assert boxes[-1].tolist() == [287, 351, 447, 447]  # cell (11, 9)
    assert len(boxes) == 11 * 11 + 12 * 10


@pytest.mark.parametrize("stride", (16, 32))
@pytest.mark.parametrize("grid_size", GRIDS)
@pytest.mark.parametrize("name", SETS)
def test_window_grid_equals_reference(name: str, grid_size: int, stride: int) -> None:
    for sizes, _ in reference.scale_window_set(SETS[name], grid_size):
        result = window_grid(sizes, grid_size, stride)
        np.testing.assert_array_equal(result.numpy(), reference.window_grid(sizes, grid_size, stride))


# ---- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid_size", GRIDS)
@pytest.mark.parametrize("name", SETS)
def test_scores_equal_reference(name: str, grid_size: int) -> None:
    generator = torch.Generator().manual_seed(grid_size)
    features = torch.randn(3, 40, grid_size, grid_size, generator=generator) + 0.3
    for sizes, _ in reference.scale_window_set(SETS[name], grid_size):
        result = window_scores(activation_map(features), sizes)
        expected = torch.stack([reference.window_scores(one.double(), sizes) for one in features])
        assert result.shape == expected.shape
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=2e-5)


def test_scores_are_in_the_order_of_the_grid() -> None:
    sizes, stride = ((2, 3), (3, 2), (1, 1)), 10
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    boxes = window_grid(sizes, 6, stride)
    middle_column = (boxes[:, 0] + boxes[:, 2]) / 2 / stride
    middle_row = (boxes[:, 1] + boxes[:, 3]) / 2 / stride
    across, down = window_scores(torch.stack([columns, rows]), sizes)
    assert (across + 0.5 - middle_column).abs().max() < 0.2
    assert (down + 0.5 - middle_row).abs().max() < 0.2


# ---- overlaps -----------------------------------------------------------------------------------------------------


def conflicts_in_integers(boxes: np.ndarray) -> np.ndarray:
    """IoU > 1/4 without a division: 4 * intersection > union."""
    boxes = boxes.astype(np.int64)
    first, second = boxes[:, None], boxes[None, :]
    width = np.minimum(first[..., 2], second[..., 2]) - np.maximum(first[..., 0], second[..., 0]) + 1
    height = np.minimum(first[..., 3], second[..., 3]) - np.maximum(first[..., 1], second[..., 1]) + 1
    intersection = width.clip(0) * height.clip(0)
    areas = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    return 4 * intersection > areas[:, None] + areas[None, :] - intersection


@pytest.mark.parametrize("grid_size", (3, 7, 14))
@pytest.mark.parametrize("name", SETS)
def test_conflicts_of_published_windows(name: str, grid_size: int) -> None:
    for sizes, _ in reference.scale_window_set(SETS[name], grid_size):
        boxes = reference.window_grid(sizes, grid_size, 32)
        result = overlap_conflicts(torch.from_numpy(boxes).float())
        assert result.dtype == torch.bool
        expected = conflicts_in_integers(boxes)
        np.testing.assert_array_equal(result.numpy(), expected)
        for i, j in np.random.default_rng(0).integers(0, len(boxes), (40, 2)):
            assert expected[i, j] == (reference.intersection_over_union(boxes[i], boxes[j]) > 0.25)


def test_conflicts_count_both_end_pixels() -> None:
    boxes = torch.tensor(
        [
            [0, 0, 9, 9],
            [6, 0, 15, 9],  # 40 of 160 pixels: exactly a quarter, no conflict
            [5, 0, 14, 9],  # 50 of 150
            [9, 9, 18, 18],  # one shared pixel
            [10, 0, 19, 9],  # neighbours without a shared pixel
            [30, 30, 30, 30],
        ]
    ).float()
    assert overlap_conflicts(boxes)[0].tolist() == [True, False, True, False, False, False]
    assert overlap_conflicts(boxes).diagonal().all()
    assert overlap_conflicts(boxes, max_iou=0.0)[0].tolist() == [True, True, True, True, False, False]
    assert overlap_conflicts(boxes, max_iou=0.3)[0].tolist() == [True, False, True, False, False, False]
    assert overlap_conflicts(boxes, max_iou=0.34)[0].tolist() == [True, False, False, False, False, False]


def test_conflicts_of_random_boxes() -> None:
    generator = np.random.default_rng(1)
    starts = generator.integers(0, 20, (150, 2))
    boxes = np.concatenate([starts, starts + generator.integers(0, 12, (150, 2))], axis=1)
    result = overlap_conflicts(torch.from_numpy(boxes).float()).numpy()
    np.testing.assert_array_equal(result, conflicts_in_integers(boxes))
    for i, j in itertools.product(range(0, 150, 7), repeat=2):
        assert result[i, j] == (reference.intersection_over_union(boxes[i], boxes[j]) > 0.25)


# ---- greedy selection ---------------------------------------------------------------------------------------------


def score_vectors(count: int, length: int, kind: str, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if kind == "continuous":
        scores = generator.standard_normal((count, length))
    elif kind == "ties":
        scores = generator.integers(0, 4, (count, length))
    elif kind == "all equal":
        scores = np.repeat(generator.standard_normal((count, 1)), length, axis=1)
    elif kind == "negative":
        scores = -np.exp(generator.standard_normal((count, length)) * 20)
    else:  # neighbouring float32 values, up to the largest there are
        scores = np.float32(3.4e38) - np.float32(2.1e31) * generator.integers(0, 5, (count, length)).astype(np.float32)
        scores *= generator.choice(np.array([-1, 1], dtype=np.float32), (count, 1))
    return scores.astype(np.float32)


@pytest.mark.parametrize("quota", (1, 2, 3, 7))
@pytest.mark.parametrize("kind", ("continuous", "ties", "all equal", "negative", "extreme"))
def test_greedy_selection_equals_reference(kind: str, quota: int) -> None:
    for sizes, grid_size in ((((2, 2), (1, 3), (3, 1)), 5), (((3, 3), (2, 4)), 4), (((1, 1),), 3)):
        conflicts = overlap_conflicts(window_grid(sizes, grid_size, 32))
        scores = score_vectors(100, len(conflicts), kind, seed=quota)
        result = greedy_selection(torch.from_numpy(scores), conflicts, quota)
        assert result.dtype == torch.int64
        expected = [reference.greedy_selection(one, conflicts.numpy(), quota) for one in scores]
        np.testing.assert_array_equal(result.numpy(), np.array(expected))


@pytest.mark.parametrize("name", SETS)
def test_greedy_selection_on_published_windows(name: str) -> None:
    for sizes, quota in SETS[name]:
        conflicts = overlap_conflicts(window_grid(sizes, 14, 32))
        for kind in ("continuous", "ties"):
            scores = score_vectors(40, len(conflicts), kind, seed=7)
            result = greedy_selection(torch.from_numpy(scores), conflicts, quota).numpy()
            expected = [reference.greedy_selection(one, conflicts.numpy(), quota) for one in scores]
            np.testing.assert_array_equal(result, np.array(expected))


@pytest.mark.parametrize("density", (0.02, 0.3, 0.9))
def test_greedy_selection_on_random_conflicts(density: float) -> None:
    generator = np.random.default_rng(2)
    conflicts = generator.random((30, 30)) < density
    conflicts |= conflicts.T | np.eye(30, dtype=bool)
    scores = score_vectors(200, 30, "ties", seed=3)
    result = greedy_selection(torch.from_numpy(scores), torch.from_numpy(conflicts), 6).numpy()
    expected = [reference.greedy_selection(one, conflicts, 6) for one in scores]
    np.testing.assert_array_equal(result, np.array(expected))


def test_greedy_selection_by_hand() -> None:
    conflicts = torch.eye(5, dtype=torch.bool)
    conflicts[0, 1] = conflicts[1, 0] = conflicts[3, 4] = conflicts[4, 3] = True
    scores = torch.tensor([[1.0, 2, 2, 2, 5], [0, 0, 0, 0, 0], [-1, -2, -9, -4, -5]])
    # 4 drops 3; of the equal 1 and 2 the first comes first; then nothing is left and the last is repeated.
    assert greedy_selection(scores, conflicts, 5).tolist() == [[4, 1, 2, 2, 2], [0, 2, 3, 3, 3], [0, 3, 2, 2, 2]]


def test_greedy_selection_when_one_drops_all() -> None:
    scores = torch.tensor([[0.0, 3, 1], [7, 3, 7]])
    assert greedy_selection(scores, torch.ones(3, 3, dtype=torch.bool), 4).tolist() == [[1] * 4, [0] * 4]
    assert greedy_selection(torch.tensor([[-2.0]]), torch.ones(1, 1, dtype=torch.bool), 3).tolist() == [[0, 0, 0]]


# ---- selector -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid_size", GRIDS)
@pytest.mark.parametrize("name", SETS)
def test_selector_equals_reference(name: str, grid_size: int) -> None:
    window_set = reference.scale_window_set(SETS[name], grid_size)
    selector = WindowSelector(name, grid_size=grid_size, stride=32)
    assert selector.count == sum(quota for _, quota in window_set)
    count = 6 if grid_size < 20 else 1
    features = torch.randn(count, 16, grid_size, grid_size, generator=torch.Generator().manual_seed(5))
    result = selector(activation_map(features))
    assert result.dtype == torch.float32
    expected = np.stack([reference.select_windows(one, window_set, 32) for one in features])
    np.testing.assert_array_equal(result.numpy(), expected)


@pytest.mark.parametrize("stride", (16, 32))
def test_selector_of_a_set_of_its_own(stride: int) -> None:
    window_set = ((((3, 7), (7, 3)), 4), (((10, 10),), 1))
    for grid_size in (3, 5, 14):
        selector = WindowSelector(window_set, grid_size=grid_size, stride=stride)
        features = torch.randn(5, 3, grid_size, grid_size, generator=torch.Generator().manual_seed(6))
        scaled = reference.scale_window_set(window_set, grid_size)
        expected = np.stack([reference.select_windows(one, scaled, stride) for one in features])
        np.testing.assert_array_equal(selector(activation_map(features)).numpy(), expected)


def test_selector_with_one_window() -> None:
    selector = WindowSelector(((((14, 14),), 1),), grid_size=3, stride=32)
    assert selector.count == 1
    assert selector(torch.randn(2, 3, 3)).tolist() == [[[0, 0, 95, 95]]] * 2


@pytest.mark.parametrize("value", (0.0, 0.1, -7.3))
@pytest.mark.parametrize("grid_size", (3, 14))
def test_selector_on_a_constant_map(grid_size: int, value: float) -> None:
    selector = WindowSelector("birds", grid_size=grid_size, stride=32)
    boxes = selector(torch.full((2, grid_size, grid_size), value))
    assert boxes.shape == (2, 7, 4)
    assert torch.equal(boxes[0], boxes[1])
    assert boxes.min() >= 0
    assert boxes.max() <= 32 * grid_size - 1


def test_selector_tables_are_no_part_of_a_checkpoint() -> None:
    selector = WindowSelector("birds", grid_size=14, stride=32)
    assert not selector.state_dict()
    assert not list(selector.parameters())


def test_too_large_quota_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="(?s)(5.*4|4.*5)"):
        WindowSelector(((((13, 13),), 5),), grid_size=14, stride=32)
    WindowSelector(((((13, 13),), 4),), grid_size=14, stride=32)
    with pytest.raises(ValueError):  # nine placements of one cell, once the size has been scaled
        WindowSelector(((((4, 4), (3, 3)), 10),), grid_size=3, stride=32)


SELECTOR = WindowSelector("birds", grid_size=7, stride=32)


def test_no_host_synchronisation_and_no_graph_break() -> None:
    activation = torch.randn(3, 7, 7, generator=torch.Generator().manual_seed(8))
    expected = SELECTOR(activation)
    with reference.ForbidHostReads():
        result = SELECTOR(activation)
    assert torch.equal(result, expected)
    assert torch.equal(traced(SELECTOR)(activation), expected)


def test_batch_equals_one_by_one() -> None:
    activation = torch.randn(16, 7, 7, generator=torch.Generator().manual_seed(9))
    together = SELECTOR(activation)
    assert torch.equal(together, torch.cat([SELECTOR(one[None]) for one in activation]))


def test_carries_no_gradient() -> None:
    assert not SELECTOR(torch.randn(1, 7, 7, requires_grad=True)).requires_grad


def test_published_pixel_sizes_follow_the_cells() -> None:
    """Every window of h x w cells is 32h or 32h + 1 pixels high: the last where its start was not clipped."""
    for sizes, _ in reference.BIRDS:
        for height, width in sizes:
            boxes = window_grid(((height, width),), 14, 32)
            tall, wide = boxes[:, 3] - boxes[:, 1] + 1, boxes[:, 2] - boxes[:, 0] + 1
            assert torch.equal(tall, 32.0 * height + (boxes[:, 1] > 0))
            assert torch.equal(wide, 32.0 * width + (boxes[:, 0] > 0))
            assert len(boxes) == math.prod(15 - side for side in (height, width))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_on_a_gpu() -> None:
    selector = WindowSelector("birds", grid_size=14, stride=32)
    activation = torch.randint(0, 50, (8, 14, 14), generator=torch.Generator().manual_seed(4)).float()
    selector.cuda()
    on_device = activation.cuda()
    selector(on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = selector(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.shape == (8, 7, 4)


def test_maps_of_another_grid_are_refused() -> None:
    selector = WindowSelector("birds", grid_size=14, stride=32)
    with pytest.raises(UserError, match="maps have 14x12 cells; expected 14x14"):
        selector(torch.rand(1, 14, 12))
