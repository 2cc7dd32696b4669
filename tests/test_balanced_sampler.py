"""Class-balanced batches: what each holds, what an epoch shows, and how processes share them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from datasets import Augmentation, Pictures, collate, read_catalogue
from utils.data.samplers import BalancedSampler

Key = tuple[int, int]
Group = tuple[Key, ...]


def spread(counts: Sequence[int]) -> list[int]:
    """Labels of as many images per class as told, the classes' images far apart; the names of classes have gaps."""
    left = list(counts)
    labels: list[int] = []
    while any(left):
        for number in range(len(left)):
            if left[number]:
                labels.append(3 * number + 1)
                left[number] -= 1
    return labels


# name: (images of each class, batch size, images per class)
CASES: dict[str, tuple[list[int], int, int]] = {
    "equal classes": ([6] * 5, 6, 2),
    "equal classes, odd": ([5] * 6, 8, 2),
    "many small classes": ([2, 3] * 10, 12, 2),
    "groups of four": ([7, 9, 4, 12, 5], 16, 4),
    "classes of one image": ([1, 1, 1, 1, 1, 1, 1], 6, 2),
    "too few images for a group": ([1, 2, 5, 3, 8], 12, 4),
    "as many classes as groups": ([4, 6, 8], 6, 2),
    "one group per batch": ([3, 4, 2], 2, 2),
    "one image per class": ([3, 4, 2, 5], 3, 1),
    "very unequal": ([40, 1, 2, 1, 3], 6, 2),
    "one large class among many": ([30] + [2] * 12, 8, 2),
    "fewer classes than groups": ([6, 9], 8, 2),
    "far fewer classes than groups": ([5, 3, 4], 20, 2),
    "a single class": ([7], 6, 3),
    "batch larger than the data": ([2, 1], 16, 2),
}


