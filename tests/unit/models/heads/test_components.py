"""Mixtures and chains against sums over their latent variables, and what they keep in memory."""

import itertools
import math

import pytest
import torch

from imm_scale.models.heads import HeadConfig, build, unembedding
from tests.unit.models.heads import laws

# Sums of a few dozen fp64 terms, in another order.
FP64 = 1e-12
K, D, V = 4, 8, 3


@pytest.mark.parametrize("kind", ["mixture", "chain"])
def test_one_component_is_the_factorized_head(kind):
    """With nothing set: that of the same unembedding."""
    torch.manual_seed(0)
    head, product = (build(HeadConfig(name), D, V, heads=1).double() for name in (kind, "factorized"))
    product.unembed.load_state_dict(head.unembed.state_dict())
    h, x = laws.states(1, K, D)[0], laws.all_sequences(V, K)
    torch.testing.assert_close(laws.scores(head, h, x), laws.scores(product, h, x), rtol=0, atol=FP64)


@pytest.mark.parametrize("kind", ["mixture", "chain"])
def test_one_component_is_a_product_whatever_its_weights(kind):
    head, x = laws.random_head(HeadConfig(kind), D, V), laws.all_sequences(V, K)
    h = laws.states(1, K, D)[0]
    tokens_KV = head.unembed(head.states(h)[:, 0])
    expected = tokens_KV.expand(len(x), -1, -1).gather(2, x[..., None])[..., 0].sum(1)
    torch.testing.assert_close(laws.scores(head, h, x), expected, rtol=0, atol=FP64)


@pytest.mark.parametrize("kind", ["mixture", "chain"])
def test_components_start_apart_in_what_they_say_of_single_positions(kind):
    """Not only in a shift of all positions alike, which is all that an e_r beside an MLP at 0 makes."""
    torch.manual_seed(0)
    head = build(HeadConfig(kind, components=4), 64, 2, heads=4)
    h = torch.randn(16, 64)
    shift_KRD = (head.states(h) - h[:, None]).detach()
    of_positions = (shift_KRD - shift_KRD.mean(dim=0)).std()
    # g_r norm(h): products of a normal of 0.3, less the mean of 4, and one of 1.
    assert of_positions.item() == pytest.approx(0.3 * math.sqrt(3 / 4), rel=0.15)


@pytest.mark.parametrize("scored", [[1, 1, 1, 1], [1, 0, 1, 1]])
def test_the_forward_algorithm_sums_over_hidden_paths(scored):
    head, places = laws.random_head(HeadConfig("chain", components=3), D, V), [j for j in range(K) if scored[j]]
    h, x = laws.states(1, K, D)[0], torch.tensor([2, 0, 1, 1])
    start = head.weights(h[places].mean(0)[None])[0]
    emissions = head.unembed(head.states(h))
    total = 0.0
    for path in itertools.product(range(3), repeat=len(places)):
        log = start[path[0]] + emissions[places[0], path[0], x[places[0]]]
        for before, after, z0, z1 in zip(places[:-1], places[1:], path[:-1], path[1:], strict=True):
            log = log + head.moves(h[after][None], x[before])[0, z0, z1] + emissions[after, z1, x[after]]
        total += log.exp().item()
    ours = head.log_prob(h[None], x[None], torch.tensor([scored]).bool())
    assert ours.item() == pytest.approx(math.log(total), abs=FP64)


def test_groups_are_mixtures_of_their_own():
    """Of the tokens of S in twos: one of two, and one of the one that is left."""
    config = HeadConfig("mixture", components=3, group=2)
    head, h = laws.random_head(config, D, V), laws.states(1, K, D)
    x = torch.tensor([[2, 0, 1, 1]])
    whole, first, last = (torch.tensor([s]).bool() for s in ([1, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]))
    parts = head.log_prob(h, x, first) + head.log_prob(h, x, last)
    torch.testing.assert_close(head.log_prob(h, x, whole), parts, rtol=0, atol=FP64)


@pytest.mark.parametrize("group", [4, 7])
def test_a_group_of_all_tokens_is_no_grouping(group):
    one = laws.random_head(HeadConfig("mixture", components=3), D, V)
    other = laws.random_head(HeadConfig("mixture", components=3, group=group), D, V)
    h, x = laws.states(1, K, D)[0], laws.all_sequences(V, K)
    assert laws.scores(one, h, x).equal(laws.scores(other, h, x))


def test_components_start_apart_with_even_weights():
    torch.manual_seed(0)
    head = build(HeadConfig("mixture", components=4), 64, 10, heads=1)
    h = torch.randn(5, K, 64)
    out = head(h, torch.zeros(5, K, dtype=torch.int64), torch.ones(5, K).bool())
    assert out.monitors["component_entropy"].tolist() == pytest.approx([math.log(4)] * 5, abs=1e-6)
    probability_RV = head.unembed(head.states(h[:1, 0]))[0].exp()
    apart = [(p - q).abs().sum().item() / 2 for p, q in itertools.combinations(probability_RV, 2)]
    assert min(apart) > 0.1, "total variation between any two"


def test_monitors_name_a_dead_component():
    head = build(HeadConfig("mixture", components=3, group=2), D, V, heads=1)
    with torch.no_grad():
        head.weights.linear.bias.copy_(torch.tensor([0.5, 0.5, 1e-9]).log())
    scored = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 1]]).bool()
    monitors = head(torch.randn(2, K, D), torch.zeros(2, K, dtype=torch.int64), scored).monitors
    # fp32, and the third takes 2e-8 of entropy
    assert monitors["component_entropy"].tolist() == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert monitors["component_2"].tolist() == pytest.approx([1e-9] * 2, rel=1e-4)
    assert not any(part.requires_grad for part in monitors.values())


def test_monitors_of_a_chain_say_which_states_it_takes():
    """One that walks 0, 1, 2, 2 of four states, whatever the tokens."""
    head = build(HeadConfig("chain", components=4), D, V, heads=1)
    with torch.no_grad():
        head.weights.linear.bias.copy_(torch.tensor([40.0, 0, 0, 0]))
        head.moves.linear.bias.copy_(40.0 * torch.nn.functional.one_hot(torch.tensor([1, 2, 2, 0]), 4).flatten())
    out = head(torch.randn(1, K, D), torch.tensor([[0, 2, 1, 1]]), torch.ones(1, K).bool())
    shares = [out.monitors[f"component_{r}"].item() for r in range(4)]
    assert shares == pytest.approx([0.25, 0.25, 0.5, 0.0], abs=1e-6)


@pytest.mark.parametrize("config", [HeadConfig("mixture", components=16), HeadConfig("chain", components=16)])
@pytest.mark.parametrize("vocabulary", [100, 1000])
def test_a_training_pass_never_holds_components_times_vocabulary(monkeypatch, config, vocabulary):
    monkeypatch.setattr(unembedding, "CELLS", 1 << 14)
    monkeypatch.setattr(unembedding, "_ROWS", 1 << 6)
    n = 8
    head, h = build(config, D, vocabulary, heads=1), torch.randn(n, K, D)
    h.requires_grad_()
    with laws.Largest() as largest:
        head(h, torch.zeros(n, K, dtype=torch.int64), torch.ones(n, K).bool()).log_prob_N.sum().backward()
    # A chunk, a weight or its gradient, or a number for each component of each position: D, and R^2 of a chain's moves
    table = vocabulary * 16**2 if config.kind == "chain" else 0
    assert largest.numbers <= max(1 << 14, vocabulary * D, table, n * K * 16 * 16)
    if config.kind == "mixture" and vocabulary == 1000:
        assert largest.numbers < n * K * 16 * vocabulary / 30
