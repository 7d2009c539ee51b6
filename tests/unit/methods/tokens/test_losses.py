"""Losses of nets over tokens against enumeration of all that is random about them, in fp64."""

import itertools

import pytest
import torch

from imm_scale import rng
from imm_scale.data.batch import Batch
from imm_scale.methods.tokens import masked
from imm_scale.methods.tokens.masked import MaskedConfig, MaskedDiffusion
from imm_scale.methods.tokens.next_block import NextBlock, NextBlockConfig
from tests.unit.methods.tokens import toy
from tests.unit.models.heads.laws import KINDS

V, T = 3, 4
ORDERS = torch.tensor(list(itertools.permutations(range(T))))  # ranks: the order in which tokens are shown
X = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1], [1, 0, 0, 2]])
# Means of a few hundred fp64 numbers of order 10, whose angles of rotary positions are fp32 in one way for all.
ROUNDING = {"rtol": 0, "atol": 1e-10}


def _batch(x, ordinal):
    return Batch(0, x, toy.no_label(len(x)), ordinal, torch.ones(len(x)))


def _loss(method, net, x, ordinal):
    return method.loss(net, _batch(x, ordinal), seed=0)


def _drawn_from(monkeypatch, rank_NT, times_N2):
    """Uniforms that put sample i's tokens in the order of ranks (N, T), and are `times` (N, 2) otherwise."""
    plain = rng.uniform

    def uniform(seed, purpose, ordinal, count=1, stream=0):
        if purpose == "mask":
            return (T - rank_NT[ordinal].double()) / (T + 1)
        if purpose == "times":
            return times_N2[ordinal % len(times_N2)][:, :count]
        return plain(seed, purpose, ordinal, count, stream)

    monkeypatch.setattr(masked.rng, "uniform", uniform)


@torch.no_grad()
def _step_nll(net, x_T, rank_NT, first, last):
    """(N,) -log q of the tokens of ranks [first, last) given those before, by the head's own call."""
    x = x_T.expand(len(rank_NT), -1)
    h = net.model(torch.where(rank_NT < first, x, V), toy.no_label(len(x)))
    return -net.model.head.log_prob(h, x, (rank_NT >= first) & (rank_NT < last))


def _nll_of_steps(net, x_T, counts, orders=ORDERS):
    """Mean over orders of the sum over steps: what a sampler of these steps loses on a sequence."""
    return sum(_step_nll(net, x_T, orders, a, b) for a, b in itertools.pairwise(counts)).mean()


