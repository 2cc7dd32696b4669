"""Coarse parts, navigators, anchors and proposals against the published rules, one cell, anchor and pick at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from parts_by_hand import ANCHOR_RULE, COUNTS, FORMER_SCALES, RATIOS, gate_by_hand, list_anchors, list_boxes, propose
from torch import Tensor, nn
from tracing import traced

from networks.parts import ANCHOR_SCALES, CoarsePart, Navigator, PartProposals, anchor_boxes, anchor_levels


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(module: type[nn.Module], *arguments: int, **settings: int) -> nn.Module:
    torch.manual_seed(1)
    return module(*arguments, **settings)


# ---- coarse parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((3, 64, 5, 5), (1, 64, 1, 1), (2, 64, 3, 7)), ids=str)
@torch.no_grad()
def test_coarse_part_by_hand(shape: tuple[int, ...]) -> None:
    part = make(CoarsePart, 64, 20)
    features = 3 * normal(*shape)
    part_map, feature = part(features)
    assert part_map.shape == shape and feature.shape == (shape[0], 20)
    for image in range(shape[0]):
        expected = gate_by_hand(part, features[image])
        torch.testing.assert_close(part_map[image], expected)
        projected = part.projection.weight @ expected.mean(dim=(1, 2)) + part.projection.bias
        torch.testing.assert_close(feature[image], projected, rtol=1e-4, atol=1e-5)


def test_coarse_part_has_the_published_size() -> None:
    part = CoarsePart(2048)
    weights = 2 * 2048 * (2048 // 16) + 2048 // 16 + 2048 + 2048 * 1024 + 1024
    assert sum(parameter.numel() for parameter in part.parameters()) == weights
    assert part.gate.fc1.weight.shape[0] == 128 and part.projection.out_features == 1024


def test_coarse_part_learns_from_its_feature_and_its_map() -> None:
    part = make(CoarsePart, 32, 8)
    features = normal(2, 32, 3, 3).requires_grad_()
    part_map, feature = part(features)
    feature.square().sum().backward(retain_graph=True)
    assert features.grad.abs().sum() > 0
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in part.parameters())
    part.zero_grad()
    part_map.square().sum().backward()
    assert all(parameter.grad is None for parameter in part.projection.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in part.gate.parameters())


# ---- anchors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_size", COUNTS)
def test_anchors_equal_reference(input_size: int) -> None:
    boxes = anchor_boxes(input_size // 32, 32)
    assert boxes.dtype == torch.int64
    assert len(boxes) == COUNTS[input_size]
    np.testing.assert_array_equal(boxes.numpy(), list_boxes(input_size))


@pytest.mark.parametrize("sizes", ((32, 64, 128), (100, 7, 48), (1, 1, 1)), ids=str)
@pytest.mark.parametrize("input_size", (96, 224, 448))
def test_anchors_of_other_sizes(input_size: int, sizes: tuple[int, int, int]) -> None:
    boxes = anchor_boxes(input_size // 32, 32, sizes)
    np.testing.assert_array_equal(boxes.numpy(), list_boxes(input_size, sizes))
    assert (boxes[:, 2:] >= boxes[:, :2]).all()


def test_anchors_by_hand() -> None:
    boxes = anchor_boxes(14, 32).tolist()
    # 60.48 pixels, width to height 2 to 3: 49.38 by 74.07, centred on (16, 16).
    assert boxes[0] == [-9, -22, 39, 52]
    assert boxes[1] == [23, -22, 71, 52]  # the next column
    assert boxes[14] == [-9, 10, 39, 84]  # the next row
    assert boxes[196] == [-15, -15, 45, 45]  # the next ratio: a square
    assert boxes[2 * 196] == [-22, -9, 52, 39]  # wider than high
    assert boxes[4 * 196] == [-23, -23, 53, 53]  # the square of the next scale: 76.20 pixels
    assert boxes[6 * 196 + 49] == [-29, -29, 91, 91]  # the second level: 120.95 pixels on (32, 32)
    assert boxes[6 * 196 + 6 * 49 + 16] == [-32, -32, 159, 159]  # the third: 192 pixels on (64, 64)
    assert boxes[-1] == [448 - 187, 448 - 125, 448 + 186 - 1, 448 + 124 - 1]  # 373.3 by 248.9 on (448, 448)


def test_published_anchors() -> None:
    """Facts of the published ones: sides of squares, outermost edges, and how many are as they were before."""
    boxes = anchor_boxes(14, 32)
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    squares = sorted(set(sides[(sides[:, 0] - sides[:, 1]).abs() <= 1].flatten().tolist()))
    assert squares == [61, 77, 121, 153, 192, 241, 305]
    assert (boxes.min(), boxes.max() + 1) == (-123, 634)
    former = anchor_boxes(14, 32, scales=FORMER_SCALES)
    np.testing.assert_array_equal(former.numpy(), list_boxes(448, scales=FORMER_SCALES))
    assert (former == boxes).all(dim=1).sum() == 144
    assert anchor_levels(14, FORMER_SCALES).tolist() == anchor_levels(14).tolist()
    assert tuple(ANCHOR_SCALES) == tuple(scales for _, _, scales in ANCHOR_RULE)


def test_pairs_of_anchors_that_overlap_by_just_a_quarter_are_dropped() -> None:
    dropping, keeping = (PartProposals(6, grid_size=14, stride=32, inclusive=inclusive) for inclusive in (True, False))
    differ = dropping.conflicts != keeping.conflicts
    assert differ.sum() == 2 * 728
    first, second = differ.nonzero()[0].tolist()
    assert reference.intersection_over_union(dropping.boxes[first].numpy(), dropping.boxes[second].numpy()) == 0.25
    scores = torch.zeros(1, len(dropping.boxes))
    scores[0, first], scores[0, second] = 2, 1
    kept = [proposals(scores)[1].tolist()[0][:2] for proposals in (dropping, keeping)]
    assert kept == [[2, 0], [2, 1]]


@pytest.mark.parametrize("input_size", COUNTS)
def test_anchors_stay_inside_the_zeros_round_the_picture(input_size: int) -> None:
    boxes = anchor_boxes(input_size // 32, 32)
    assert boxes.min() >= -input_size / 2 and boxes.max() < input_size * 1.5
    centres = (boxes[:, :2] + boxes[:, 2:] + 1) / 2
    assert centres.min() > 0 and centres.max() <= input_size + 1  # each sees some of the picture
    assert ((boxes[:, :2] < input_size) & (boxes[:, 2:] >= 0)).all()


@pytest.mark.parametrize("grid_size", (3, 7, 14))
def test_anchors_are_the_same_part_of_larger_pictures(grid_size: int) -> None:
    """With twice the stride everything is twice as large, but for what is cut off at whole pixels."""
    small, large = anchor_boxes(grid_size, 32), anchor_boxes(grid_size, 64)
    assert (large[:, :2] - 2 * small[:, :2]).min() >= 0 and (large[:, :2] - 2 * small[:, :2]).max() <= 1
    ends = large[:, 2:] + 1 - 2 * (small[:, 2:] + 1)
    assert ends.min() >= 0 and ends.max() <= 1


@pytest.mark.parametrize("input_size", COUNTS)
def test_levels_of_anchors(input_size: int) -> None:
    levels = anchor_levels(input_size // 32)
    assert levels.tolist() == [anchor["level"] for anchor in list_anchors(input_size)]


# ---- navigator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid_size", (3, 5, 7, 8, 14))
@torch.no_grad()
def test_navigator_by_hand(grid_size: int) -> None:
    navigator = make(Navigator, 24, hidden_channels=16)
    maps = normal(2, 24, grid_size, grid_size)
    x, expected = maps, []
    for stride, level, score in zip((1, 2, 2), navigator.levels, navigator.scores, strict=True):
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), level.weight, level.bias, stride=stride).clamp(min=0)
        expected.append(torch.einsum("oc,bchw->bohw", score.weight[:, :, 0, 0], x) + score.bias[:, None, None])
    result = navigator(maps)
    assert result.shape == (2, COUNTS[32 * grid_size])
    torch.testing.assert_close(
        result, torch.cat([part.reshape(2, -1) for part in expected], dim=1), rtol=1e-4, atol=1e-4
    )


def test_navigator_has_the_published_size() -> None:
    navigator = Navigator(2048)
    assert [tuple(level.weight.shape) for level in navigator.levels] == [
        (128, 2048, 3, 3),
        (128, 128, 3, 3),
        (128, 128, 3, 3),
    ]
    assert [tuple(score.weight.shape) for score in navigator.scores] == [
        (6, 128, 1, 1),
        (6, 128, 1, 1),
        (9, 128, 1, 1),
    ]


@pytest.mark.parametrize("input_size", COUNTS)
@torch.no_grad()
def test_scores_belong_to_the_anchors(input_size: int) -> None:
    """Each score is replaced by a number that says where it was made."""
    navigator = make(Navigator, 8, hidden_channels=4)

    def write_place(level: int, score: Tensor) -> Tensor:
        _, channels, rows, columns = score.shape
        place = torch.zeros_like(score)
        for channel in range(channels):
            for row in range(rows):
                for column in range(columns):
                    place[:, channel, row, column] = ((level * 100 + channel) * 100 + row) * 100 + column
        return place

    for level, convolution in enumerate(navigator.scores):
        convolution.register_forward_hook(lambda module, inputs, score, level=level: write_place(level, score))
    places = navigator(torch.zeros(1, 8, input_size // 32, input_size // 32))[0].int().tolist()
    boxes = anchor_boxes(input_size // 32, 32).double()
    anchors = list_anchors(input_size)
    assert len(places) == len(boxes) == len(anchors)
    for place, box, anchor in zip(places, boxes, anchors, strict=True):
        level, channel, row, column = place // 10**6, place // 10**4 % 100, place // 100 % 100, place % 100
        assert (level, channel, row, column) == tuple(anchor[name] for name in ("level", "channel", "row", "column"))
        stride, _, scales = ANCHOR_RULE[level]
        side = (48, 96, 192)[level] * input_size / 448 * scales[channel // 3]
        ratio = RATIOS[channel % 3]
        width, height = box[2] - box[0] + 1, box[3] - box[1] + 1
        assert abs(width - side * math.sqrt(ratio)) < 1 and abs(height - side / math.sqrt(ratio)) < 1
        for cell, start, end in ((column, box[0], box[2]), (row, box[1], box[3])):
            assert abs((start + end + 1) / 2 - min((cell + 0.5) * stride, input_size)) <= 1


@torch.no_grad()
def test_a_cell_changes_the_scores_of_anchors_round_it() -> None:
    navigator = make(Navigator, 8)
    anchors = list_anchors(448)
    maps = normal(1, 8, 14, 14)
    for row, column in ((3, 10), (12, 1)):
        other = maps.clone()
        other[:, :, row, column] += 5
        changed = (navigator(maps) != navigator(other))[0].nonzero().flatten().tolist()
        x, y = 32 * column + 16, 32 * row + 16
        for level, (stride, _, scales) in enumerate(ANCHOR_RULE):
            near = [anchors[index] for index in changed if anchors[index]["level"] == level]
            assert {anchor["channel"] for anchor in near} == set(range(3 * len(scales)))
            assert max(abs(anchor["x"] - x) for anchor in near) <= 1.5 * stride
            assert max(abs(anchor["y"] - y) for anchor in near) <= 1.5 * stride


def test_no_gradient_reaches_the_map() -> None:
    navigator = make(Navigator, 8)
    maps = normal(1, 8, 5, 5).requires_grad_()
    scores = navigator(maps)
    scores.sum().backward()
    assert scores.requires_grad and maps.grad is None


@pytest.mark.parametrize("level", (0, 1, 2))
def test_every_level_learns_when_asked(level: int) -> None:
    navigator = make(Navigator, 8)
    scores = navigator(normal(2, 8, 7, 7))
    scores[:, anchor_levels(7) == level].square().sum().backward()
    for other, (convolution, score) in enumerate(zip(navigator.levels, navigator.scores, strict=True)):
        # A level lies on those before it, and has scores of its own.
        assert (convolution.weight.grad is not None and convolution.weight.grad.abs().sum() > 0) == (other <= level)
        assert (score.weight.grad is not None and score.weight.grad.abs().sum() > 0) == (other == level)


@torch.no_grad()
def test_levels_start_alike() -> None:
    """No level's scores are much larger than another's, or one would propose all and the others never learn."""
    spreads = []
    for seed in range(3):
        torch.manual_seed(seed)
        navigator = Navigator(64)
        scores = navigator(normal(4, 64, 14, 14, seed=seed).relu())
        spreads.append([scores[:, anchor_levels(14) == level].std() for level in range(3)])
    means = torch.tensor(spreads).mean(dim=0)
    assert means.max() < 2.5 * means.min()


def test_a_navigator_may_start_as_published() -> None:
    """As PyTorch starts convolutions."""
    navigator = make(Navigator, 16, hidden_channels=8, levels_alike=False)
    torch.manual_seed(1)
    levels = [nn.Conv2d(inputs, 8, 3) for inputs in (16, 8, 8)]
    scores = [nn.Conv2d(8, count, 1) for count in (6, 6, 9)]
    for got, expected in zip((*navigator.levels, *navigator.scores), (*levels, *scores), strict=True):
        assert torch.equal(got.weight, expected.weight) and torch.equal(got.bias, expected.bias)


# ---- proposals ----------------------------------------------------------------------------------------------------


def make_scores(kind: str, rows: int, length: int, seed: int) -> Tensor:
    generator = np.random.default_rng(seed)
    if kind == "continuous":
        scores = generator.standard_normal((rows, length))
    elif kind == "ties":
        scores = generator.integers(0, 3, (rows, length))
    elif kind == "all equal":
        scores = np.full((rows, length), -0.5)
    else:  # the first level leads, as with PyTorch's own start
        scores = generator.standard_normal((rows, length)) - 10 * np.sort(generator.random(length))
    return torch.from_numpy(scores.astype(np.float32))


def assert_proposals(proposals: PartProposals, scores: Tensor, input_size: int, **rule: object) -> None:
    sizes = rule.pop("sizes", (48, 96, 192))
    boxes = list_boxes(input_size, sizes)
    got_boxes, got_scores = proposals(scores)
    assert got_boxes.dtype == torch.float32
    expected = np.array([propose(row, boxes, proposals.count, **rule) for row in scores.numpy()])
    np.testing.assert_array_equal(got_boxes.numpy(), boxes[expected])
    assert torch.equal(got_scores, scores.gather(1, torch.from_numpy(expected)))
    assert (got_scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("kind", ("continuous", "ties", "all equal", "first level leads"))
@pytest.mark.parametrize(("input_size", "count"), ((448, 6), (224, 4), (160, 6), (96, 1), (96, 2), (96, 3), (96, 30)))
@pytest.mark.parametrize("every_level", (False, True))
def test_proposals_equal_reference(every_level: bool, input_size: int, count: int, kind: str) -> None:
    proposals = PartProposals(count, grid_size=input_size // 32, stride=32, every_level=every_level)
    scores = make_scores(kind, 2 if input_size == 448 else 6, COUNTS[input_size], seed=count)
    levels = np.array([anchor["level"] for anchor in list_anchors(input_size)]) if every_level else None
    assert_proposals(proposals, scores, input_size, levels=levels)


@pytest.mark.parametrize("inclusive", (False, True))
@pytest.mark.parametrize("max_iou", (0.0, 0.1, 0.6))
@pytest.mark.parametrize("every_level", (False, True))
def test_proposals_of_another_overlap(every_level: bool, max_iou: float, inclusive: bool) -> None:
    rule = {"max_iou": max_iou, "inclusive": inclusive}
    proposals = PartProposals(6, grid_size=5, stride=32, every_level=every_level, **rule)
    levels = np.array([anchor["level"] for anchor in list_anchors(160)]) if every_level else None
    assert_proposals(proposals, make_scores("continuous", 8, 240, seed=3), 160, levels=levels, **rule)


@pytest.mark.parametrize("every_level", (False, True))
def test_proposals_of_other_sizes(every_level: bool) -> None:
    """Anchors nearly as large as the picture: few do not overlap, so there is little to take."""
    sizes = (200, 300, 448)
    proposals = PartProposals(6, grid_size=3, stride=32, sizes=sizes, every_level=every_level)
    levels = np.array([anchor["level"] for anchor in list_anchors(96)]) if every_level else None
    assert_proposals(proposals, make_scores("continuous", 20, 87, seed=4), 96, sizes=sizes, levels=levels)


def test_proposals_are_those_of_every_level_unless_told_otherwise() -> None:
    scores, levels = make_scores("first level leads", 4, 1614, seed=5), anchor_levels(14)
    index = {tuple(box): number for number, box in enumerate(list_boxes(448).tolist())}

    def chosen_levels(**settings: bool) -> list[set[int]]:
        boxes, _ = PartProposals(6, grid_size=14, stride=32, **settings)(scores)
        return [{int(levels[index[tuple(box)]]) for box in image} for image in boxes.int().tolist()]

    assert chosen_levels() == [{0, 1, 2}] * 4
    assert chosen_levels(every_level=False) == [{0}] * 4
    best, alike = (PartProposals(6, grid_size=14, stride=32, every_level=every_level) for every_level in (False, True))
    assert torch.equal(alike(scores, best_of_all=True)[0], best(scores)[0])


def test_proposals_do_not_overlap() -> None:
    boxes, _ = PartProposals(6, grid_size=14, stride=32)(make_scores("continuous", 10, 1614, seed=6))
    for image in boxes.numpy():
        for first in range(6):
            for second in range(first):
                assert reference.intersection_over_union(image[first], image[second]) < 0.25


def test_the_last_is_repeated_when_none_remains() -> None:
    proposals = PartProposals(5, grid_size=3, stride=32, sizes=(4480, 4480, 4480), every_level=False)
    scores = make_scores("continuous", 3, 87, seed=7)
    boxes, kept = proposals(scores)
    assert torch.equal(kept, scores.amax(dim=1, keepdim=True).expand(3, 5))
    assert (boxes == boxes[:, :1]).all()


@pytest.mark.parametrize("every_level", (False, True))
def test_only_the_proposed_scores_get_a_gradient(every_level: bool) -> None:
    proposals = PartProposals(6, grid_size=5, stride=32, every_level=every_level)
    scores = make_scores("continuous", 3, 240, seed=8).requires_grad_()
    boxes, kept = proposals(scores)
    assert not boxes.requires_grad
    weights = torch.arange(1.0, 7)
    (kept * weights).sum().backward()
    levels = anchor_levels(5).numpy() if every_level else None
    expected = torch.zeros(3, 240)
    for row in range(3):
        for rank, index in enumerate(propose(scores[row].detach().numpy(), list_boxes(160), 6, levels=levels)):
            expected[row, index] += weights[rank]
    assert torch.equal(scores.grad, expected)


def test_proposals_of_an_image_depend_on_it_alone() -> None:
    proposals = PartProposals(6, grid_size=7, stride=32)
    scores = make_scores("continuous", 5, 426, seed=9)
    together = proposals(scores)
    for row in range(5):
        for got, expected in zip(proposals(scores[row : row + 1]), together, strict=True):
            assert torch.equal(got[0], expected[row])


def test_proposals_leave_nothing_in_a_checkpoint_and_survive_half_precision() -> None:
    proposals = PartProposals(6, grid_size=14, stride=32)
    assert not proposals.state_dict() and not list(proposals.parameters())
    scores = make_scores("continuous", 4, 1614, seed=10)
    expected = proposals(scores)
    cast, half = proposals.bfloat16()(scores), proposals.half()(scores.half())
    assert all(torch.equal(got, wanted) for got, wanted in zip(cast, expected, strict=True))
    assert half[0].dtype == torch.float32 and half[1].dtype == torch.float16
    assert {tuple(box) for box in half[0].reshape(-1, 4).int().tolist()} <= set(map(tuple, list_boxes(448).tolist()))


def test_proposals_make_the_host_wait_nowhere() -> None:
    navigator, proposals = make(Navigator, 8), PartProposals(6, grid_size=5, stride=32)
    coarse_part = make(CoarsePart, 16, 4)
    maps, features = normal(2, 8, 5, 5), normal(2, 16, 5, 5)

    def everything(maps: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        return *proposals(navigator(maps)), *coarse_part(features)

    expected = everything(maps, features)
    with reference.ForbidHostReads():
        everything(maps, features)
    compiled = traced(everything)(maps, features)
    for got, wanted in zip(compiled, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("count", "settings", "words"),
    (
        (0, {}, ("0", "87")),
        (-1, {}, ("-1", "87")),
        (88, {}, ("88", "87")),
        (6, {"sizes": (48, 96)}, ("48, 96", "3")),
        (6, {"sizes": (48, 96, 192, 384)}, ("384", "3")),
        (6, {"sizes": (48, 0, 192)}, ("0", "3")),
        (6, {"sizes": (48, 96, -192)}, ("-192", "3")),
    ),
    ids=str,
)
def test_impossible_proposals_are_refused(count: int, settings: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        PartProposals(count, grid_size=3, stride=32, **settings)
    assert all(word in str(caught.value) for word in words)


def test_all_anchors_may_be_proposed() -> None:
    boxes, scores = PartProposals(87, grid_size=3, stride=32)(make_scores("continuous", 1, 87, seed=11))
    assert boxes.shape == (1, 87, 4) and scores.shape == (1, 87)
