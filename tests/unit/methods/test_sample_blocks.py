"""Losses of samples in several blocks, against the loss of a single block, block by block in loops."""

import math
from dataclasses import replace

import pytest
import torch

from imm_scale import build, rng
from imm_scale import config as configs
from imm_scale.data.batch import Batch
from imm_scale.errors import UserError
from imm_scale.methods.eulerian.method import Eulerian, EulerianConfig
from imm_scale.methods.flow_map import FlowMap, Given
from imm_scale.methods.probability_path import OTFlowMatching, ddim
from imm_scale.methods.two_times import TwoTimesConfig
from imm_scale.models.base import Context
from imm_scale.models.dit import DiT
from tests.measure import LATENTS, spec_of
from tests.unit.methods.small import SIGMA_D, flow_matching, imm, losses
from tests.unit.models.test_streams import NET, randomized, rows

SEED, J = 3, 4
ROUNDING = 1e-12  # fp64 throughout, losses of order 1e-2 to 1


def flow_map(net: DiT | None = None, **settings) -> FlowMap:
    net = randomized() if net is None else net
    return FlowMap(net, OTFlowMatching(), sigma_data=SIGMA_D, null_label=5, **settings)


def batch(groups: int, m: int, first: int = 0):
    """Samples (N, 3, 8, 4) of whole groups, their labels and ordinals."""
    ordinal = torch.arange(first * m, (first + groups) * m)
    x = SIGMA_D * rng.normal(9, "test", ordinal, (3, 8, 4)).double()
    return x, ordinal % 5, ordinal


