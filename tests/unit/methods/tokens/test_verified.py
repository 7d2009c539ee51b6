"""Verified decoding: the law of one token at a time, in as many passes as enumeration says."""

import math

import pytest
import torch
from torch import nn

from imm_scale.errors import UserError
from imm_scale.methods.tokens.blocks import blocks
from imm_scale.methods.tokens.verified import decode, verified
from imm_scale.models.heads import HeadConfig
from tests.unit.methods.tokens import toy
from tests.unit.models.heads.laws import KINDS

V, T, N = 3, 4, 10_000
CASES = [*((kind, 3) for kind in KINDS), ("mixture", 2), ("factorized", 1)]


def _net(kind, block, length=T, vocabulary=V, **settings):
    return toy.token_net(length, vocabulary, causal=True, block=block, head=KINDS[kind], **settings)


def _prompted(net, samples, known):
    start = toy.masks(net, samples)
    start[:, : len(known)] = torch.tensor(known)
    return start


@pytest.mark.parametrize(("kind", "block"), CASES)
def test_the_law_and_the_passes_are_those_of_enumeration(kind, block):
    net = _net(kind, block)
    laws, index = toy.CausalLaws(net), torch.arange(N)
    x, acceptance = decode(net, toy.masks(net, N), toy.no_label(N), toy.steps(index))
    law = laws.sequences()
    assert law.sum().item() == pytest.approx(1.0, abs=1e-9) and toy.chi_square(x, law, V) > toy.ALPHA
    passes = acceptance.passes.double()
    expected = 1.0 + laws.rounds()  # one pass over what is given, here the beginning alone
    assert expected < T + (block == 1), "drafts that were never kept would prove nothing"
    # 5 standard errors, of nothing where every draft is one token: T passes and that over the beginning.
    assert float(passes.mean()) == pytest.approx(expected, abs=5 * float(passes.std()) / math.sqrt(N))
    assert acceptance.drawn.tolist() == [T] * N
    assert acceptance.tokens_a_pass == pytest.approx(T * N / float(passes.sum()))


def test_a_prompt_is_kept_and_conditions_what_follows():
    net, known = _net("mixture", 3), (2, 0)
    laws = toy.CausalLaws(net)
    x, acceptance = decode(net, _prompted(net, N, known), toy.no_label(N), toy.steps(torch.arange(N)))
    assert (x[:, :2] == torch.tensor(known)).all()
    assert toy.chi_square(x, laws.sequences(known), V) > toy.ALPHA
    passes = acceptance.passes.double()
    assert float(passes.mean()) == pytest.approx(1.0 + laws.rounds(known), abs=5 * float(passes.std()) / math.sqrt(N))


@pytest.mark.parametrize("sampler", [verified, blocks])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_all_lengths_share_a_batch_and_change_nothing(sampler, kind):
    """Sample i is a function of i, its prompt and its label: the batch around it decides nothing."""
    length = 6
    net = _net(kind, 3, length)
    start, label = toy.masks(net, 14), torch.arange(14) % 3  # 2 is "no label"
    for i in range(14):
        start[i, : i % 7] = torch.arange(i % 7) % V
    together = sampler(net, start, label, toy.steps(torch.arange(14)))
    assert (together < V).all() and torch.equal(torch.where(start == V, V, together), start)
    for i in range(14):
        alone = sampler(net, start[i : i + 1], label[i : i + 1], toy.steps(torch.tensor([i])))
        assert torch.equal(alone[0], together[i]), i
    assert len(together[start == V].unique()) > 1


def test_tokens_behind_one_that_is_to_be_drawn_are_refused():
    net = _net("factorized", 2)
    start = toy.masks(net, 2)
    start[1, 2] = 0
    for sampler in (verified, blocks):
        with pytest.raises(UserError, match=r"behind ones that are to be drawn.*method\.name=masked"):
            sampler(net, start, toy.no_label(2), toy.steps(torch.arange(2)))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_drawn_by_the_head_from_states_of_whole_prefixes(kind):
    """Written plainly, without a cache; the last block is cut."""
    net, length, n = _net(kind, 3, length=5), 5, 40
    given = toy.steps(torch.arange(n))
    uniforms = nn.functional.pad(given.uniform(0, 2 * length).unflatten(1, (length, 2)), (0, 0, 0, 1))
    x = torch.zeros(n, 6, dtype=torch.int64)
    for at in (0, 3):
        inside = (torch.arange(at, at + 3) < length).expand(n, -1)
        x[:, at : at + 3] = net.model.head.sample(_ahead(net, x[:, :at]), inside, uniforms[:, at : at + 3])
    assert torch.equal(blocks(net, toy.masks(net, n), toy.no_label(n), given), x[:, :length])


