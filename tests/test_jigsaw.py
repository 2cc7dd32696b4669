"""Pictures cut into blocks and shuffled, against slices put together one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations as orders

import pytest
import reference
import torch
from torch import Tensor
from tracing import traced

from networks.jigsaw import cyclic_permutations, exchange_with_corner, permute_blocks, random_permutations

CPU = torch.device("cpu")
PICTURES = (  # height, width, blocks along a side
    (8, 8, 1),
    (8, 8, 2),
    (9, 9, 3),
    (7, 7, 7),
    (32, 32, 4),
    (6, 14, 2),
    (15, 5, 5),
    (11, 11, 2),
    (13, 17, 3),
    (17, 13, 4),
    (5, 9, 5),
)


def pictures(batch: int, height: int, width: int, *, seed: int = 0, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def shuffled_orders(batch: int, count: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(count, generator=generator) for _ in range(batch)])


def permuted_one_by_one(images: Tensor, permutations: Tensor, blocks: int) -> Tensor:
    """Image by image: block after block copied from where its number says, counted row by row."""
    height, width = images.shape[2] // blocks, images.shape[3] // blocks
    result = torch.empty(*images.shape[:2], blocks * height, blocks * width, dtype=images.dtype)
    for image, permutation, target in zip(images, permutations.tolist(), result, strict=True):
        for place, source in enumerate(permutation):
            row, column = divmod(source, blocks)
            to_row, to_column = divmod(place, blocks)
            target[:, to_row * height : (to_row + 1) * height, to_column * width : (to_column + 1) * width] = image[
                :, row * height : (row + 1) * height, column * width : (column + 1) * width
            ]
    return result


# ---- rearranging --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "blocks"), PICTURES)
def test_equals_one_by_one(height: int, width: int, blocks: int) -> None:
    images, permutations = pictures(5, height, width), shuffled_orders(5, blocks**2, seed=blocks)
    result = permute_blocks(images, permutations, blocks)
    assert result.shape == (5, 3, height - height % blocks, width - width % blocks)
    assert torch.equal(result, permuted_one_by_one(images, permutations, blocks))


def test_by_hand() -> None:
    image = torch.tensor([[0.0, 0, 1, 1, 9], [0, 0, 1, 1, 9], [2, 2, 3, 3, 9], [2, 2, 3, 3, 9], [9, 9, 9, 9, 9]])
    images = image.expand(2, 1, 5, 5)
    result = permute_blocks(images, torch.tensor([[3, 0, 1, 2], [1, 0, 3, 2]]), 2)
    assert result[0, 0].tolist() == [[3, 3, 0, 0], [3, 3, 0, 0], [1, 1, 2, 2], [1, 1, 2, 2]]
    assert result[1, 0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [3, 3, 2, 2], [3, 3, 2, 2]]


def test_pixels_keep_their_places_within_a_block() -> None:
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    images = torch.stack([rows, columns])[None]
    result = permute_blocks(images, torch.tensor([[1, 3, 0, 2]]), 2)
    assert result[0, 0, :, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert result[0, 0, :, 4].tolist() == [3, 4, 5, 3, 4, 5]
    assert result[0, 1, 0].tolist() == [4, 5, 6, 7, 4, 5, 6, 7]
    assert result[0, 1, 3].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize(("height", "width"), ((8, 8), (5, 9), (1, 1)))
def test_one_block_is_the_image(height: int, width: int) -> None:
    images = pictures(3, height, width)
    permutations = random_permutations(3, 1, CPU)
    assert permutations.tolist() == [[0], [0], [0]]
    assert torch.equal(permute_blocks(images, permutations, 1), images)


@pytest.mark.parametrize(("height", "width", "blocks"), PICTURES)
def test_own_order_only_crops_and_the_inverse_restores(height: int, width: int, blocks: int) -> None:
    images = pictures(4, height, width, seed=1)
    whole = images[:, :, : height - height % blocks, : width - width % blocks]
    own = torch.arange(blocks**2).expand(4, -1)
    assert torch.equal(permute_blocks(images, own, blocks), whole)
    permutations = random_permutations(4, blocks**2, CPU)
    inverse = torch.tensor([[one.index(block) for block in range(blocks**2)] for one in permutations.tolist()])
    assert torch.equal(permute_blocks(permute_blocks(images, permutations, blocks), inverse, blocks), whole)


def test_every_image_has_its_own_order() -> None:
    images = pictures(1, 12, 12).expand(6, -1, -1, -1)
    permutations = shuffled_orders(6, 9, seed=3)
    together = permute_blocks(images, permutations, 3)
    for index in range(6):
        alone = permute_blocks(images[index : index + 1], permutations[index : index + 1], 3)
        assert torch.equal(together[index : index + 1], alone)
    assert len(together.flatten(1).unique(dim=0)) == 6


def test_one_order_for_the_whole_batch() -> None:
    images, permutation = pictures(4, 11, 13), shuffled_orders(1, 9, seed=4)
    expected = permuted_one_by_one(images, permutation.repeat(4, 1), 3)
    assert torch.equal(permute_blocks(images, permutation, 3), expected)
    assert torch.equal(permute_blocks(images, permutation.expand(4, -1), 3), expected)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.uint8), ids=str)
def test_types_channels_and_memory_orders(dtype: torch.dtype) -> None:
    images = (pictures(3, 10, 7, channels=5) * 20 + 100).to(dtype)
    permutations = shuffled_orders(3, 4)
    expected = permuted_one_by_one(images, permutations, 2)
    for given in (images, images.contiguous(memory_format=torch.channels_last), images.mT.contiguous().mT):
        copy = given.clone()
        result = permute_blocks(given, permutations, 2)
        assert result.dtype == dtype
        assert torch.equal(result, expected)
        assert torch.equal(given, copy)


def test_gradient_goes_back_to_where_the_pixels_came_from() -> None:
    images, permutations = pictures(2, 7, 7).requires_grad_(), shuffled_orders(2, 9, seed=5)
    result = permute_blocks(images, permutations, 3)
    upstream = pictures(2, 6, 6, seed=6)
    result.backward(upstream)
    inverse = permutations.argsort(dim=1)
    assert torch.equal(images.grad[:, :, :6, :6], permuted_one_by_one(upstream, inverse, 3))
    assert not images.grad[:, :, 6:].any()
    assert not images.grad[:, :, :, 6:].any()


# ---- random orders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", (1, 2, 4, 9, 16, 196))
@pytest.mark.parametrize("batch", (1, 7))
def test_random_orders_hold_every_block_once(batch: int, count: int) -> None:
    permutations = random_permutations(batch, count, CPU)
    assert permutations.shape == (batch, count)
    assert permutations.dtype == torch.int64
    assert permutations.device == CPU
    assert [sorted(one) for one in permutations.tolist()] == [list(range(count))] * batch


def surprise(observed: list[int], expected: float) -> float:
    """Pearson's statistic in standard deviations above what chance makes of it, for many equally likely outcomes."""
    statistic = sum((count - expected) ** 2 / expected for count in observed)
    degrees = len(observed) - 1
    return (statistic - degrees) / math.sqrt(2 * degrees)


