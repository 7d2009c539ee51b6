"""What is held out: exactly so many samples, by the seed alone, and nothing else about the order changes."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from imm_scale.data import sample_order
from imm_scale.data.dataset import Dataset
from imm_scale.data.loader import Loader
from imm_scale.data.sample_order import Layout
from imm_scale.errors import UserError

SHARDS = st.lists(st.integers(1, 60), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(SHARDS, st.integers(1, 12), st.integers(0, 3), st.floats(0, 0.9))
def test_exactly_so_many_in_whole_blocks_but_for_one(shards, block, seed, share):
    assume(round(sum(shards) * share) < sum(shards))  # one must be left
    held = sample_order.held_out(shards, block, seed, share)
    assert len(held) == len(np.unique(held)) == round(sum(shards) * share)
    table = sample_order.block_table(shards, block)
    touched, counts = np.unique(table.block_of(held), return_counts=True)
    assert (counts < table.size[touched]).sum() <= 1


@settings(max_examples=60, deadline=None)
@given(SHARDS, st.integers(1, 12), st.integers(0, 3), st.integers(0, 40))
def test_the_rest_keeps_its_order(shards, block, epoch, count):
    count = min(count, sum(shards) - 1)
    held = sample_order.held_out(shards, block, 5, float(count) if count > 1 else 0.0)
    whole = sample_order.epoch_order(shards, block, 5, epoch)
    rest = sample_order.epoch_order(shards, block, 5, epoch, held)
    gone = set(held.tolist())
    assert rest.tolist() == [index for index in whole.tolist() if index not in gone]


def test_a_share_and_its_count_are_the_same_and_the_seed_decides():
    held = [
        sample_order.held_out([100, 60], 8, seed, holdout).tolist()
        for seed, holdout in ((0, 0.25), (0, 40.0), (1, 40.0))
    ]
    assert held[0] == held[1] != held[2]
    assert sample_order.held_out([100], 8, 0, 0.0).tolist() == []


def test_holding_out_everything_is_refused():
    with pytest.raises(UserError, match="leaves none of the 100 samples"):
        sample_order.held_out([60, 40], 8, 0, 100.0)


def test_the_loaders_of_all_ranks_never_yield_a_held_out_sample(digits):
    dataset = Dataset(digits)
    held = sample_order.held_out(dataset.shard_samples, 32, 0, 300.0)
    rest = np.setdiff1d(np.arange(len(dataset)), held)
    # The fp16 pixels of a digit are as good as its name: few are alike, and those are left out.
    trained = {dataset.read(i, i + 1).tobytes() for i in rest.tolist()}
    never = {dataset.read(i, i + 1).tobytes() for i in held.tolist()} - trained
    assert len(never) > 250
    steps = (len(dataset) - 300) // 64
    samples = []
    for rank in range(3):
        with Loader(digits, Layout(64, 4, 3, 64), rank, 0, holdout=300.0) as loader:
            codec = loader.manifest.codec
            for _ in range(steps + 2):  # over the seam of two epochs
                batch = next(loader)
                x = batch.x[: int(batch.weight.sum()) * 4] / 0.5 * codec.std[0] + codec.mean[0]
                samples += [one.tobytes() for one in x.to(torch.float16).numpy()]
    assert len(samples) == 64 * (steps + 2)
    assert all(one in trained for one in samples), "the way back to the stored bytes is exact"
    assert not never.intersection(samples)


def test_gather_reads_what_read_reads(digits):
    dataset = Dataset(digits)
    index = np.array([0, 1, 2, 7, 63, 64, 65, 1500, 1796])
    expected = np.stack([dataset.read(i, i + 1)[0] for i in index])
    np.testing.assert_array_equal(dataset.gather(index), expected)
