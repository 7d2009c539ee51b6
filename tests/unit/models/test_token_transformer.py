"""The transformer over tokens: what sees what, where positions come from, and what changes nothing."""

import pytest
import torch

from imm_scale import rng
from imm_scale.errors import UserError
from imm_scale.models import token_layers
from imm_scale.models.heads import HeadConfig
from imm_scale.models.token_layers import TokenAttention, rotary_angles, rotated
from imm_scale.models.token_transformer import TokenModelConfig, TokenTransformer
from tests.unit.methods.tokens import toy
from tests.unit.models.heads.laws import KINDS

V, T = 5, 6


def _net(causal, **settings):
    return toy.token_net(T, V, causal, **settings).model


def _inputs(samples=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(V + 1, (samples, T), generator=generator)
    return x, torch.arange(samples) % 3


def _sensitivity(net):
    """(T, T): how much each state changes with each token's embedding."""
    seen = []
    net.x_embedder.register_forward_hook(lambda module, args, out: seen.append(out) or None)
    h = net(*_inputs())
    rows = [torch.autograd.grad(h[:, i].square().sum(), seen[0], retain_graph=True)[0] for i in range(T)]
    return torch.stack([row.abs().amax(dim=(0, 2)) for row in rows])


@pytest.mark.parametrize("positions", ["learned", "rotary", "both"])
@pytest.mark.parametrize("causal", [True, False])
def test_what_a_state_depends_on(causal, positions):
    seen = _sensitivity(_net(causal, positions=positions)) > 0
    assert torch.equal(seen, torch.ones(T, T).bool().tril() if causal else torch.ones(T, T).bool())


def test_tokens_reach_each_other_from_the_first_step_on():
    """Gates of 0 would leave each state to its own token, and the net at the marginals of each place for long."""
    torch.manual_seed(0)
    seen = _sensitivity(TokenTransformer(toy.architecture(T, V, causal=False)))
    assert seen.min() > 1e-3 * seen.diag().min(), "of gates of 0 it would be 0, off the diagonal"


def test_another_head_starts_on_a_trained_net():
    """All but the head, and of the head what both have; nothing of either is changed by it."""
    source, net = _net(False), TokenTransformer(toy.architecture(T, V, False, head=HeadConfig("mixture", 3))).double()
    own = {name: value.clone() for name, value in net.state_dict().items()}
    made, notes = net.adapted(source.state_dict(), source.config, (0, 1), True)
    assert made.keys() == own.keys() and notes == ["the head is new, of kind mixture, but for 2 of its weights"]
    for name, value in made.items():
        there = source.state_dict().get(name)
        assert torch.equal(value, own[name] if there is None else there), name
    assert not any(torch.equal(value, own[name]) for name, value in made.items() if "unembed" in name)
    assert net.adapted(source.state_dict(), source.config, (0, 1), True)[0] is not made
    assert source.adapted(made, source.config, (0, 1), True) == (made, [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_ahead_is_scored_from_the_tokens_before_it_alone(kind):
    """Of the blocks that begin at n, none depends on what the input has at n or after."""
    net = _net(True, block=2, head=KINDS[kind])
    before, label = _inputs(1)
    target = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(1))
    scored = torch.ones(1, T, dtype=torch.bool)
    with torch.no_grad():
        plain = net(before, label, target, scored).log_prob_N
        for n in range(1, T):
            other = torch.cat([before[:, :n], (before[:, n:] + 1) % V], dim=1)
            changed = net(other, label, target, scored).log_prob_N
            assert torch.equal(changed[:n], plain[:n]) and not torch.equal(changed[n:], plain[n:])
        some = torch.arange(T) % 2 == 0
        assert torch.equal(net(before, label, target, some[None]).log_prob_N, torch.where(some, plain, 0.0))


def test_rotations_are_products_of_complex_numbers():
    """Channels k and k + 4 of eight are real and imaginary part; each pair turns by place x 10000^(-k/4)."""
    q = torch.randn(2, 3, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    place = torch.tensor([[0, 1, 7], [2, 1000, 5]])
    turns = place[..., None, None] * 10000.0 ** (-torch.arange(4) / 4)
    expected = torch.complex(q[..., :4], q[..., 4:]) * torch.polar(torch.ones(()), turns.float())
    # fp32 sines and cosines of angles up to 1,000 (whose spacing is 6e-5), times values of order 1.
    actual = rotated(q, rotary_angles(place, 8))
    torch.testing.assert_close(actual, torch.cat([expected.real, expected.imag], -1), rtol=0, atol=5e-4)
    torch.testing.assert_close(actual[place < 10], torch.cat([expected.real, expected.imag], -1)[place < 10])


@pytest.mark.parametrize("causal", [True, False])
def test_rotary_attention_knows_distances_alone(causal):
    torch.manual_seed(0)
    attention = TokenAttention(16, 2, False, "sdpa", causal, rotary=True)
    x, place = torch.randn(2, T, 16), torch.arange(T).expand(2, -1)
    out = attention(x, place)
    # fp32 angles up to 30 times values of order 1.
    torch.testing.assert_close(attention(x, place + 23), out, rtol=0, atol=2e-5)
    assert not torch.allclose(attention(x, 2 * place), out, atol=1e-2)
    plain = TokenAttention(16, 2, False, "sdpa", causal, rotary=False)
    assert torch.equal(plain(x, place), plain(x, 2 * place)), "positions are added to what it is given"


@pytest.mark.parametrize("positions", ["learned", "rotary", "both"])
def test_places_and_labels_tell_apart(positions):
    net = _net(False, positions=positions)
    with torch.no_grad():
        masks = net(torch.full((1, T), V), torch.zeros(1, dtype=torch.int64))[0]
        alike = torch.allclose(masks, masks[:1], atol=1e-9)
        assert alike == (positions == "rotary"), "of masks alone distances say nothing"
        mixed = net(torch.tensor([[0, 1, 2, 3, 1, 1]]), torch.zeros(1, dtype=torch.int64))[0]
        assert not torch.allclose(mixed[4], mixed[5], atol=1e-3)
        x = torch.arange(T).expand(3, -1) % V
        states = net(x, torch.tensor([0, 1, net.null_label]))
        assert (states[0] - states[1]).abs().max() > 1e-3 and (states[1] - states[2]).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_recomputed_blocks_give_the_same_gradients(causal):
    net, (x, label) = _net(causal, dropout=0.3, head=KINDS["chain"], block=3 if causal else 1), _inputs()
    net.train()
    args = (x, label, x % V, torch.ones_like(x, dtype=torch.bool), torch.arange(3))
    gradients = []
    for net.activation_checkpointing in (False, True):
        net.zero_grad()
        net(*args).log_prob_N.sum().backward()
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_blocks_compiled_one_by_one_share_a_graph():
    torch.compiler.reset()
    net, (x, label) = _net(True, depth=10), _inputs()
    expected, graphs = net(x, label), []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    for block in net.blocks:  # as compile_blocks does, with a backend that counts
        block.compile(backend=counting, fullgraph=True)
    torch.testing.assert_close(net(x, label), expected, rtol=0, atol=1e-12)
    assert len(graphs) == 1


def test_dropout_is_a_function_of_keys(monkeypatch):
    masks, original = [], token_layers.keyed_dropout

    def spy(x, *args, **kwargs):
        out = original(x, *args, **kwargs)
        masks.append(out == 0)
        return out

    monkeypatch.setattr(token_layers, "keyed_dropout", spy)
    net, (x, label) = _net(False, dropout=0.5, head=HeadConfig()), _inputs()
    net.train()
    key = rng.random_bits(0, "dropout", torch.arange(3))
    net(x, label, dropout_key=key)
    net(x[1:], label[1:], dropout_key=key[1:])
    assert len(masks) == 8, "two in each of two blocks, twice"
    for whole, part in zip(masks[:4], masks[4:], strict=True):
        assert torch.equal(whole[1:], part) and 0.3 < whole.double().mean() < 0.7
    assert len({tuple(mask.flatten().tolist()) for mask in masks[:4]}) == 4
    masks.clear()
    net.eval()(x, label, dropout_key=key)
    assert not any(mask.any() for mask in masks)


def test_a_new_net_predicts_near_the_uniform_law():
    """Logits of order 0.5: log V and a little for each token."""
    torch.manual_seed(0)
    net = TokenTransformer(toy.architecture(T, V, False, width=64))
    x, label = _inputs(64)
    with torch.no_grad():
        log_p = net(x, label, x % V, torch.ones_like(x, dtype=torch.bool)).log_prob_N
    assert -float(log_p.mean()) / T == pytest.approx(torch.tensor(V).log().item(), abs=0.3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"width": 12, "heads": 5}, r"model\.width=12 over model\.heads=5"),
        ({"width": 12, "heads": 4}, r"even number of channels a head"),
        ({"block": 2}, r"model\.block=2 is for causal nets: set model\.causal=true"),
        ({"mlp_ratio": 0.001, "width": 8, "heads": 2}, r"model\.mlp_ratio=0\.001"),
        ({"head": HeadConfig(components=3)}, r"model\.head\.components=3 with model\.head\.kind=factorized"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        TokenModelConfig(**settings).validate()


def test_positions_are_both_where_masks_stand_alone():
    """Digits in 500 steps of a small masked net: 26.3 nats a held-out image by distances alone, 19.9 by places."""
    sizes = {"length": 8, "vocabulary": 2, "num_classes": 1}
    chosen = {causal: TokenModelConfig(causal=causal).architecture(**sizes).positions for causal in (False, True)}
    assert chosen == {False: "both", True: "rotary"}
    assert TokenModelConfig(positions="learned").architecture(**sizes).positions == "learned"


@pytest.mark.parametrize("block", [1, 2])
def test_a_chain_over_one_token_says_that_it_never_goes_on(block):
    """The note stands where some weights of the head have no gradient, and there alone."""
    head = HeadConfig("chain", 3)
    net = toy.token_net(T, V, True, block=block, head=head).model
    x, label = _inputs()
    x = x.clamp(max=V - 1)
    net(x, label, x, torch.ones_like(x, dtype=torch.bool), None, None).nll.sum().backward()
    idle = [name for name, p in net.head.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    notes = TokenModelConfig(causal=True, block=block, head=head).cautions(False)
    assert bool(idle) == (block == 1) == any("chain with model.block=1" in note for note in notes), idle


def test_a_block_longer_than_the_sequence_is_refused():
    with pytest.raises(UserError, match=r"model\.block=7 is longer than the sequences, of 6 tokens"):
        TokenModelConfig(causal=True, block=7).architecture(length=6, vocabulary=2, num_classes=1)
