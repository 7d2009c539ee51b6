"""The sampler of masked nets: its laws by enumeration, its draws by plain loops."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from imm_scale.methods.tokens.masked import MaskedConfig, MaskedDiffusion
from imm_scale.methods.tokens.token_net import TokenNet
from imm_scale.methods.tokens.unmask import unmask
from tests.unit.methods.tokens import toy
from tests.unit.models.heads.laws import KINDS, all_sequences, diagonal

V, T, N = 3, 4, 20_000
ORDERS = ["random", "left_to_right", "confidence"]


def _times(kind, steps, length):
    return MaskedDiffusion(MaskedConfig()).grid(kind, steps, SimpleNamespace(shape=(length,)))


def _sample(net, samples, kind="uniform", steps=1, order="random", start=None, label=None):
    start = toy.masks(net, len(samples)) if start is None else start
    label = toy.no_label(len(samples)) if label is None else label
    return unmask(net, start, label, toy.steps(samples, _times(kind, steps, net.length), order=order))


def exact_net(x_SK, vocabulary, weight_S=None):
    """The masked net that knows all conditionals of a law of these sequences, uniform or of these probabilities."""
    weight_S = torch.full((len(x_SK),), 1 / len(x_SK)) if weight_S is None else weight_S
    onehot_SKV = torch.nn.functional.one_hot(x_SK, vocabulary).double()

    def states(x_NK):
        possible_NS = ((x_NK[:, None] == vocabulary) | (x_NK[:, None] == x_SK)).all(dim=2)
        p_NKV = torch.einsum("ns,skv->nkv", possible_NS * weight_S.double(), onehot_SKV)
        return (p_NKV / p_NKV.sum(dim=2, keepdim=True)).clamp_min(1e-30).log()

    return TokenNet(toy.Table(states, vocabulary), vocabulary, x_SK.shape[1])


def _given(net, n):
    """Every second sample begins with some tokens given, at places of its own."""
    start = toy.masks(net, n)
    generator = torch.Generator().manual_seed(0)
    there = torch.rand(n, net.length, generator=generator) < 0.4
    there[::2] = False
    return torch.where(there, torch.randint(net.mask, start.shape, generator=generator), start)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_go_given_tokens_stay_and_the_batch_decides_nothing(kind, order):
    length = 6
    # With rotary positions all places of masks alone are alike but for rounding, which then decides on confidence.
    net = toy.token_net(length, V, causal=False, head=KINDS[kind], positions="learned")
    start, label, index = _given(net, 12), torch.arange(12) % 3, torch.arange(12)
    for grid, steps in (("uniform", 1), ("cosine", 3), ("1,2,3", 3), ("uniform", 6)):
        x = _sample(net, index, grid, steps, order, start, label)
        assert ((x >= 0) & (x < V)).all() and torch.equal(torch.where(start == V, V, x), start)
        for part in (slice(4, 5), slice(7, 12)):
            assert torch.equal(_sample(net, index[part], grid, steps, order, start[part], label[part]), x[part])
    whole = start.clone()
    whole[:] = 1
    assert torch.equal(_sample(net, index, "uniform", 3, order, whole, label), whole), "nothing to draw"


# The law of the uniform-conditioned head's draws, its student's, has no closed form.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "uniform_conditioned"])
def test_one_step_is_a_draw_of_the_head(kind):
    net = toy.token_net(T, V, causal=False, head=KINDS[kind])
    x = all_sequences(V, T)
    with torch.no_grad():
        h = net.model(toy.masks(net, 1), toy.no_label(1)).expand(len(x), -1, -1)
        law = net.model.head.log_prob(h, x, torch.ones_like(x, dtype=torch.bool)).exp()
    assert law.sum().item() == pytest.approx(1.0, abs=1e-9)
    assert toy.chi_square(_sample(net, torch.arange(N)), law, V) > toy.ALPHA


@pytest.mark.parametrize("kind", ["factorized", "mixture"])
def test_two_steps_in_random_order_are_the_mixture_over_orders(kind):
    """Sizes 1 and 2 of three tokens: which is first is uniform, the others are drawn jointly given it."""
    length, net = 3, toy.token_net(3, V, causal=False, head=KINDS[kind])
    x = all_sequences(V, length)
    law = torch.zeros(len(x), dtype=torch.float64)
    for first in range(length):
        is_first = (torch.arange(length) == first).expand(len(x), -1)
        log_p = torch.zeros_like(law)
        for known, scored in ((torch.zeros_like(is_first), is_first), (is_first, ~is_first)):
            with torch.no_grad():
                h = net.model(torch.where(known, x, V), toy.no_label(len(x)))
                log_p += net.model.head.log_prob(h, x, scored)
        law += log_p.exp() / length
    drawn = _sample(net, torch.arange(N), "1,2", 2)
    assert toy.chi_square(drawn, law, V) > toy.ALPHA


def test_a_step_a_token_has_the_exact_law_in_any_random_order():
    weight = torch.rand(81, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    law = weight / weight.sum()
    net = exact_net(all_sequences(V, T), V, law)
    for order in ("random", "left_to_right"):
        assert toy.chi_square(_sample(net, torch.arange(N), "uniform", T, order), law, V) > toy.ALPHA


def test_a_step_a_token_left_to_right_is_ancestral_sampling():
    net, n = toy.token_net(T, V, causal=False), 50
    given = toy.steps(torch.arange(n))
    x = toy.masks(net, n)
    for at in range(T):
        with torch.no_grad():
            log_p_NV = net.model.head.marginals(net.model(x, toy.no_label(n)))[:, at]
        u = given.uniform(at + 1, 2 * T)[:, 2 * at]
        x[:, at] = (log_p_NV.exp().cumsum(1) <= u[:, None]).sum(1)
    assert torch.equal(_sample(net, torch.arange(n), "uniform", T, "left_to_right"), x)


def test_four_hands_in_one_pass_and_in_two():
    net = exact_net(diagonal(4), 4)
    once, twice = (_sample(net, torch.arange(N), "uniform", steps) for steps in (1, 2))
    assert toy.chi_square(once, torch.full((16,), 1 / 16).double(), 4) > toy.ALPHA, "a quarter of the hands is valid"
    assert toy.chi_square(twice, torch.eye(4).flatten().double() / 4, 4) > toy.ALPHA, "all of them are"


def _seen(net):
    """What the net is given, call by call."""
    calls, plain = [], net.model._states
    net.model._states = lambda x: calls.append(x.clone()) or plain(x)
    return calls


def test_each_step_draws_what_the_grid_says_and_so_large_a_part_of_what_is_not_given():
    net = exact_net(all_sequences(2, 8), 2)
    start = toy.masks(net, 2)
    start[1, ::2] = 1  # four of eight are left
    for order in ORDERS:
        calls = _seen(net)
        _sample(net, torch.arange(2), "1,1,4,2", 4, order, start)
        # floor(4 n / 8) of n = 0, 1, 2, 6, 8
        assert [(x == 2).sum(dim=1).tolist() for x in calls] == [[8, 4], [7, 4], [6, 3], [2, 1]]


def test_confidence_keeps_the_most_probable_of_what_was_drawn():
    """A net whose law depends on nothing: probabilities as they stand, drawn and ranked by a plain loop."""
    n, length = 200, 5
    logits_TV = 2.0 * torch.randn(length, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = TokenNet(toy.Table(lambda x: logits_TV.expand(len(x), -1, -1), V), V, length)
    calls, p_TV = _seen(net), logits_TV.softmax(dim=1)
    last = _sample(net, torch.arange(n), "2,1,2", 3, "confidence")
    shown = [*calls, last]
    for step, (before, after) in enumerate(itertools.pairwise(shown), 1):
        u = toy.steps(torch.arange(n)).uniform(step, 2 * length)[:, ::2]
        drawn = (p_TV.cumsum(1) <= u[..., None]).sum(2)
        probability = p_TV.gather(1, drawn.T).T
        for i in range(n):
            left = [j for j in range(length) if before[i, j] == V]
            best = sorted(left, key=lambda j: -probability[i, j])[: {1: 2, 2: 1, 3: 2}[step]]
            assert {j for j in left if after[i, j] != V} == set(best)
            assert all(after[i, j] == drawn[i, j] for j in best)
    assert len({tuple(row) for row in (shown[1] != V).tolist()}) > 1, "which they are depends on the draw"