def make(case: str, *, seed: int = 0, epoch: int = 0, rank: int = 0, world_size: int = 1) -> BalancedSampler:
    counts, batch_size, images_per_class = CASES[case]
    sampler = BalancedSampler(
        spread(counts),
        batch_size=batch_size,
        images_per_class=images_per_class,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    sampler.set_epoch(epoch)
    return sampler


def cut(keys: Sequence, length: int) -> list[tuple]:
    assert len(keys) % length == 0
    return [tuple(keys[start : start + length]) for start in range(0, len(keys), length)]


def read_batches(sampler: BalancedSampler, case: str, world_size: int = 1) -> list[list[Group]]:
    """The groups of every batch that one process gets."""
    _, batch_size, images_per_class = CASES[case]
    return [cut(batch, images_per_class) for batch in cut(list(sampler), batch_size // world_size)]


@pytest.mark.parametrize("seed", (0, 1, 2))
@pytest.mark.parametrize("case", CASES)
def test_groups_hold_images_of_one_class(case: str, seed: int) -> None:
    counts, _, images_per_class = CASES[case]
    labels = spread(counts)
    sizes = Counter(labels)
    for batch in read_batches(make(case, seed=seed), case):
        for group in batch:
            images = [index for index, _ in group]
            (label,) = {labels[index] for index in images}
            # Every image of too small a class, and each as often as the others.
            assert len(set(images)) == min(images_per_class, sizes[label])
            shares = Counter(images).values()
            assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("seed", (0, 1, 2))
@pytest.mark.parametrize("case", CASES)
def test_batches_hold_different_classes(case: str, seed: int) -> None:
    counts, batch_size, images_per_class = CASES[case]
    labels, groups = spread(counts), batch_size // images_per_class
    for batch in read_batches(make(case, seed=seed), case):
        classes = Counter(labels[group[0][0]] for group in batch)
        assert len(batch) == groups and len(classes) == min(groups, len(counts))
        assert max(classes.values()) - min(classes.values()) <= 1  # fewer classes than groups: all as often


@pytest.mark.parametrize("epoch", (0, 1, 7))
@pytest.mark.parametrize("case", CASES)
def test_an_epoch_shows_every_image(case: str, epoch: int) -> None:
    sampler = make(case, epoch=epoch)
    keys = list(sampler)
    assert {index for index, _ in keys} == set(range(sum(CASES[case][0])))
    assert all(type(index) is int and type(seed) is int and 0 <= seed < 2**63 for index, seed in keys)


@pytest.mark.parametrize("case", CASES)
def test_length(case: str) -> None:
    counts, batch_size, images_per_class = CASES[case]
    lengths = {len(list(make(case, seed=seed, epoch=epoch))) for seed in range(3) for epoch in range(3)}
    assert lengths == {len(make(case))}
    # No longer than all the groups need, or the largest class by itself, which a batch holds once or as often as it can
    rows, groups = [-(-count // images_per_class) for count in counts], batch_size // images_per_class
    once_or_more = max(groups // len(counts), 1)
    shortest = max(-(-sum(rows) // groups), -(-max(rows) // -(-groups // len(counts))))
    longest = max(-(-sum(rows) // groups), -(-max(rows) // once_or_more))
    assert shortest * batch_size <= len(make(case)) <= longest * batch_size


def test_no_image_is_repeated_where_everything_fits() -> None:
    keys = list(make("equal classes"))
    assert sorted(index for index, _ in keys) == list(range(30))


def test_classes_are_repeated_evenly_where_the_others_ran_out() -> None:
    """The large class fills a group of each of the 20 batches, and four small ones share the other 40."""
    labels = spread(CASES["very unequal"][0])
    groups: Counter[int] = Counter()
    for epoch in range(20):
        keys = list(make("very unequal", epoch=epoch))
        assert sorted(index for index, _ in keys if labels[index] == 1) == [i for i in range(47) if labels[i] == 1]
        groups.update(labels[group[0][0]] for group in cut(keys, 2))
    assert groups.pop(1) == 20 * 20
    assert sum(groups.values()) == 20 * 40 and len(groups) == 4
    assert max(groups.values()) < 1.25 * min(groups.values())


def test_small_classes_come_in_all_parts_of_an_epoch() -> None:
    counts = [max(round(300 / (number + 1)), 1) for number in range(100)]  # a long tail
    labels = spread(counts)
    sampler = BalancedSampler(labels, batch_size=12, images_per_class=2, seed=0)
    keys = list(sampler)
    for part in cut(keys[: len(keys) // 4 * 4], len(keys) // 4):
        assert len({labels[index] for index, _ in part}) > 60


def test_thousands_of_classes_have_their_own_images() -> None:
    """10,000 of them, which are sorted once: a look at all labels for each would take minutes of larger data."""
    labels = list(range(10_000)) * 2
    sampler = BalancedSampler(labels, batch_size=2000, images_per_class=2, seed=0)
    assert {index for index, _ in sampler} == set(range(20_000))
    assert sorted(map(tuple, sampler.images)) == [(n, n + 10_000) for n in range(10_000)]


def test_every_pair_of_a_class_may_meet() -> None:
    labels = spread([4] * 3)
    met = set()
    sampler = BalancedSampler(labels, batch_size=4, images_per_class=2, seed=0)
    for epoch in range(40):
        sampler.set_epoch(epoch)
        met |= {tuple(sorted(index for index, _ in group)) for group in cut(list(sampler), 2)}
    assert met == {pair for pair in itertools.combinations(range(12), 2) if labels[pair[0]] == labels[pair[1]]}


def test_every_pair_of_classes_may_meet() -> None:
    labels = spread([2] * 6)
    met = set()
    sampler = BalancedSampler(labels, batch_size=4, images_per_class=2, seed=0)
    for epoch in range(60):
        sampler.set_epoch(epoch)
        met |= {tuple(sorted((labels[batch[0][0]], labels[batch[2][0]]))) for batch in cut(list(sampler), 4)}
    assert met == set(itertools.combinations(sorted(set(labels)), 2))


# ---- randomness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_seed_and_epoch_decide_everything(case: str) -> None:
    seen = [list(make(case, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)]
    assert all(first != second for first, second in itertools.combinations(seen, 2))
    sampler = make(case, seed=1)
    assert list(sampler) == list(sampler) == seen[3]
    sampler.set_epoch(2)
    torch.manual_seed(99)
    assert list(sampler) == seen[5]
    sampler.set_epoch(0)
    assert list(sampler) == seen[3]


@pytest.mark.parametrize("world_size", (1, 2))
@pytest.mark.parametrize("start", (0, 4, 8, 12, 16, 20))
def test_an_epoch_goes_on_where_it_was_left(start: int, world_size: int) -> None:
    """Training that was interrupted gets the pairs it has not seen, and whole epochs after that."""
    for rank in range(world_size):
        sampler = make("groups of four", epoch=1, rank=rank, world_size=world_size)
        whole = list(sampler)
        sampler.set_epoch(1, start)
        assert list(sampler) == list(sampler) == whole[start:]
        assert len(sampler) == len(whole)
        sampler.set_epoch(1, len(whole))
        assert list(sampler) == []
        sampler.set_epoch(1)
        assert list(sampler) == whole


def test_epochs_differ_in_their_images_too() -> None:
    orders = {tuple(index for index, _ in make("equal classes", epoch=epoch)) for epoch in range(6)}
    assert len(orders) == 6


@pytest.mark.parametrize("case", CASES)
def test_no_two_samples_share_a_seed(case: str) -> None:
    """An image that comes again looks different."""
    keys = [key for epoch in range(3) for key in make(case, epoch=epoch)]
    assert len({seed for _, seed in keys}) == len(keys)


# ---- processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "world_size"),
    [
        (case, world_size)
        for case, (_, batch_size, images_per_class) in CASES.items()
        for world_size in (2, 3, 4, 5)
        if batch_size % (images_per_class * world_size) == 0
    ],
)
def test_processes_share_the_batches_of_one(case: str, world_size: int) -> None:
    whole = read_batches(make(case, epoch=3), case)
    samplers = [make(case, epoch=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [read_batches(sampler, case, world_size) for sampler in samplers]
    assert {len(list(sampler)) for sampler in samplers} == {len(sampler) for sampler in samplers}
    assert len(samplers[0]) * world_size == len(make(case))
    for number, batch in enumerate(whole):
        together = [group for share in shares for group in share[number]]
        assert sorted(together) == sorted(batch)
        assert len(set(together)) == len(together)


def test_a_process_gets_different_classes() -> None:
    labels = spread(CASES["many small classes"][0])
    for rank in range(3):
        share = read_batches(make("many small classes", rank=rank, world_size=3), "many small classes", 3)
        assert all(len({labels[group[0][0]] for group in batch}) == 2 for batch in share)


# ---- refused arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    (
        ({"batch_size": 7}, ("batch_size", "7", "2 x 1")),
        ({"batch_size": 1}, ("batch_size", "1", "2 x 1")),
        ({"images_per_class": 3}, ("batch_size", "8", "3 x 1")),
        ({"images_per_class": 16}, ("batch_size", "8", "16 x 1")),
        ({"world_size": 3}, ("batch_size", "8", "2 x 3")),
        ({"world_size": 8}, ("batch_size", "8", "2 x 8")),
        ({"rank": 1}, ("rank", "1")),
        ({"rank": -1}, ("rank", "-1")),
        ({"rank": 2, "world_size": 2}, ("rank", "2", "0..1")),
        ({"world_size": 0}, ("rank", "0")),
    ),
    ids=str,
)
def test_impossible_arguments_are_refused(settings: dict[str, int], words: tuple[str, ...]) -> None:
    arguments = {"batch_size": 8, "images_per_class": 2, "seed": 0, **settings}
    with pytest.raises(ValueError) as caught:
        BalancedSampler(spread([4, 4, 4, 4]), **arguments)
    assert all(word in str(caught.value) for word in words)


# ---- in a loader --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", (0, 2))
def test_in_a_loader(picture_tree: Path, workers: int) -> None:
    entries = read_catalogue("folder", picture_tree, test_fraction=0.25).train
    labels = [entry.label for entry in entries]
    assert Counter(labels) == {0: 6, 1: 6, 2: 6}
    pictures = Pictures(entries, image_size=32, augment=Augmentation())
    sampler = BalancedSampler(labels, batch_size=6, images_per_class=3, seed=5)
    sampler.set_epoch(1)
    loader = DataLoader(pictures, batch_size=6, sampler=sampler, num_workers=workers, collate_fn=collate)
    batches, keys = list(loader), list(sampler)
    assert len(batches) == len(loader) == 3 and len(keys) == len(sampler) == 18
    for number, batch in enumerate(batches):
        expected = [pictures[key] for key in keys[6 * number : 6 * number + 6]]
        assert torch.equal(batch.images, torch.stack([sample.image for sample in expected]))
        assert batch.paths == [sample.path for sample in expected]
        assert sorted(Counter(batch.labels.tolist()).values()) == [3, 3]
    assert len({path for batch in batches for path in batch.paths}) == 18


def test_a_repeated_picture_looks_different(picture_tree: Path) -> None:
    entries = read_catalogue("folder", picture_tree, test_fraction=0.25).train[:1]
    sampler = BalancedSampler([0], batch_size=4, images_per_class=4, seed=0)
    keys = list(sampler)
    assert [index for index, _ in keys] == [0] * 4
    pictures = Pictures(entries, image_size=32, augment=Augmentation(flip=0.5, brightness=0.5, contrast=0.5))
    drawn = [pictures[key].augmentation for key in keys]
    assert all(not torch.equal(first, second) for first, second in itertools.combinations(drawn, 2))