@pytest.mark.parametrize("kind", ["factorized", "autoregressive"])
def test_blocks_of_one_token_are_ancestral_sampling(kind):
    net, n = _net(kind, 1), 40
    given = toy.steps(torch.arange(n))
    uniforms = given.uniform(0, 2 * T).unflatten(1, (T, 2))[..., 0]
    x = torch.zeros(n, T, dtype=torch.int64)
    for at in range(T):
        log_p_NV = net.model.head.marginals(_ahead(net, x[:, :at]))[:, 0]
        x[:, at] = (log_p_NV.exp().cumsum(1) <= uniforms[:, at, None]).sum(1)
    assert torch.equal(blocks(net, toy.masks(net, n), toy.no_label(n), given), x)


@torch.no_grad()
def _ahead(net, known):
    """States (N, B, D) after these tokens (N, P)."""
    before = nn.functional.pad(known, (1, 0), value=net.mask)
    return net.model.states_ahead(net.model(before, toy.no_label(len(known)))[:, -1])


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_states_against_kept_keys_are_those_of_whole_sequences(positions):
    """However the tokens come, in pieces or again over what was refused, and at a place of its own in each sample."""
    net = _net("factorized", 3, length=6, positions=positions).model
    generator = torch.Generator().manual_seed(0)
    before = torch.randint(V + 1, (4, 6), generator=generator)
    label = torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        whole = net(before, label)
        cache = net.empty_cache(4)
        first = torch.arange(4).expand(4, -1)
        pieces = [net.states_kept(before[:, :4].roll(1, 0), first, label, cache)]  # all of them will be refused
        pieces = [net.states_kept(before[:, :1], first[:, :1], label, cache)]
        start = torch.tensor([1, 1, 1, 1])
        for size in (2, 3):
            place = start[:, None] + torch.arange(size)
            pieces.append(net.states_kept(before.gather(1, place), place, label, cache))
            start = start + size
    # Angles are fp32, of values of order 1.
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-6)


def test_kept_keys_follow_autocast():
    net = toy.token_net(6, V, causal=True, block=2, width=32).model.float()
    before, place = torch.arange(12).view(2, 6) % V, torch.arange(6).expand(2, -1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = net.empty_cache(2)
        assert cache[0].keys.dtype == torch.bfloat16
        kept = net.states_kept(before, place, toy.no_label(2), cache)
        whole = net(before, toy.no_label(2))
    # A bf16 has 8 bits; states are normalized, of order 1, and two blocks round a few times each.
    torch.testing.assert_close(kept, whole, rtol=0, atol=5e-2)
    assert kept.dtype == torch.float32


def hands_by_products():
    """Two cards that are the same, four as likely: exact next cards, and a product that cannot know the second.

    Without blocks that do anything a state is the norm of the embedding of the token before, +2 and -2 at two places.
    """
    net = toy.token_net(2, 4, causal=True, block=2, head=HeadConfig())
    with torch.no_grad():
        for p in net.model.parameters():
            p.zero_()
        nn.init.ones_(net.model.norm_final.weight)
        pairs = torch.eye(4).repeat_interleave(2, dim=1) * torch.tensor([1.0, -1.0]).repeat(4)
        net.model.x_embedder.weight.copy_(torch.cat([pairs, torch.tensor([[1.0, 1, -1, -1, 1, 1, -1, -1]])]))
        net.model.head.unembed.weight.copy_(20.0 * pairs)
    return net


def test_a_product_drafts_the_second_card_right_a_quarter_of_the_time():
    net = hands_by_products()
    laws = toy.CausalLaws(net)
    torch.testing.assert_close(laws.next(()), torch.full((4,), 0.25).double(), rtol=0, atol=1e-9)
    x, acceptance = decode(net, toy.masks(net, N), toy.no_label(N), toy.steps(torch.arange(N)))
    assert (x[:, 0] == x[:, 1]).all(), "what was drafted wrong is corrected"
    assert toy.chi_square(x[:, :1], torch.full((4,), 0.25).double(), 4) > toy.ALPHA
    assert acceptance.drafted.tolist() == [N, N] and acceptance.accepted[0] == N
    # Binomial: 5 standard errors of a quarter.
    assert float(acceptance.accepted[1]) / N == pytest.approx(0.25, abs=5 * math.sqrt(3 / 16 / N))
    assert set(acceptance.passes.tolist()) == {2}
    trusted = blocks(net, toy.masks(net, N), toy.no_label(N), toy.steps(torch.arange(N)))
    assert toy.chi_square(trusted, torch.full((16,), 1 / 16).double(), 4) > toy.ALPHA
