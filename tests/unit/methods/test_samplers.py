"""The pushforward sampler (imm.md section 6) with nets whose answer is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.probability_path import OTFlowMatching, VPCosine
from imm_scale.methods.samplers import (
    SAMPLERS,
    Guidance,
    heun,
    pushforward,
    pushforward_restart,
    restart,
)
from imm_scale.models.base import Backbone
from tests.unit.methods.small import fresh_noise, starting_noise

OT, COSINE = OTFlowMatching(), VPCosine()
SIGMA_D = 0.5


class Net(Backbone):
    """A fixed nonlinear G that depends on everything it is told."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones((), dtype=dtype))
        self.calls = []

    def forward(self, x, c_noise, second, label, dropout_key=None):
        self.calls.append((x, c_noise, second, label, dropout_key))
        times = (c_noise / 1000 + torch.sin(second)).view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        return self.w * torch.tanh(x) + times + label.view(-1, *[1] * (x.dim() - 1))


class ProbabilityFlow(Backbone):
    """G under `simple_edm` of the exact PF-ODE map of N(0, s_data^2) data: f_{s,t}(x) = sqrt(V_s / V_t) x."""

    def __init__(self, interp, s_data):
        super().__init__()
        self.interp, self.s_data = interp, s_data

    def forward(self, x, c_noise, second, label, dropout_key=None):
        t, s = (u.view(-1, *[1] * (x.dim() - 1)) / 1000 for u in (c_noise, second))
        i = self.interp
        v_t, v_s = (i.alpha(u) ** 2 * self.s_data**2 + i.sigma(u) ** 2 * SIGMA_D**2 for u in (t, s))
        norm = i.norm(t)
        x_t = x * SIGMA_D * norm
        c_skip = (i.alpha(s) * i.alpha(t) + i.sigma(s) * i.sigma(t)) / norm**2
        c_out = -SIGMA_D * (i.alpha(s) * i.sigma(t) - i.sigma(s) * i.alpha(t)) / norm
        return ((v_s / v_t).sqrt() - c_skip) * x_t / c_out


@pytest.mark.parametrize("interp", [OT, COSINE], ids=lambda i: i.name)
@settings(max_examples=40, deadline=None)
@given(inner=st.sets(st.floats(0.01, 0.98), max_size=6))
def test_an_exact_map_reaches_the_data_along_any_grid(interp, inner):
    inner = [t for t, below in itertools.pairwise([*sorted(inner, reverse=True), 0.0]) if t - below > 1e-3]
    grid = torch.tensor([0.994, *inner, 0.0], dtype=torch.float64)
    f = FlowMap(ProbabilityFlow(interp, 0.2), interp, "simple_edm", "s", SIGMA_D)
    x = starting_noise((3,), torch.arange(20), seed=0)
    samples = pushforward(f, x, grid, torch.zeros(20, dtype=torch.long))
    t = grid[:1]
    start = torch.sqrt(interp.alpha(t) ** 2 * 0.2**2 + interp.sigma(t) ** 2 * SIGMA_D**2)
    # G is divided by c_out, 1e-3 at least, and multiplied by it again: rounding 1e-16 / 1e-3 per step
    torch.testing.assert_close(samples, x * 0.2 / start, rtol=1e-10, atol=1e-12)


def test_each_step_goes_from_the_earlier_time_of_the_grid_to_the_next():
    net, grid = Net(), torch.tensor([0.9, 0.5, 0.2, 0.0], dtype=torch.float64)
    f = FlowMap(net, OT, "euler_fm", "s", SIGMA_D)
    x, label = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3), torch.arange(4)
    samples = pushforward(f, x, grid, label)
    assert [call[1].item() for call in net.calls] == pytest.approx([900, 500, 200], rel=1e-15)
    assert [call[2].item() for call in net.calls] == pytest.approx([500, 200, 0], rel=1e-15)
    assert all(call[4] is None for call in net.calls), "no dropout when sampling"
    state = x.numpy()
    for t, s in ((0.9, 0.5), (0.5, 0.2), (0.2, 0.0)):
        scaled = state / (SIGMA_D * math.hypot(1 - t, t))
        g = np.tanh(scaled) + t + math.sin(1000 * s) + np.arange(4)[:, None]
        state = state - SIGMA_D * (t - s) * g
    np.testing.assert_allclose(samples.numpy(), state, rtol=0, atol=1e-12)