class Answers(torch.nn.Module):
    """A net whose answer for a block is a function of all that this block may look at, and its calls."""

    sequence_blocks, takes_guidance, has_dropout = J, False, False

    def forward(self, x, c_noise, second, label, dropout_key=None, context=None):
        assert isinstance(context, Context)
        times = torch.stack([c_noise, second]).repeat_interleave(len(x) // len(c_noise), dim=1) / 1000
        out = []
        for j in range(J):
            before = context.x[:, :, : 2 * j].sum(dim=(1, 2, 3)) + label
            told = (before + times[0, :, j] + 2 * times[1, :, j]).view(-1, 1, 1, 1)
            out.append(torch.sin(3 * rows(x, j)) + torch.cos(told))
        return torch.cat(out, dim=2)

    def pair(self, x_t, x_r, c_t, c_r, s_t, s_r, label, dropout_key=None, context=None):
        return (
            self(x_t, c_t, s_t, label, dropout_key, context),
            self(x_r, c_r, s_r, label, dropout_key, context).detach(),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Draws


def test_times_of_block_j_of_group_g_are_those_of_group_g_j_plus_j():
    method, (x, label, ordinal) = imm(k=8), batch(3, 4, first=5)
    d = method.draw(flow_map(), x, label, ordinal, SEED)
    assert d.s.shape == d.r.shape == d.t.shape == (3, J)
    for times, expected in zip((d.s, d.r, d.t), method.draw_times(flow_map(), torch.arange(20, 32), SEED), strict=True):
        assert torch.equal(times.flatten(), expected)


def test_noise_labels_and_dropout_are_those_of_a_single_block():
    """Drawn once per sample, whatever the blocks; x_t and x_r of a block stand at its own times, from one eps."""
    method, (x, label, ordinal) = imm(k=8, label_drop=0.5), batch(3, 4)
    net = randomized(replace(NET, dropout=0.1))
    d, whole = (method.draw(flow_map(one), x, label, ordinal, SEED) for one in (net, DiT(replace(NET, blocks=1))))
    assert torch.equal(d.label, whole.label) and whole.given is None
    assert torch.equal(d.dropout_key, method.dropout_key(flow_map(net), ordinal, SEED))
    assert torch.equal(d.given.x, x) and torch.equal(d.given.t, torch.zeros(3, dtype=torch.float64))
    eps = SIGMA_D * rng.normal(SEED, "noise", ordinal, (3, 8, 4)).double()
    for g in range(3):
        for j in range(J):
            s, of = slice(4 * g, 4 * g + 4), (d.t[g, j], d.r[g, j])
            x_t, x_r = rows(d.x_t[s], j), rows(d.x_r[s], j)
            torch.testing.assert_close(x_t, (1 - of[0]) * rows(x[s], j) + of[0] * rows(eps[s], j))
            torch.testing.assert_close(x_r, ddim(OTFlowMatching(), x_t, rows(x[s], j), of[1], of[0]))


def test_what_blocks_are_given_is_diffused_to_a_time_that_is_told():
    method, (x, label, ordinal) = imm(k=8, context_noise=0.3), batch(200, 4)
    given = method.draw(flow_map(), x, label, ordinal, SEED).given
    assert given.t.shape == (200,) and given.t.min() >= 0.0 and given.t.max() < 0.3
    assert float(given.t.mean()) == pytest.approx(0.15, abs=4 * 0.3 / (12 * 200) ** 0.5)  # 4 standard errors
    noise = given.x - (1 - given.t).repeat_interleave(4)[:, None, None, None] * x
    noise = noise / given.t.repeat_interleave(4)[:, None, None, None]
    assert float(noise.std()) == pytest.approx(SIGMA_D, rel=0.02)  # 76,800 normals
    branch = SIGMA_D * rng.normal(SEED, "noise", ordinal, (3, 8, 4)).double()
    assert abs(float((noise * branch).mean())) < 4 * SIGMA_D**2 / 76_800**0.5, "another noise than the branches'"
    context = flow_map().context(given)
    assert torch.equal(context.c_noise, 1000 * given.t) and torch.equal(context.second, 1000 * given.t)


def test_draws_of_a_group_do_not_depend_on_what_else_is_in_the_batch():
    method = imm(k=8, label_drop=0.5, context_noise=0.1)
    whole = method.draw(flow_map(), *batch(6, 4), SEED)
    part = method.draw(flow_map(), *batch(2, 4, first=3), SEED)
    for one, other in zip(whole, part, strict=True):
        for all_of_them, some in zip(*((v if isinstance(v, Given) else (v,)) for v in (one, other)), strict=True):
            if some is not None:
                size = len(some) // 2
                assert torch.equal(all_of_them[3 * size : 5 * size], some)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def test_the_loss_of_a_group_is_the_mean_over_blocks_of_the_loss_of_one():
    """Each block by itself: its rows, its times, D_j elements in the kernel, by the code of a single block."""
    method, (x, label, ordinal) = imm(k=8, label_drop=0.0), batch(3, 4)
    net = flow_map(Answers())
    found = losses(method, net, x, label, ordinal, SEED)
    d = method.draw(net, x, label, ordinal, SEED)
    y_t, y_r = net.pair(*d)
    alone = flow_map(DiT(replace(NET, blocks=1, height=2)))
    each = [method.discrepancy(alone, rows(y_t, j), rows(y_r, j), d.s[:, j], d.t[:, j]) for j in range(J)]
    torch.testing.assert_close(found.loss_G, torch.stack(each).mean(dim=0), rtol=0, atol=ROUNDING)
    for j in range(J):
        torch.testing.assert_close(found.monitors[f"loss_block_{j + 1}"], each[j], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(found.t_G, d.t.mean(dim=1), rtol=0, atol=ROUNDING)
    assert found.loss_G.min() > 0.0


def test_the_map_of_a_block_has_its_own_coefficients():
    method, (x, label, ordinal) = imm(k=8, label_drop=0.0), batch(2, 4)
    net = flow_map(Answers())
    d = method.draw(net, x, label, ordinal, SEED)
    y_t, y_r = net.pair(*d)
    for n in range(8):
        for j in range(J):
            for y, x_u, u in ((y_t, d.x_t, d.t), (y_r, d.x_r, d.r)):
                s, t = float(d.s[n // 4, j]), float(u[n // 4, j])
                before = sum(float(x[n, :, 2 * i : 2 * i + 2].sum()) for i in range(j)) / SIGMA_D + int(label[n])
                inner = rows(x_u, j)[n] / (SIGMA_D * ((1 - t) ** 2 + t**2) ** 0.5)
                answer = torch.sin(3 * inner) + math.cos(before + t + 2 * s)
                expected = rows(x_u, j)[n] - SIGMA_D * (t - s) * answer
                torch.testing.assert_close(rows(y, j)[n], expected, rtol=0, atol=ROUNDING)


def test_flow_matching_of_blocks_is_flow_matching_of_each():
    method, (x, label, ordinal) = flow_matching(label_drop=0.0), batch(6, 1)
    net = flow_map(Answers())
    found = losses(method, net, x, label, ordinal, SEED)
    x_t, target, t, *_, given = method.draw(net, x, label, ordinal, SEED)
    assert t.shape == (6, J)
    error = net.average(x_t, t, t, label, given=given) - target
    each = torch.stack([rows(error, j).square().mean(dim=(1, 2, 3)) for j in range(J)])
    torch.testing.assert_close(found.loss_G, each.mean(dim=0), rtol=0, atol=ROUNDING)
    for j in range(J):
        torch.testing.assert_close(found.monitors[f"loss_block_{j + 1}"], each[j], rtol=0, atol=ROUNDING)


def soflow(**settings) -> Eulerian:
    times = TwoTimesConfig(equal=0.5)
    config = EulerianConfig(derivative="difference", times=times, schedule_images=1000, label_drop=0.0, **settings)
    config.validate()
    return Eulerian(config.resolved("fp32"))


@pytest.mark.parametrize("kind", ["l2", "adaptive"])
def test_the_difference_form_of_blocks_is_that_of_each(kind):
    """Residual and adaptive weight of each block by itself, whatever micro-batches start and end at."""
    method, (x, label, ordinal) = soflow(residual=replace(soflow().config.residual, kind=kind)), batch(8, 1)
    net = flow_map(Answers())
    weight = torch.ones(8)
    found = method.loss(net, Batch(0, x, label, ordinal, weight, alignment=8), SEED)
    d = method.draw(net, x, label, ordinal, SEED)
    assert (d.s == d.t).double().mean() == 0.5, "the share is exact among blocks"
    out, residual, far = method._by_difference(net, d, 8)
    alone = flow_map(DiT(replace(NET, blocks=1, height=2)))
    each = []
    for j in range(J):
        part = d._replace(s=d.s[:, j], r=d.r[:, j], t=d.t[:, j])
        each.append(method._weighted(alone, rows(out, j), rows(residual, j), rows(far, j), part))
    torch.testing.assert_close(found.loss_G, torch.stack([one.loss_G for one in each]).mean(dim=0), rtol=1e-12, atol=0)
    for name, values in found.monitors.items():
        expected = torch.stack([one.monitors[name] for one in each]).mean(dim=0)
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("method", [imm(k=8, label_drop=0.2), flow_matching(label_drop=0.2), soflow()])
def test_any_split_into_micro_batches_has_the_same_losses(method):
    net, m = flow_map(), method.group_size
    whole = losses(method, net, *batch(4, m), SEED)
    parts = [losses(method, net, *batch(2, m, first=first), SEED) for first in (0, 2)]
    # The same fp64 sums, over other batches.
    torch.testing.assert_close(torch.cat([p.loss_G for p in parts]), whole.loss_G, rtol=1e-9, atol=ROUNDING)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

FOUR = [*LATENTS, "model.blocks=4"]
TANGENT = ["method.name=eulerian", "method.flow_map.second_time=t_minus_s", "method.flow_map.time_scale=1"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (TANGENT, "tangent.*difference"),
        (["method.name=tvm"], "whole samples"),
        (["method.name=shortcut"], "whole samples"),
        (["method.name=gmmn", "sampling.steps=[1]", "evaluation.steps=[1]"], "contexts differ"),
        ([*TANGENT, "method.derivative=difference", "method.step.end=0.1", "method.guidance.kappa=0.5"], "guidance"),
        (
            [*TANGENT, "method.derivative=difference", "method.step.end=0.1", "method.label_drop_at=equal"],
            "label_drop_at",
        ),
    ],
)
def test_losses_of_whole_samples_are_refused(words, what):
    config = configs.load([], [*FOUR, *words]).config
    with pytest.raises(UserError, match=rf"model\.blocks=4: .*{what}.*model\.blocks=1"):
        build.net(spec_of(config))


def test_noise_on_blocks_that_nobody_is_given_is_refused():
    config = configs.load([], [*LATENTS, "method.context_noise=0.1"]).config
    with pytest.raises(UserError, match=r"method\.context_noise=0\.1 does nothing with model\.blocks=1"):
        build.net(spec_of(config))
