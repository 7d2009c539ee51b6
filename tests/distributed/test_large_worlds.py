"""One rank of a world of 64 or 1,024, its peers made believe: what it starts, holds and reads is its share."""

import math
import os
from itertools import pairwise

import numpy as np
import pytest

from imm_scale.data import sample_order
from imm_scale.data.sample_order import Layout
from tests import ranks
from tests.unit.data.order import batch_indices

PARTICLES, BATCH = 4, 4096


def _child(manifest: str, rank: int, world_size: int) -> int:
    """Starts an engine at every stage as that rank and takes a step; asserts what it holds. The number of stages."""
    import deepspeed.runtime.zero.utils as peers
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from imm_scale import build
    from imm_scale import config as configs
    from imm_scale.data.loader import Batch
    from imm_scale.data.manifest import Manifest
    from imm_scale.parallel.deepspeed_engine import Engine
    from imm_scale.parallel.ema import ShardedEma
    from tests.conftest import TINY

    # Stage 3 compares lists with rank 0's, which nobody sends here.
    peers.assert_lst_len_same_as_other_ranks = lambda values: None
    peers.get_lst_from_rank0 = lambda values: values
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    layout = Layout(BATCH, PARTICLES, world_size, 64)
    samples = layout.samples_per_micro_batch
    x = 0.5 * torch.randn(samples, 1, 8, 8)
    label, ordinal = torch.zeros(samples, dtype=torch.int64), torch.arange(samples) + rank * samples
    batch = Batch(0, x, label, ordinal, torch.ones(layout.slots_per_micro_batch))
    for stage in range(4):
        config = configs.load([], [*TINY, f"data.manifest={manifest}", f"zero.stage={stage}"]).config
        spec = build.model_spec(config, Manifest.load(manifest))
        engine = Engine(config, build.net(spec), build.method(spec), layout)
        sizes = [parameter.numel() for parameter in build.net(spec).parameters()]
        shards = engine.master_slices()
        held = sum(shard.numel for shard in shards)
        assert held == _share(sizes, stage, rank, world_size), f"stage {stage}: {held}"
        average = ShardedEma(shards, [0.99]).averages[0.99]
        assert sum(tensor.numel() for tensor in average) == held
        for shard in shards:
            assert shard.offset >= 0 and shard.offset + shard.numel <= math.prod(shard.shape)
            assert all(len(tensor) == shard.numel for tensor in shard.states.values())
        engine.step([batch] * layout.accumulation, 1e-3)
        engine.close()
    return stage + 1


def _share(sizes: list[int], stage: int, rank: int, world_size: int) -> int:
    """Elements a rank keeps, from how ZeRO cuts, counted anew."""
    if stage == 0:  # every parameter cut evenly
        return sum((rank + 1) * size // world_size - rank * size // world_size for size in sizes)
    if stage == 3:  # every parameter cut into equal pieces, the last ones padded
        pieces = [-(-size // world_size) for size in sizes]
        return sum(max(0, min(piece, size - rank * piece)) for size, piece in zip(sizes, pieces, strict=True))
    # All parameters in one row, cut into pieces that are even because NCCL wants to start at 4 bytes of 16-bit data.
    piece = -(-sum(sizes) // (2 * world_size)) * 2
    return max(0, min(piece, sum(sizes) - rank * piece))


@pytest.mark.parametrize(("rank", "world_size"), [(5, 64), (0, 1024), (1023, 1024)])
def test_a_rank_of_a_large_world_holds_its_share(rank, world_size, digits):
    assert ranks.run(_child, 1, digits, rank, world_size) == [4]


@pytest.mark.parametrize(("world_size", "groups"), [(64, 1024), (1024, 1024), (1024, 1500), (1000, 1024)])
def test_groups_and_positions_are_shared_out_without_gap_or_overlap(world_size, groups):
    layout = Layout(groups * PARTICLES, PARTICLES, world_size, 16)
    ranges = [sample_order.rank_groups(groups, rank, world_size) for rank in range(world_size)]
    assert [group for span in ranges for group in span] == list(range(groups))
    assert {len(span) for span in ranges} <= {groups // world_size, -(-groups // world_size)}
    assert max(len(span) for span in ranges) <= layout.slots
    # Position p of step k takes order[p L + k]: an epoch of all ranks visits L B samples once each.
    shards = [7001, 5003, 9000]
    order = sample_order.epoch_order(shards, 32, seed=1, epoch=2)
    steps = sample_order.steps_per_epoch(layout.global_batch_size, sum(shards))
    for step in (0, steps - 1):
        taken = [
            batch_indices(order, layout.global_batch_size, step, np.arange(span.start * 4, span.stop * 4))
            for span in ranges
        ]
        expected = order.reshape(-1)[: steps * layout.global_batch_size].reshape(-1, steps)[:, step]
        np.testing.assert_array_equal(np.concatenate(taken), expected)
    assert all(a.stop == b.start for a, b in pairwise(ranges))