def test_guidance_reaches_every_step():
    net, grid = Net(), torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    f = FlowMap(net, OT, "euler_fm", "s", SIGMA_D, null_label=7)
    x, label = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([1, 2])
    plain, guided = pushforward(f, x, grid, label), pushforward(f, x, grid, label, Guidance(2.0))
    assert sum((call[3] == 7).all().item() for call in net.calls) == 2
    # G is linear in the label: w label + (1 - w) 7 = 2 label - 7. tanh sees another state after the first step.
    first = pushforward(f, x, grid[:2], label, Guidance(2.0)) - pushforward(f, x, grid[:2], label)
    torch.testing.assert_close(first, -0.5 * 0.4 * (label - 7.0)[:, None].expand(2, 3).double(), rtol=1e-12, atol=0)
    assert not torch.allclose(plain, guided)


def test_guidance_acts_at_times_above_low_and_up_to_high():
    net = Net()
    f = FlowMap(net, OT, "euler_fm", "s", SIGMA_D, null_label=7)
    grid = torch.tensor([0.9, 0.7, 0.5, 0.2, 0.0], dtype=torch.float64)
    pushforward(f, torch.zeros(1, 3, dtype=torch.float64), grid, torch.tensor([1]), Guidance(2.0, low=0.2, high=0.7))
    unconditional = [call[1].item() for call in net.calls if call[3].item() == 7]
    assert unconditional == pytest.approx([700, 500], rel=1e-15), "not at 0.9, nor at 0.2, where low ends"
    assert len(net.calls) == 4 + 2


def counted_noise(log, shape=(4, 3)):
    def noise(step):
        log.append(step)
        return torch.full(shape, 0.1 * (len(log)), dtype=torch.float64)

    return noise


@pytest.mark.parametrize("interp", [OT, COSINE], ids=lambda i: i.name)
def test_restart_jumps_to_the_end_and_renoises_to_the_next_time(interp):
    net, log = Net(), []
    f = FlowMap(net, interp, "simple_edm", "s", SIGMA_D)
    grid = torch.tensor([0.9, 0.5, 0.2, 0.006], dtype=torch.float64)
    x, label = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3), torch.arange(4)
    samples = restart(f, x, grid, label, noise=counted_noise(log))
    assert [call[1].item() for call in net.calls] == pytest.approx([900, 500, 200], rel=1e-15)
    assert [call[2].item() for call in net.calls] == pytest.approx([6, 6, 6], rel=1e-15)
    assert len(log) == len(set(log)) == 2, "fresh noise for each of two restarts, none after the last jump"

    state = x
    for i, (t, after) in enumerate([(0.9, 0.5), (0.5, 0.2), (0.2, None)]):
        end, t = torch.tensor([[0.006], [t]], dtype=torch.float64)
        state = f(state, end, t, label).detach()
        if after is not None:
            angle = math.pi * after / 2
            alpha, sigma = (1 - after, after) if interp is OT else (math.cos(angle), math.sin(angle))
            state = alpha * state + sigma * 0.1 * (i + 1)
    torch.testing.assert_close(samples, state, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("steps", "pushed"), [(1, 1), (2, 1), (3, 2), (4, 2), (8, 4)])
