"""Samples block by block: the law of a Gaussian chain exactly, and a net's kept keys and values against none."""

import math

import pytest
import torch

from imm_scale.errors import UserError
from imm_scale.methods.base import Steps
from imm_scale.methods.flow_map import FlowMap, Given
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.methods.samplers import SAMPLERS, Guidance
from imm_scale.models.block_causal import BlockCausal
from tests.unit.methods.small import SIGMA_D, fresh_noise, imm, starting_noise
from tests.unit.methods.test_sample_blocks import flow_map
from tests.unit.models.test_streams import randomized, rows

OT = OTFlowMatching()
J, RHO = 8, 0.9


def falling(steps: int, first: float = 1.0) -> torch.Tensor:
    return torch.linspace(first, 0.0, steps + 1, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# A chain of eight tokens, x^j = rho x^{j-1} + sqrt(1 - rho^2) xi, each token a block


class Chain(BlockCausal):
    """G of the exact f_{s,t} of the chain's conditionals: Gaussian, of mean rho x^{j-1} and variance 1 - rho^2."""

    sequence_blocks = J

    def __init__(self, sees_context: bool):
        super().__init__()
        self.sees_context = sees_context

    def next_block(self, x, c_noise, second, label, cache, context=None):
        t, s = c_noise / 1000, second / 1000
        if context is not None:
            assert context.c_noise == 0.0 and context.second == 0.0, "clean blocks stand at time 0"
            cache.layers = [context.x[:, :, -1:] * SIGMA_D]
            cache.blocks += context.x.shape[2]
        known = bool(cache.layers) and self.sees_context
        mean = RHO * cache.layers[0] if known else torch.zeros_like(x)
        variance = SIGMA_D**2 * (1 - RHO**2 if known else 1.0)
        x_t = x * SIGMA_D * OT.norm(t)
        of = [math.sqrt((1 - float(u)) ** 2 * variance + float(u) ** 2 * SIGMA_D**2) for u in (s, t)]
        jumped = (1 - s) * mean + of[0] / of[1] * (x_t - (1 - t) * mean)
        return (x_t - jumped) / (SIGMA_D * (t - s))


def covariance(sees_context: bool, **steps) -> torch.Tensor:
    """Of the tokens, in units of their own: samples are linear in noise, so unit vectors of it give it exactly."""
    net = FlowMap(Chain(sees_context), OT, sigma_data=SIGMA_D)
    units = torch.eye(J, dtype=torch.float64)[:, None, :, None]
    label = torch.zeros(J, dtype=torch.int64)
    noise_to_token = imm().sample(net, units, label, Steps(falling(1), **steps))[:, 0, :, 0]
    return noise_to_token.T @ noise_to_token


@pytest.mark.parametrize("grids", [[1] * 8, [3] * 8, [4, 3, 2, 1, 1, 1, 1, 1]])
def test_a_gaussian_chain_has_its_covariance_exactly(grids):
    place = torch.arange(J)
    expected = RHO ** (place[:, None] - place).abs().double()
    found = covariance(True, block_times=[falling(steps) for steps in grids])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # fp64, eight steps of the chain
    total_correlation = -0.5 * torch.logdet(found)
    assert float(total_correlation) == pytest.approx(-(J - 1) / 2 * math.log(1 - RHO**2)), "5.8126 nats"


def test_without_context_tokens_are_independent():
    torch.testing.assert_close(covariance(False), torch.eye(J, dtype=torch.float64), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# A net of four blocks


def without_cache(net: FlowMap, start, grids, label, sampler, guidance, noise, given=None) -> torch.Tensor:
    """The same with the layout of training: every call a pass over all clean blocks, none of it kept."""
    x = torch.zeros_like(start)
    known = 0 if given is None else given.shape[2] // 2
    if given is not None:
        x[:, :, : 2 * known] = given

    class Block(FlowMap):
        def _answer(self, scaled, times, label, labelled=True, **told):
            whole = torch.zeros_like(start)
            whole[:, :, 2 * j : 2 * j + 2] = scaled
            told = [None if u is None else u[:, None].expand(-1, 4) for u in times]
            context = net.context(Given(x, torch.zeros(1, dtype=torch.float64)))
            return rows(self.model(whole, *told, label, context=context), j)

    for j in range(known, 4):
        one = Block(net.model, net.interp, sigma_data=SIGMA_D, null_label=net.null_label)
        of_block = lambda step: noise(step)[:, :, 2 * j : 2 * j + 2]  # noqa: B023, E731 - called within this round
        x[:, :, 2 * j : 2 * j + 2] = SAMPLERS[sampler](one, rows(start, j), grids[j], label, guidance, of_block)
    return x


CASES = [
    ("pushforward", [2] * 4, Guidance()),
    ("pushforward", [2] * 4, Guidance(1.7)),
    ("restart", [2] * 4, Guidance(0.5)),
    # In force at the second call of the first block and of the last: two blocks join the null label's cache at once.
    ("pushforward", [2, 1, 1, 2], Guidance(1.7, 0.2, 0.8)),
    ("pushforward_restart", [3, 1, 2, 1], Guidance(1.7, 0.4, 0.6)),
]


@pytest.mark.parametrize(("sampler", "steps", "guidance"), CASES)
@torch.no_grad()
def test_kept_keys_and_values_change_nothing(sampler, steps, guidance):
    net, index, label = flow_map(randomized()), torch.arange(6), torch.arange(6) % 5
    start, noise = starting_noise((3, 8, 4), index, 0), fresh_noise((3, 8, 4), index, 0)
    grids = [falling(count, 0.994) for count in steps]
    how = Steps(falling(2, 0.994), sampler, guidance, noise, block_times=() if len(set(steps)) == 1 else grids)
    found = imm().sample(net, start, label, how)
    expected = without_cache(net, start, grids, label, sampler, guidance, noise)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)  # fp64 weights, values of order 1
    assert found.dtype == torch.float64 and found.shape == start.shape


@torch.no_grad()
def test_blocks_that_are_given_stay_and_the_others_follow_them():
    net, index, label = flow_map(randomized()), torch.arange(6), torch.arange(6) % 5
    start, grids = starting_noise((3, 8, 4), index, 0), [falling(2, 0.994)] * 4
    given = starting_noise((3, 4, 4), index, 1)
    found = imm().sample(net, start, label, Steps(grids[0], guidance=Guidance(1.7), given=given))
    assert torch.equal(found[:, :, :4], given)
    expected = without_cache(net, start, grids, label, "pushforward", Guidance(1.7), None, given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    # One's own first blocks, given, are continued as they were: the noise of a block is its own.
    whole = imm().sample(net, start, label, Steps(grids[0]))
    again = imm().sample(net, start, label, Steps(grids[0], given=whole[:, :, :4]))
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_sample_is_its_own_whatever_else_is_drawn():
    net, index = flow_map(randomized()), torch.arange(6)
    start, label = starting_noise((3, 8, 4), index, 0), index % 5
    together = imm().sample(net, start, label, Steps(falling(2, 0.994), guidance=Guidance(2.0)))
    for i in (0, 4):
        alone = imm().sample(net, start[[i]], label[[i]], Steps(falling(2, 0.994), guidance=Guidance(2.0)))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_guide_keeps_its_own_keys_and_values():
    """A guide of the same weights leads nowhere; one of other blocks is refused."""
    net, index = flow_map(randomized()), torch.arange(4)
    start, label, times = starting_noise((3, 8, 4), index, 0), index % 5, falling(2, 0.994)
    plain = imm().sample(net, start, label, Steps(times))
    guided = imm().sample(net.guided_by(flow_map(randomized())), start, label, Steps(times, guidance=Guidance(3.0)))
    torch.testing.assert_close(guided, plain, rtol=0, atol=1e-10)
    with pytest.raises(UserError, match=r"model\.blocks=8, the model in 4"):
        net.guided_by(FlowMap(Chain(True), OT, sigma_data=SIGMA_D))


def test_calls_are_the_steps_and_the_clean_block_rides_along(monkeypatch):
    net, calls = randomized(), []
    plain = net.next_block

    def noting(x, c_noise, second, label, cache, context=None):
        calls.append((cache.blocks, 0 if context is None else context.x.shape[2] // 2))
        return plain(x, c_noise, second, label, cache, context)

    monkeypatch.setattr(net, "next_block", noting)
    start = starting_noise((3, 8, 4), torch.arange(2), 0)
    grids = [falling(count, 0.994) for count in (3, 1, 2, 1)]
    imm().sample(flow_map(net), start, torch.zeros(2, dtype=torch.int64), Steps(grids[0], block_times=grids))
    assert calls == [(0, 0), (0, 0), (0, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
