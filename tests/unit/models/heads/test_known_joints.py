"""What heads of each kind can reach on joints with closed forms, by tables set in them and by short fits."""

import math

import pytest
import torch
from torch import nn

from imm_scale.models.heads import HeadConfig, build
from tests.unit.models.heads import laws

# Closed forms are compared after some hundred fp64 operations on numbers up to 80.
FP64 = 1e-10
SURE = 40.0  # logits so far apart leave e^-40
HANDS4, HANDS5, DIAGONAL8 = laws.diagonal(4), torch.cat([laws.diagonal(4), torch.tensor([[4, 3]])]), laws.diagonal(8)


def sure(token, vocabulary):
    return SURE * nn.functional.one_hot(torch.as_tensor(token), vocabulary).double()


def factorized_best(x_NK, vocabulary):
    """The factorized head of the data's marginals: none is nearer to it."""
    head = build(HeadConfig(), x_NK.shape[1], vocabulary, heads=1).double()
    marginals_KV = nn.functional.one_hot(x_NK, vocabulary).double().mean(0)
    with torch.no_grad():
        head.unembed.weight.copy_(marginals_KV.clamp(math.exp(-2 * SURE)).log().T)
    return head, torch.eye(x_NK.shape[1], dtype=torch.float64)


def validity(head, h_KD, x_NK):
    """How likely a draw is one of these sequences."""
    return laws.scores(head, h_KD, x_NK).exp().sum().item()


# Five hands: a royal flush shares its second card with the straight flush, so that the second entropy is of 1/5, 1/5,
# 1/5, 2/5.
H_FIVE, H_FOUR = math.log(5), -0.6 * math.log(0.2) - 0.4 * math.log(0.4)


@pytest.mark.parametrize(
    ("x", "vocabulary", "divergence", "valid"),
    [
        (HANDS4, 4, math.log(4), 1 / 4),
        (HANDS5, 5, H_FOUR, 3 / 25 + 2 * 2 / 25),
        (DIAGONAL8, 8, math.log(8), 1 / 8),
        (laws.even_parity(8), 2, math.log(2), 1 / 2),
    ],
    ids=["hands4", "hands5", "diagonal8", "parity8"],
)
def test_a_product_loses_the_total_correlation(x, vocabulary, divergence, valid):
    head, h = factorized_best(x, vocabulary)
    assert laws.divergence(head, h, x).item() == pytest.approx(divergence, abs=FP64)
    assert validity(head, h, x) == pytest.approx(valid, abs=FP64)


def test_second_drafts_of_a_product_are_kept_a_quarter_of_the_time():
    """1 - TV between what the second card must be and what the head says of it."""
    head, h = factorized_best(HANDS4, 4)
    h_NKD = h.expand(4, -1, -1)
    state = head.observe(head.begin(h_NKD, torch.ones(4, 2).bool()), 0, HANDS4[:, 0])
    draft, truth = head.conditional(state, 1).exp(), nn.functional.one_hot(HANDS4[:, 1], 4)
    assert torch.minimum(draft, truth).sum(1).tolist() == pytest.approx([0.25] * 4, abs=FP64)


def with_weights(head, weight_R):
    with torch.no_grad():
        head.weights.linear.bias.copy_(weight_R.log())
    return head


@pytest.mark.parametrize(
    ("x", "vocabulary", "components", "divergence"),
    [(HANDS4, 4, r, kl) for r, kl in {1: math.log(4), 2: math.log(2), 3: math.log(2) / 2, 4: 0.0}.items()]
    + [(DIAGONAL8, 8, r, math.log(8 / r)) for r in (1, 2, 4, 8)]
    # Of parity no closed form: enumerated elsewhere, to three digits
    + [(laws.even_parity(4), 2, r, kl) for r, kl in {1: 0.693, 2: 0.693, 4: 0.520, 6: 0.288, 8: 0.0}.items()],
)
def test_the_best_mixture_of_products(x, vocabulary, components, divergence):
    weight_R, p_KRV = laws.mixture_by_em(x, vocabulary, components, restarts=64)
    head, h = laws.tabled(HeadConfig("mixture", components=components), p_KRV.clamp(1e-30).log())
    ours = laws.divergence(with_weights(head, weight_R), h, x).item()
    tolerance = 5e-4 if vocabulary == 2 else 1e-4  # digits given; what EM is from its limit
    assert ours == pytest.approx(divergence, abs=tolerance)
    assert ours >= math.log(len(x)) * (vocabulary > 2) - math.log(components) - tolerance, "(k - 1) log R of k = 2"