def test_pushforward_restart_pushes_for_half_of_the_steps_rounded_up(steps, pushed):
    net = Net()
    f = FlowMap(net, OT, "euler_fm", "s", SIGMA_D)
    grid = torch.linspace(0.96, 0.0, steps + 1, dtype=torch.float64)
    x, label = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3), torch.arange(4)
    samples = pushforward_restart(f, x, grid, label, noise=counted_noise([]))
    expected_second = [1000 * g for g in grid[1 : pushed + 1].tolist()] + [0.0] * (steps - pushed)
    assert [call[1].item() for call in net.calls] == pytest.approx((1000 * grid[:-1]).tolist(), rel=1e-15)
    assert [call[2].item() for call in net.calls] == pytest.approx(expected_second, rel=1e-15)
    by_hand = pushforward(f, x, grid[: pushed + 1], label)
    if pushed < steps:
        by_hand = restart(f, by_hand, grid[pushed:], label, noise=counted_noise([]))
    assert torch.equal(samples, by_hand)


def test_an_exact_map_restarted_still_gives_the_data_distribution():
    f = FlowMap(ProbabilityFlow(OT, 0.2), OT, "simple_edm", "s", SIGMA_D)
    index, grid = torch.arange(4000), torch.tensor([1.0, 0.7, 0.4, 0.0], dtype=torch.float64)
    x = starting_noise((5,), index, seed=0)
    samples = restart(f, x, grid, 0 * index, noise=fresh_noise((5,), index, seed=0))
    n = samples.numel()
    assert samples.std().item() == pytest.approx(0.2, rel=4.5 / math.sqrt(2 * n))
    assert abs(np.corrcoef(samples.flatten(), x.flatten())[0, 1]) < 0.9, "fresh noise was mixed in"


def test_restart_noise_depends_on_seed_index_and_step_alone_and_is_no_other_noise():
    index = torch.tensor([5, 2**34, 0])
    noise = fresh_noise((40,), index, seed=1)
    assert noise(0).dtype == torch.float64
    assert torch.equal(noise(3), fresh_noise((40,), index, seed=1)(3))
    assert torch.equal(noise(3)[1], fresh_noise((40,), index[1:2], seed=1)(3)[0])
    others = [noise(1), fresh_noise((40,), index, seed=2)(0), starting_noise((40,), index, seed=1)]
    for other in others:
        assert not (noise(0) == other).any()
    wide = fresh_noise((100,), torch.arange(1000), seed=1)(2)
    assert wide.std().item() == pytest.approx(SIGMA_D, rel=4.5 / math.sqrt(2e5))


