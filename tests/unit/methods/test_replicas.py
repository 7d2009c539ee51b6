"""Branches that are an MLP beside one clean stream: replicas of each sample in groups of their own, and samples."""

from dataclasses import replace

import pytest
import torch

from imm_scale import build, rng
from imm_scale import config as configs
from imm_scale.errors import UserError
from imm_scale.methods.base import Steps
from imm_scale.methods.in_blocks import draws as block_draws
from imm_scale.methods.probability_path import OTFlowMatching, ddim
from imm_scale.methods.samplers import Guidance
from tests.measure import LATENTS, spec_of
from tests.unit.methods.small import SIGMA_D, flow_matching, imm, losses
from tests.unit.methods.test_block_sampling import falling, without_cache
from tests.unit.methods.test_sample_blocks import ROUNDING, SEED, batch, flow_map
from tests.unit.models.test_mlp_branches import NET
from tests.unit.models.test_streams import randomized, rows

J, RHO = 4, 3


def of_replica(x: torch.Tensor, i: int) -> torch.Tensor:
    return x.chunk(RHO)[i]


def test_replicas_of_a_sample_stand_in_different_groups_with_noise_and_times_of_their_own():
    """Groups of a replica are those of the samples: M different ones, each with one x_t for each block."""
    method, (x, label, ordinal) = imm(k=8, label_drop=0.5, replicas=RHO), batch(2, 4, first=5)
    net = flow_map(randomized(NET))
    d = method.draw(net, x, label, ordinal, SEED)
    assert d.s.shape == (2 * RHO, J) and d.x_t.shape == d.x_r.shape == (RHO * 8, 3, 8, 4)
    assert torch.equal(d.given.x, x) and torch.equal(d.given.t, torch.zeros(2, dtype=torch.float64))
    assert d.t.flatten().unique().numel() == 2 * RHO * J
    seen = set()
    for i in range(RHO):
        group, number = torch.tensor([5, 6]) * RHO + i, ordinal * RHO + i
        times = method.draw_times(net, block_draws.keys(group, J), SEED)
        for found, expected in zip((d.s, d.r, d.t), times, strict=True):
            assert torch.equal(of_replica(found, i).flatten(), expected)
        eps = SIGMA_D * rng.normal(SEED, "noise", number, (3, 8, 4)).double()
        t, r = (of_replica(u, i).repeat_interleave(4, dim=0)[:, 1].view(-1, 1, 1, 1) for u in (d.t, d.r))
        x_t = (1 - t) * rows(x, 1) + t * rows(eps, 1)
        torch.testing.assert_close(rows(of_replica(d.x_t, i), 1), x_t)
        torch.testing.assert_close(rows(of_replica(d.x_r, i), 1), ddim(OTFlowMatching(), x_t, rows(x, 1), r, t))
        assert torch.equal(of_replica(d.label, i), of_replica(d.label, 0)), "dropped once for all replicas"
        seen |= set(number.tolist())
    assert len(seen) == RHO * 8, "no two draw from one key"


@pytest.mark.parametrize("method", [imm, flow_matching])
def test_the_loss_is_the_mean_over_replicas_of_the_loss_of_one(method):
    """By the code without replicas, each on the draws of one: no group holds two branches of a sample."""
    single, several = method(label_drop=0.0), method(label_drop=0.0, replicas=RHO)
    net, m = flow_map(randomized(NET)), several.group_size
    x, label, ordinal = batch(2, m)
    found = losses(several, net, x, label, ordinal, SEED)
    d = several.draw(net, x, label, ordinal, SEED)
    each = []
    for i in range(RHO):
        part = [u if u is None or u is d[-1] else of_replica(u, i) for u in d]
        if method is imm:
            y_t, y_r = net.pair(*part)
            each.append(single.discrepancy(net, y_t, y_r, part[2].flatten(), part[4].flatten()).view(-1, J))
        else:
            x_t, target, t, label, key, given = part
            wrong = (net.average(x_t, t, t, label, key, given=given) - target).square()
            each.append(torch.stack([rows(wrong, j).reshape(2, -1).mean(dim=1) for j in range(J)], dim=1))
    by_block = torch.stack(each).mean(dim=0)
    torch.testing.assert_close(found.loss_G, by_block.mean(dim=1), rtol=0, atol=ROUNDING)
    for j in range(J):
        expected = by_block[:, j].detach()
        torch.testing.assert_close(found.monitors[f"loss_block_{j + 1}"], expected, rtol=0, atol=ROUNDING)
    assert found.t_G.shape == (2,)


@pytest.mark.parametrize("method", [imm(k=8, replicas=2), flow_matching(replicas=2)])
def test_any_split_into_micro_batches_has_the_same_losses(method):
    net, m = flow_map(randomized(NET)), method.group_size
    whole = losses(method, net, *batch(4, m), SEED)
    parts = [losses(method, net, *batch(2, m, first=first), SEED) for first in (0, 2)]
    # The same fp64 sums, over other batches.
    torch.testing.assert_close(torch.cat([p.loss_G for p in parts]), whole.loss_G, rtol=1e-9, atol=ROUNDING)


def test_one_replica_draws_as_a_branch_of_the_transformer():
    method, (x, label, ordinal) = imm(k=8), batch(2, 4)
    plain = replace(NET, branch="transformer", branch_depth=None, branch_width=None)
    one, other = (method.draw(flow_map(randomized(net)), x, label, ordinal, SEED) for net in (NET, plain))
    assert all(torch.equal(a, b) for a, b in zip(one[:6], other[:6], strict=True))


@pytest.mark.parametrize("words", [[], ["model.blocks=4"]])
def test_replicas_of_what_is_not_cheap_are_refused(words):
    config = configs.load([], [*LATENTS, *words, "method.replicas=2"]).config
    with pytest.raises(UserError, match=r"method\.replicas=2.*use method\.replicas=1, or model\.branch=mlp"):
        build.net(spec_of(config))


# The second is in force at the second call of the first block and of the third: two blocks join its cache at once.
@pytest.mark.parametrize("guidance", [Guidance(1.5), Guidance(1.7, 0.2, 0.8)])
@torch.no_grad()
def test_kept_states_change_nothing_in_samples(guidance):
    """Against a sampler that keeps nothing: all clean blocks through the net in every call."""
    net, label = flow_map(randomized(NET)), torch.arange(3) % 5
    start = SIGMA_D * rng.normal(SEED, "start", torch.arange(3), (3, 8, 4)).double()
    grids = [falling(steps, 0.994) for steps in (2, 1, 3, 1)]
    how = Steps(grids[0], guidance=guidance, block_times=grids)
    found = imm().sample(net, start, label, how)
    expected = without_cache(net, start, grids, label, "pushforward", guidance, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)  # fp64 through some ten calls
    again = imm().sample(net, start, label, how._replace(given=found[:, :, :4]))
    torch.testing.assert_close(again, found, rtol=0, atol=1e-10)