def test_copies_of_one_token_are_a_mixture_of_as_many():
    x = torch.arange(4)[:, None].expand(-1, 8)
    table_KRV = sure(torch.arange(4), 4).expand(8, -1, -1).clone()
    head, h = laws.tabled(HeadConfig("mixture", components=4), table_KRV)
    assert laws.divergence(head, h, x).item() == pytest.approx(0.0, abs=FP64)
    chain, h = laws.tabled(HeadConfig("chain", components=4), table_KRV)
    with torch.no_grad():
        chain.moves.linear.bias.copy_(SURE * torch.eye(4).flatten())
    assert laws.divergence(chain, h, x).item() == pytest.approx(0.0, abs=FP64), "a chain that never moves"


def test_a_chain_of_two_states_is_exact_on_parity():
    """The state is the parity so far: tokens are even odds but for the last, which must make it even."""
    table_KRV = torch.zeros(8, 2, 2, dtype=torch.float64)
    table_KRV[7] = sure(torch.arange(2), 2)
    head, h = laws.tabled(HeadConfig("chain", components=2), table_KRV)
    with torch.no_grad():
        head.weights.linear.bias.copy_(torch.tensor([SURE, -SURE]))
        head.moves.linear.bias.zero_()
        stay, flip = SURE * torch.eye(2), SURE * torch.eye(2).flip(0)
        head.moves.table.weight.copy_(torch.stack([stay.flatten(), flip.flatten()]))
    x = laws.even_parity(8)
    assert laws.divergence(head, h, x).item() == pytest.approx(0.0, abs=FP64)
    assert validity(head, h, x) == pytest.approx(1.0, abs=FP64)
    uniforms = torch.rand(500, 8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = head.sample(h.expand(500, -1, -1), torch.ones(500, 8).bool(), uniforms)
    assert (drawn.sum(1) % 2 == 0).all() and len(drawn.unique(dim=0)) > 100


def test_a_chain_whose_moves_ignore_tokens_is_a_hidden_markov_model():
    """Bits that flip with probability .1: log q = log 1/2 + a log or log for each pair."""
    head, h = laws.tabled(HeadConfig("chain", components=2), sure(torch.arange(2), 2).expand(8, -1, -1).clone())
    with torch.no_grad():
        head.moves.linear.bias.copy_(torch.tensor([0.9, 0.1, 0.1, 0.9], dtype=torch.float64).log())
    x = laws.all_sequences(2, 8)
    flips = (x[:, 1:] != x[:, :-1]).sum(1).double()
    expected = math.log(0.5) + flips * math.log(0.1) + (7 - flips) * math.log(0.9)
    torch.testing.assert_close(laws.scores(head, h, x), expected, rtol=0, atol=FP64)
    q = expected.exp()
    entropy = -(q * expected).sum().item()
    assert 8 * math.log(2) - entropy == pytest.approx(2.5764, abs=5e-5), "its total correlation"


# --- short fits of the heads as they are built ---


def fitted(config, x, vocabulary, steps, seed=0):
    torch.manual_seed(seed)
    head = build(config, 16, vocabulary, heads=2).double()
    h = torch.randn(x.shape[1], 16, dtype=torch.float64)
    return laws.fitted(head, h, x, steps), h


@pytest.mark.parametrize(
    ("config", "x", "steps"),
    [
        (HeadConfig("mixture", components=8), HANDS4, 150),  # twice what is needed: components get lost
        (HeadConfig("chain", components=8), HANDS4, 150),
        (HeadConfig("autoregressive"), HANDS4, 100),
        (HeadConfig("autoregressive"), HANDS5, 100),
        (HeadConfig("uniform_conditioned"), HANDS4, 100),
    ],
)
def test_joint_heads_learn_what_two_cards_share(config, x, steps):
    head, h = fitted(config, x, 5, steps)
    # Adam is still on its way; the product is log 4 = 1.39 away
    assert laws.divergence(head, h, x).item() < 0.02


def test_a_product_learns_nothing_of_it():
    head, h = fitted(HeadConfig(), HANDS4, 4, 150)
    assert laws.divergence(head, h, HANDS4).item() == pytest.approx(math.log(4), abs=1e-3)
