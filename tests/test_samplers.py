"""In which order training sees the pictures; class-balanced batches are in test_balanced_sampler.py."""

from __future__ import annotations

import pytest

from utils.data.samplers import ShuffledSampler


def test_sampler_order() -> None:
    sampler = ShuffledSampler(100, seed=3)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert sorted(index for index, _ in epochs[-1]) == list(range(100)) and len(sampler) == 100
    resumed = ShuffledSampler(100, seed=3)
    resumed.set_epoch(2)
    assert list(resumed) == epochs[2]
    seeds = [seed for epoch in epochs for _, seed in epoch] + [seed for _, seed in ShuffledSampler(100, seed=4)]
    assert len(set(seeds)) == 400 and all(0 <= seed < 2**63 for seed in seeds)
    assert epochs[0] != epochs[1]
    # Neither seeds and epochs that add up to the same, nor neighbours, share an order.
    other = ShuffledSampler(100, seed=4)
    assert list(other) != epochs[1]


@pytest.mark.parametrize(("length", "world_size"), [(12, 4), (10, 4), (1, 3), (2, 5), (7, 1), (0, 2)])
def test_sampler_shards(length: int, world_size: int) -> None:
    shards = [list(ShuffledSampler(length, seed=1, rank=rank, world_size=world_size)) for rank in range(world_size)]
    samplers = [ShuffledSampler(length, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(shard) for shard in shards} == {len(sampler) for sampler in samplers} == {-(-length // world_size)}
    whole = list(ShuffledSampler(length, seed=1))
    assert set().union(*shards) == set(whole)
    # Dealt out in turn: the batch of all ranks together is the batch of one.
    assert [key for step in zip(*shards, strict=True) for key in step][:length] == whole


def test_sampler_refuses_a_rank_outside_the_world() -> None:
    with pytest.raises(ValueError, match=r"0\.\.1 for a world of 2, got 2"):
        ShuffledSampler(4, seed=0, rank=2, world_size=2)