@pytest.mark.parametrize("x", X)
def test_the_loss_at_any_number_of_tokens_is_the_sum_of_the_profile(x, monkeypatch):
    """sum_n h_n, h_n the mean over sets S of n tokens and i outside of -log p(x^i | x^S): 24 orders, enumerated."""
    net = toy.token_net(T, V, causal=False)
    method = MaskedDiffusion(MaskedConfig())
    method.batch_size = n = T * len(ORDERS)
    _drawn_from(monkeypatch, ORDERS.repeat(T, 1), torch.zeros(1, 2).double())
    out = _loss(method, net, x.expand(n, -1), torch.arange(n))
    assert out.t_G.tolist() == [1 - i // 24 / T for i in range(n)]
    expected = 0.0
    for count in range(T):
        terms = []
        for visible in itertools.combinations(range(T), count):
            shown = torch.tensor([[x[i] if i in visible else V for i in range(T)]])
            with torch.no_grad():
                log_p = net.model.head.marginals(net.model(shown, toy.no_label(1)))[0]
            terms += [-log_p[i, x[i]] for i in range(T) if i not in visible]
        expected += torch.stack(terms).mean()
    torch.testing.assert_close(out.loss_G.mean(), expected, **ROUNDING)
    torch.testing.assert_close(expected, _nll_of_steps(net, x, range(T + 1)), **ROUNDING)


STEPS = [1, 2, 4]
COUNTS = {"uniform": {1: [0, 4], 2: [0, 2, 4], 4: [0, 1, 2, 3, 4]}, "cosine": {2: [0, 1, 4]}}
CHOICES = torch.tensor(list(itertools.product([1 / 6, 3 / 6, 5 / 6], [1 / 8, 3 / 8, 5 / 8, 7 / 8])), dtype=torch.double)


@pytest.mark.parametrize("order", ["random", "left_to_right"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_for_samplers_is_what_they_lose_on_average(kind, order, monkeypatch):
    """The mean of NLL_L over L = 1, 2, 4: every L, every step of it and every order, each as often as it is drawn."""
    net = toy.token_net(T, V, causal=False, head=KINDS[kind])
    method = MaskedDiffusion(MaskedConfig(steps=STEPS, order=order))
    orders = ORDERS if order == "random" else torch.arange(T)[None]
    n = len(orders) * len(CHOICES)
    _drawn_from(monkeypatch, orders.repeat_interleave(len(CHOICES), dim=0), CHOICES)
    for x in X[:2]:
        out = _loss(method, net, x.expand(n, -1), torch.arange(n))
        loss = out.loss_G
        if kind == "uniform_conditioned":  # its student's loss, weighed as the teacher's
            draws = method.draw(net, _batch(x.expand(n, -1), torch.arange(n)), 0)
            loss = loss - draws.weight * out.monitors["student_nll"]
        expected = torch.stack([_nll_of_steps(net, x, COUNTS["uniform"][steps], orders) for steps in STEPS]).mean()
        torch.testing.assert_close(loss.mean(), expected, **ROUNDING)


@pytest.mark.parametrize("kind", ["factorized", "mixture", "autoregressive"])
def test_sets_that_a_step_might_draw_have_its_mean_and_less_variance(kind, monkeypatch):
    """Five tokens in steps of 2 and 3: at first two sets of 2 and a token in neither, then one of 3."""
    length, starts = 5, torch.tensor([[0.0, 0.25], [0.0, 0.75]], dtype=torch.double)
    orders = torch.tensor(list(itertools.permutations(range(length))))
    net = toy.token_net(length, V, causal=False, head=KINDS[kind])
    method = MaskedDiffusion(MaskedConfig(steps=[2]))
    n = 2 * len(orders)
    _drawn_from(monkeypatch, orders.repeat_interleave(2, dim=0), starts)
    x = torch.tensor([2, 0, 1, 1, 0])
    several = _loss(method, net, x.expand(n, -1), torch.arange(n)).loss_G
    alone = 2 * torch.stack([_step_nll(net, x, orders, 0, 2), _step_nll(net, x, orders, 2, 5)], dim=1).flatten()
    torch.testing.assert_close(several.mean(), alone.mean(), **ROUNDING)
    first, then = several.detach().view(-1, 2).T
    assert first.var() < 0.8 * alone[::2].var(), "the mean of two sets, or of five tokens"
    if not net.model.head.independent:
        torch.testing.assert_close(then, alone[1::2], **ROUNDING)


def test_the_sizes_of_steps_are_those_of_the_grid():
    method = MaskedDiffusion(MaskedConfig(steps=[2], grid="cosine"))
    net = toy.token_net(T, V, causal=False, head=KINDS["mixture"])
    draws = method.draw(net, _batch(X[:1].expand(64, -1), torch.arange(64)), 0)
    sizes = torch.stack([(draws.masked < V).sum(1), *((draws.sets == r).sum(1) for r in range(1, T + 1))], dim=1)
    # one token of four, which any of four may be, or the three that are left
    assert sorted(map(tuple, sizes.unique(dim=0).tolist())) == [(0, 1, 1, 1, 1), (1, 3, 0, 0, 0)]
    assert draws.weight.tolist() == [0.5 if n == 0 else 2.0 for n in sizes[:, 0].tolist()]
    assert not (draws.sets.bool() & (draws.masked < V)).any()


@pytest.mark.parametrize("steps", [[], STEPS])
def test_draws_are_functions_of_the_ordinal(steps):
    """So any ranks and micro-batches draw the same: any part of a step, in any order, has the draws of the whole."""
    net = toy.token_net(T, V, causal=False)
    method = MaskedDiffusion(MaskedConfig(steps=steps))
    method.batch_size = 24
    ordinal = torch.arange(48, 96)
    x = torch.randint(V, (48, T), generator=torch.Generator().manual_seed(0))
    whole = method.draw(net, _batch(x, ordinal), seed=3)
    for part in (slice(0, 24), slice(5, 9), slice(1, 48, 3), torch.randperm(48)[:7]):
        for mine, of_all in zip(method.draw(net, _batch(x[part], ordinal[part]), seed=3), whole, strict=True):
            assert torch.equal(mine, of_all[part])
    assert not torch.equal(method.draw(net, _batch(x, ordinal), seed=4).masked, whole.masked)
    assert not torch.equal(whole.masked[:24] == V, whole.masked[24:] == V), "each step draws anew"


def test_numbers_of_visible_tokens_are_spread_evenly_over_a_step():
    net = toy.token_net(T, V, causal=False)
    method = MaskedDiffusion(MaskedConfig())
    method.batch_size = 8
    firsts = set()
    for step in range(20):
        ordinal = torch.arange(8 * step, 8 * step + 8)
        visible = (method.draw(net, _batch(X[:1].expand(8, -1), ordinal), 0).masked < V).sum(1)
        assert torch.bincount(visible, minlength=T).tolist() == [2, 2, 2, 2]
        firsts.add(int(visible[0]))
    assert firsts == {0, 1, 2, 3}, "where they begin is left to chance"


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_the_next_block_is_its_negative_log_probability(kind, block):
    """1/B of the sum over places, each block by enumeration of its law; the last blocks are cut."""
    net = toy.token_net(T, V, causal=True, block=block, head=KINDS[kind])
    out = _loss(NextBlock(NextBlockConfig()), net, X, torch.arange(3))
    loss = out.loss_G * block
    if kind == "uniform_conditioned":
        loss = loss - T * out.monitors["student_nll"]
    laws = toy.CausalLaws(net)
    for x, actual in zip(X.tolist(), loss, strict=True):
        blocks = [laws.of_block(tuple(x[:n]))[tuple(x[n : n + block])] for n in range(T)]
        torch.testing.assert_close(actual, -torch.stack(blocks).log().sum(), **ROUNDING)


@pytest.mark.parametrize(
    ("method", "causal"), [(MaskedDiffusion(MaskedConfig(steps=[2])), False), (NextBlock(NextBlockConfig()), True)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns(method, causal, kind):
    block = {"block": 2} if causal else {}
    net = toy.token_net(T, V, causal, head=KINDS[kind], **block)
    _loss(method, net, X, torch.arange(3)).loss_G.sum().backward()
    idle = {name for name, p in net.model.named_parameters() if p.grad is None}
    assert idle == set()


def test_a_dropped_pass_is_a_function_of_the_sample():
    net = toy.token_net(T, V, causal=True, dropout=0.5)
    net.train()
    method = NextBlock(NextBlockConfig())
    whole = _loss(method, net, X, torch.arange(3)).loss_G
    assert torch.allclose(_loss(method, net, X[1:], torch.arange(1, 3)).loss_G, whole[1:], rtol=0, atol=1e-12)
    net.eval()
    assert not torch.allclose(_loss(method, net, X, torch.arange(3)).loss_G, whole)
