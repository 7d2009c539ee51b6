"""Moving averages on slices: closed forms, several at once, and decays that count in images."""

import pytest
import torch

from imm_scale.parallel.ema import ShardedEma, state_name
from imm_scale.parallel.param_slice import ParamSlice


def _shards() -> list[ParamSlice]:
    torch.manual_seed(0)
    return [ParamSlice(name, (4, 6), offset, {"weight": torch.randn(12)}) for name, offset in (("a", 0), ("b", 12))]


@pytest.mark.parametrize("power", [1.0, 0.25, 3.0])
def test_n_updates_towards_one_weight_leave_decay_to_the_n_of_the_old(power):
    shards = _shards()
    before = [shard.states["weight"].clone() for shard in shards]
    ema = ShardedEma(shards, [0.9, 0.99], power)
    for shard in shards:
        shard.states["weight"].add_(1.0)
    for _ in range(8):
        ema.update()
    for decay, averages in ema.averages.items():
        for average, old in zip(averages, before, strict=True):
            # old + (1 - d^n): eight fp32 lerps of values of order 1.
            torch.testing.assert_close(average, old + 1.0 - decay ** (8 * power), rtol=1e-5, atol=1e-6)
    assert set(ema.states(1)) == {state_name(0.9), state_name(0.99)}


def test_restart_forgets_and_a_rank_without_slices_has_nothing_to_do():
    shards = _shards()
    ema = ShardedEma(shards, [0.5])
    shards[0].states["weight"].zero_()
    ema.restart()
    assert torch.equal(ema.averages[0.5][0], torch.zeros(12))
    empty = ShardedEma([], [0.5])
    empty.update()
    assert empty.averages == {0.5: []}