def test_all_orders_of_four_blocks_are_equally_likely() -> None:
    draws = 24_000
    torch.manual_seed(0)
    drawn = [tuple(one) for one in random_permutations(draws, 4, CPU).tolist()]
    everything = list(orders(range(4)))
    counts = dict.fromkeys(everything, 0)
    for one in drawn:
        counts[one] += 1
    assert len(counts) == 24
    assert min(counts.values()) > 0
    assert abs(surprise(list(counts.values()), draws / 24)) < 4
    # An image's order says nothing about its neighbour's: all pairs are equally likely too.
    pairs = dict.fromkeys(((first, second) for first in everything for second in everything), 0)
    for pair in zip(drawn[::2], drawn[1::2], strict=True):
        pairs[pair] += 1
    assert abs(surprise(list(pairs.values()), draws / 2 / 576)) < 4


def test_every_block_goes_everywhere_equally_often() -> None:
    draws, count = 9000, 9
    torch.manual_seed(1)
    permutations = random_permutations(draws, count, CPU)
    for place in range(count):
        observed = [int((permutations[:, place] == block).sum()) for block in range(count)]
        assert abs(surprise(observed, draws / count)) < 5, place


def test_orders_differ_between_images_and_calls_and_follow_the_seed() -> None:
    torch.manual_seed(2)
    first, second = random_permutations(8, 16, CPU), random_permutations(8, 16, CPU)
    assert len(torch.cat([first, second]).unique(dim=0)) == 16
    torch.manual_seed(2)
    assert torch.equal(random_permutations(8, 16, CPU), first)
    torch.manual_seed(3)
    assert not torch.equal(random_permutations(8, 16, CPU), first)


# ---- random cycles ------------------------------------------------------------------------------------------------


def exchanged_one_by_one(visits: list[int], count: int) -> list[int]:
    """PMG's jigsaw: every place visited changes its block with the block at the top left corner."""
    blocks = list(range(count))
    for place in visits:
        blocks[0], blocks[place] = blocks[place], blocks[0]
    return blocks


