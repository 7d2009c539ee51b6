"""Bytes that a ZeRO-3 step sends: two gathers of the parameters and one reduce-scatter, and nothing for IMM's loss."""

import pytest
import torch
import torch.distributed as dist

from benchmarks import traffic
from tests import ranks
from tests.conftest import ANY_METHOD
from tests.distributed.engines import opened

NET = ("model.width=64", "model.depth=8", "model.heads=2", "zero.stage=3")


def _traffic(manifest: str, naive: bool, more: list[str]) -> dict[str, float]:
    """Bytes of one step over bytes of all parameters, by kind of collective."""
    from imm_scale.models.base import Backbone
    from imm_scale.models.dit import DiT

    counts = traffic.listen()
    if naive:
        DiT.pair = Backbone.pair  # one branch through all blocks, then the other
    with opened(*ANY_METHOD, *NET, f"data.manifest={manifest}", *more) as (_, engine, steps):
        for _ in range(3):  # DeepSpeed learns the order of modules in the first steps
            engine.step(next(steps), 1e-3)
        counts.clear()
        engine.step(next(steps), 1e-3)
        total = sum(4 * shard.numel for shard in engine.master_slices())
    whole = torch.tensor(float(total))
    sent = dict(counts)
    dist.all_reduce(whole)
    return {kind: sent.get(kind, 0) / float(whole) for kind in ("gather", "scatter", "other")}


@pytest.fixture(scope="module")
def both_branches_at_once(digits: str) -> dict[str, float]:
    return ranks.run(_traffic, 2, digits, False, [])[0]


def test_a_step_gathers_twice_and_scatters_once(both_branches_at_once):
    volume = both_branches_at_once
    print("block by block:", volume)
    assert volume["gather"] + volume["scatter"] <= 1.02 * 3, volume
    # Less than twice: the last block is still there when the backward pass begins with it.
    assert volume["scatter"] == pytest.approx(1.0, abs=0.02) and volume["gather"] > 1.5
    assert 0.0 < volume["other"] < 1e-4, "the gradient norm and the overflow flag are a few bytes"


def test_one_branch_after_the_other_gathers_three_times(digits, both_branches_at_once):
    naive = ranks.run(_traffic, 2, digits, True, [])[0]
    print("one branch after the other:", naive)
    ratio = sum(naive.values()) / sum(both_branches_at_once.values())
    assert ratio == pytest.approx(4 / 3, abs=0.05), (naive, both_branches_at_once)


def test_the_loss_of_imm_sends_nothing(digits, both_branches_at_once):
    plain = ["method.name=flow_matching"]
    flow_matching = ranks.run(_traffic, 2, digits, False, plain)[0]
    print("flow matching:", flow_matching)
    assert both_branches_at_once["other"] == pytest.approx(flow_matching["other"], rel=0.01)
    assert sum(both_branches_at_once.values()) <= 1.02 * sum(flow_matching.values())


def test_a_tangent_comes_with_the_gathers_of_its_value(digits, both_branches_at_once):
    """MeanFlow's whole step sends what IMM's does: a block's weights serve value and tangent in one call."""
    words = ["method.name=eulerian", "method.flow_map.second_time=t_minus_s", "method.flow_map.time_scale=1"]
    for share in ("0.75", "0"):  # the tangent of a quarter of the samples, and of all
        meanflow = ranks.run(_traffic, 2, digits, False, [*words, f"method.times.equal={share}"])[0]
        print(f"MeanFlow, {share} at s = t:", meanflow)
        assert meanflow["scatter"] == pytest.approx(both_branches_at_once["scatter"], rel=0.01)
        assert meanflow["gather"] == pytest.approx(both_branches_at_once["gather"], rel=0.02), meanflow


def test_streams_of_a_net_of_blocks_come_with_the_gathers_of_one_block(digits, both_branches_at_once):
    """A clean stream and both branches through a block in one call: a step sends the same for any `model.blocks`."""
    in_blocks = ranks.run(_traffic, 2, digits, False, ["model.blocks=4"])[0]
    print("four blocks:", in_blocks)
    for kind in ("gather", "scatter", "other"):
        assert in_blocks[kind] == pytest.approx(both_branches_at_once[kind], rel=0.02), in_blocks
