"""In which order training sees the pictures, and the random seed of each sample: all of it decided by (seed, epoch)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from torch.utils.data import Sampler

from utils.errors import UserError


class ShuffledSampler(Sampler[tuple[int, int]]):
    """Shuffled pairs (index, seed for the sample), which depend on (seed, epoch) alone; one of `world_size` shards.

    So workers and checkpoints keep no random state: whoever sets the epoch gets that epoch's pictures. All shards have
    the same length, for which the order wraps around at its end.
    """

    def __init__(self, length: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise UserError(f"rank must be in 0..{world_size - 1} for a world of {world_size}, got {rank}")
        self.length = length
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and how many pairs of it to leave out, as they were trained on before."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Return the number of pairs of a whole epoch."""
        return math.ceil(self.length / self.world_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(self.length)
        seeds = generator.integers(2**63, size=self.length)
        shard = np.resize(order, len(self) * self.world_size)[self.rank :: self.world_size]
        return islice(zip(shard.tolist(), seeds[shard].tolist(), strict=True), self.start, None)


class BalancedSampler(Sampler[tuple[int, int]]):
    """Pairs (index, seed for the sample) in class-balanced batches: groups of `images_per_class` images of one class.

    For losses that compare images: a batch holds batch_size / images_per_class different classes (some of them twice
    where there are fewer classes). An epoch shows every image at least once, so that large classes come more often than
    small ones, unless all classes fit into a batch: then they come equally often. Images are repeated where a class
    cannot fill its groups, and classes where the others ran out; a group holds an image twice only if its class has too
    few.

    As with `ShuffledSampler`, all depends on (seed, epoch) alone, and each of `world_size` processes gets its shard, a
    part of every batch. `batch_size` is that of all processes together; a loader in one of them has to take
    batch_size / world_size pairs at a time. Raises UserError where groups do not fill the shards of a batch equally.
    """

    def __init__(
        self,
        labels: Sequence[int],
        *,
        batch_size: int,
        images_per_class: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UserError(f"rank must be in 0..{world_size - 1} for a world of {world_size}, got {rank}")
        if images_per_class < 1 or batch_size < 1 or batch_size % (images_per_class * world_size):
            raise UserError(
                f"batch_size is {batch_size}; expected a multiple of images_per_class x processes, "
                f"{images_per_class} x {world_size}, all of at least 1"
            )
        if not len(labels):
            raise UserError("there are no labels; expected one for each image")
        self.labels, counts = np.unique(labels, return_counts=True)
        self.images = np.split(np.argsort(labels, kind="stable"), counts.cumsum()[:-1])  # of each class, in their order
        self.images_per_class = images_per_class
        self.groups_per_batch = batch_size // images_per_class
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch, self.start = 0, 0
        deal = self._deal(np.random.default_rng(0))
        self.batches = len(deal)  # how many does not depend on who comes first
        # of each class, in their order, in an epoch; which of them are repeated differs a little from one to the next
        self.shown = np.bincount(deal.ravel(), minlength=len(self.images)) * images_per_class

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and how many pairs of it to leave out, as they were trained on before."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Return the number of pairs of a whole epoch."""
        return self.batches * self.groups_per_batch * self.images_per_class // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        deal = self._deal(generator)
        counts = np.bincount(deal.ravel(), minlength=len(self.images))
        groups = [self._groups(*of_class, generator) for of_class in zip(self.images, counts, strict=True)]
        order = np.array([next(groups[label]) for label in deal.ravel()])  # [batches * groups, images_per_class]
        seeds = generator.integers(2**63, size=order.shape)
        # A process gets neighbouring groups of each batch: different classes, also where there are few.
        parts = (self.batches, self.world_size, -1)
        order, seeds = (values.reshape(parts)[:, self.rank].ravel().tolist() for values in (order, seeds))
        return islice(zip(order, seeds, strict=True), self.start, None)

    def _deal(self, generator: np.random.Generator) -> np.ndarray:
        """Return [batches, groups per batch] classes, batches in any order.

        They are dealt one after the other, to each the classes that have most groups left: the last ones would hold
        all the small classes.
        """
        left = np.array([-(-len(images) // self.images_per_class) for images in self.images])
        batches = []
        while left.any():
            batch = np.resize(self._most_left(left, generator), self.groups_per_batch)
            left = np.maximum(left - np.bincount(batch, minlength=len(left)), 0)
            batches.append(batch)
        return generator.permutation(np.array(batches))

    def _most_left(self, left: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return the classes with most groups `left`, as many as a batch can hold: equal ones at random."""
        keys = generator.random(len(left)) - left
        count = min(self.groups_per_batch, len(left))
        classes = np.argpartition(keys, count - 1)[:count]  # of thousands, sorting all would take long
        return classes[keys[classes].argsort()]

    def _groups(self, images: np.ndarray, count: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """Return groups [images_per_class] of a class: all of its images, shuffled, as often as `count` groups need."""
        groups: list[np.ndarray] = []
        while len(groups) < count:
            shuffled = generator.permutation(images)
            rows = -(-len(images) // self.images_per_class)
            groups += list(np.resize(shuffled, (rows, self.images_per_class)))
        return iter(groups)