def cycle_through_first(permutation: list[int]) -> list[int]:
    """The blocks met on the way from block 0 back to it."""
    met = [0]
    while permutation[met[-1]] != 0:
        met.append(permutation[met[-1]])
    return met


@pytest.mark.parametrize("count", (2, 3, 4, 5))
def test_exchanges_equal_swaps_one_by_one(count: int) -> None:
    visits = list(orders(range(1, count)))
    result = exchange_with_corner(torch.tensor(visits)).tolist()
    assert result == [exchanged_one_by_one(list(one), count) for one in visits]
    assert len(set(map(tuple, result))) == math.factorial(count - 1)


@pytest.mark.parametrize("blocks", (2, 4, 8))
def test_exchanges_equal_published_jigsaws(blocks: int) -> None:
    """The corner is visited, too, at some time: it changes its block with itself."""
    places = shuffled_orders(3, blocks**2, seed=blocks)
    images = pictures(3, 8 * blocks, 8 * blocks)
    without_corner = places[places != 0].reshape(3, -1)
    result = permute_blocks(images, exchange_with_corner(without_corner), blocks)
    swapped = images.clone()
    for image, visits in zip(swapped, places.tolist(), strict=True):
        for place in visits:
            y, x = (8 * number for number in divmod(place, blocks))
            corner = image[:, :8, :8].clone()
            image[:, :8, :8] = image[:, y : y + 8, x : x + 8].clone()
            image[:, y : y + 8, x : x + 8] = corner
    assert torch.equal(result, swapped)


@pytest.mark.parametrize("count", (2, 4, 9, 16, 64))
@pytest.mark.parametrize("batch", (1, 7))
def test_a_random_cycle_goes_through_all_blocks_and_moves_each(batch: int, count: int) -> None:
    torch.manual_seed(count)
    permutations = cyclic_permutations(batch, count, CPU)
    assert permutations.shape == (batch, count)
    assert permutations.dtype == torch.int64
    assert permutations.device == CPU
    for one in permutations.tolist():
        assert sorted(cycle_through_first(one)) == list(range(count))
        assert all(block != place for place, block in enumerate(one))


def test_a_cycle_through_one_block_leaves_it() -> None:
    assert cyclic_permutations(3, 1, CPU).tolist() == [[0], [0], [0]]


@pytest.mark.parametrize("count", (2, 3, 4, 5))
def test_all_cycles_are_equally_likely(count: int) -> None:
    draws, cycles = 12_000, math.factorial(count - 1)
    torch.manual_seed(0)
    drawn = [tuple(one) for one in cyclic_permutations(draws, count, CPU).tolist()]
    counts = {one: drawn.count(one) for one in set(drawn)}
    assert len(counts) == cycles
    assert cycles == 1 or abs(surprise(list(counts.values()), draws / cycles)) < 4
    # An image's order says nothing about its neighbour's: all pairs are equally likely too.
    pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
    counts = {one: pairs.count(one) for one in set(pairs)}
    assert len(counts) == cycles**2
    assert cycles == 1 or abs(surprise(list(counts.values()), draws / 2 / cycles**2)) < 4


def test_cycles_follow_the_seed() -> None:
    torch.manual_seed(2)
    first, second = cyclic_permutations(8, 16, CPU), cyclic_permutations(8, 16, CPU)
    assert len(torch.cat([first, second]).unique(dim=0)) == 16
    torch.manual_seed(2)
    assert torch.equal(cyclic_permutations(8, 16, CPU), first)


# ---- tracing ------------------------------------------------------------------------------------------------------


def shuffle(images: Tensor, blocks: int) -> Tensor:
    return permute_blocks(images, random_permutations(len(images), blocks**2, images.device), blocks)


def shuffle_in_a_cycle(images: Tensor, blocks: int) -> Tensor:
    return permute_blocks(images, cyclic_permutations(len(images), blocks**2, images.device), blocks)


@pytest.mark.parametrize("blocks", (1, 2, 3))
@pytest.mark.parametrize("function", (shuffle, shuffle_in_a_cycle))
def test_no_host_synchronisation_and_no_graph_break(function: Callable[[Tensor, int], Tensor], blocks: int) -> None:
    images = pictures(4, 11, 14)
    torch.manual_seed(4)
    expected = function(images, blocks)
    torch.manual_seed(4)
    with reference.ForbidHostReads():
        result = function(images, blocks)
    assert torch.equal(result, expected)
    compiled = traced(function)
    torch.manual_seed(4)
    assert torch.equal(compiled(images, blocks), expected)