class Velocity(Backbone):
    """G = E[eps - x | x_t] / sigma_d for data N(0, s_data^2) on `ot_fm`: the ODE lands on s_data / sigma_d x."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, c_noise, second, label, dropout_key=None):
        self.calls += 1
        t = (c_noise / 1000).view(-1, *[1] * (x.dim() - 1))
        x_t = x * SIGMA_D * torch.sqrt((1 - t) ** 2 + t**2)
        variance = (1 - t) ** 2 * 0.2**2 + t**2 * SIGMA_D**2
        return (t * SIGMA_D**2 - (1 - t) * 0.2**2) / variance * x_t / SIGMA_D


def test_heun_is_of_second_order_on_the_probability_flow_and_evaluates_twice_but_for_the_last_step():
    net = Velocity()
    f = FlowMap(net, OT, "euler_fm", "none", SIGMA_D)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    errors = []
    for steps in (50, 100, 200):
        net.calls = 0
        grid = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
        samples = heun(f, x, grid, torch.zeros(4, dtype=torch.long))
        assert net.calls == 2 * steps - 1
        errors.append((samples - 0.2 / SIGMA_D * x).abs().max().item())
    assert errors[2] < 1e-4
    # twice the steps, a quarter of the error
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


class OfPlainSamples(Velocity):
    """The same velocity of samples that come over sigma_d and no more."""

    def forward(self, x, c_noise, second, label, dropout_key=None):
        t = (c_noise / 1000).view(-1, *[1] * (x.dim() - 1))
        return super().forward(x / torch.sqrt((1 - t) ** 2 + t**2), c_noise, second, label)


@pytest.mark.parametrize(("net", "parameterization"), [(Velocity(), "euler_fm"), (OfPlainSamples(), "velocity")])
def test_one_heun_step_by_hand_with_an_end_above_0(net, parameterization):
    f = FlowMap(net, OT, parameterization, "none", SIGMA_D)
    x, label = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3), torch.zeros(4, dtype=torch.long)

    def v(x, t):
        return (t * SIGMA_D**2 - (1 - t) * 0.2**2) / ((1 - t) ** 2 * 0.2**2 + t**2 * SIGMA_D**2) * x

    euler = x - (0.9 - 0.4) * v(x, 0.9)
    second = x - (0.9 - 0.4) * (v(x, 0.9) + v(euler, 0.4)) / 2
    expected = second - (0.4 - 0.1) * v(second, 0.4)
    grid = torch.tensor([0.9, 0.4, 0.1], dtype=torch.float64)
    torch.testing.assert_close(heun(f, x, grid, label), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("interp", "parameterization", "second_time"),
    [(OT, "euler_fm", "s"), (OT, "simple_edm", "none"), (COSINE, "simple_edm", "t_minus_s")],
)
def test_heun_is_refused_for_a_map_that_is_no_velocity(interp, parameterization, second_time):
    f = FlowMap(Net(), interp, parameterization, second_time)
    grid = torch.tensor([0.9, 0.4, 0.0], dtype=torch.float64)
    with pytest.raises(UserError, match=rf"{second_time}.*pushforward"):
        heun(f, torch.zeros(1, 3, dtype=torch.float64), grid, torch.zeros(1, dtype=torch.long))


def test_every_sampler_is_found_by_its_name():
    for sampler in (pushforward, restart, pushforward_restart, heun):
        assert SAMPLERS[sampler.__name__] is sampler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_is_fp64_whatever_the_network_runs_in(dtype):
    net, grid = Net(dtype), torch.linspace(0.994, 0.0, 9, dtype=torch.float64)
    f = FlowMap(net, OT, "euler_fm", "s", SIGMA_D)
    x = starting_noise((2, 2, 2), torch.arange(3), seed=0)
    assert x.dtype == torch.float64
    samples = pushforward(f, x, grid, torch.arange(3))
    assert samples.dtype == torch.float64
    assert not samples.requires_grad
    assert all(call[0].dtype == dtype for call in net.calls)


def test_noise_depends_on_the_seed_and_on_each_samples_index_alone():
    index = torch.tensor([5, 2**34, 0, 3])
    together = starting_noise((2, 3), index, seed=4)
    for row, i in enumerate(index.tolist()):
        assert torch.equal(starting_noise((2, 3), torch.tensor([i]), seed=4)[0], together[row])
    assert not (starting_noise((2, 3), index, seed=5) == together).any()


def test_an_image_does_not_depend_on_the_batch_around_it():
    f = FlowMap(Net(), OT, "euler_fm", "s", SIGMA_D)
    grid, label = torch.linspace(0.994, 0.0, 4, dtype=torch.float64), torch.arange(6)

    def sample(index):
        return pushforward(f, starting_noise((3,), index, seed=0), grid, label[index])

    whole = sample(torch.arange(6))
    torch.testing.assert_close(sample(torch.tensor([4, 1])), whole[[4, 1]], rtol=1e-14, atol=0)


def test_noise_is_normal_with_standard_deviation_sigma_d():
    x = starting_noise((100,), torch.arange(1000), seed=0)
    n = x.numel()
    assert abs(x.mean().item()) < 4.5 * SIGMA_D / math.sqrt(n)
    assert abs(x.std().item() - SIGMA_D) < 4.5 * SIGMA_D / math.sqrt(2 * n)


def test_noise_of_samples_is_not_the_noise_of_training():
    """Image i must not start from the noise that sample i was trained on."""
    from imm_scale.methods.base import prior_noise

    f, index = FlowMap(Net(), OT, "euler_fm"), torch.arange(50)
    trained = prior_noise(f, torch.zeros(50, 4), index, seed=0)
    assert not (starting_noise((4,), index, seed=0) == trained.double()).any()
