"""Chunked normalizers against torch's whole ones, and what they keep in memory."""

import pytest
import torch

from imm_scale.models.heads import unembedding
from imm_scale.models.heads.unembedding import Unembedding, inverse_cdf
from tests.unit.models.heads.laws import Largest

# A sum of at most 50 fp64 terms of order 1, in another order.
FP64 = 1e-12


@pytest.fixture
def small_chunks(monkeypatch):
    """Pieces of 5 states and 3 tokens, with remainders of both."""
    monkeypatch.setattr(unembedding, "_ROWS", 5)
    monkeypatch.setattr(unembedding, "CELLS", 15)


def _case(rows=7, width=4, vocabulary=11, dtype=torch.float64):
    torch.manual_seed(0)
    unembed = Unembedding(width, vocabulary).to(dtype)
    with torch.no_grad():
        unembed.bias.normal_()
    return unembed, torch.randn(rows, width, dtype=dtype, requires_grad=True), torch.randint(vocabulary, (rows,))


def test_chunks_answer_what_the_whole_does(small_chunks):
    unembed, h, x = _case()
    weights = torch.randn(7, dtype=torch.float64)
    parts = h, unembed.weight, unembed.bias
    chunked = unembed(h, x)
    whole = torch.nn.functional.linear(*parts).log_softmax(1).gather(1, x[:, None])[:, 0]
    torch.testing.assert_close(chunked, whole, rtol=0, atol=FP64)
    grads = [torch.autograd.grad((out * weights).sum(), parts) for out in (chunked, whole)]
    for ours, stock in zip(*grads, strict=True):
        torch.testing.assert_close(ours, stock, rtol=0, atol=FP64)


def test_gradients_by_finite_differences(small_chunks):
    unembed, h, x = _case()
    score = unembedding._TokenLogProb.apply
    assert torch.autograd.gradcheck(lambda *parts: score(*parts, x), (h, unembed.weight, unembed.bias))


@pytest.mark.parametrize(("rows", "vocabulary"), [(64, 500), (512, 500), (64, 4000), (512, 4000)])
def test_neither_pass_forms_all_logits(monkeypatch, rows, vocabulary):
    monkeypatch.setattr(unembedding, "_ROWS", 32)
    monkeypatch.setattr(unembedding, "CELLS", 32 * 100)
    unembed, h, x = _case(rows, 2, vocabulary, torch.float32)
    kept = []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        unembed(h, x).sum().backward()
    # One piece of logits, or the weights and their gradient; all logits would be 10 to 640 pieces.
    assert largest.numbers <= max(32 * 100, vocabulary * 2)
    kept_numbers = sum(
        t.numel() for t in kept if t.data_ptr() not in (unembed.weight.data_ptr(), unembed.bias.data_ptr())
    )
    assert kept_numbers == rows * 2 + 2 * rows, "states, tokens and normalizers"


@pytest.mark.parametrize("autocast", [False, True])
def test_scores_are_fp32_under_autocast(autocast):
    unembed, h, x = _case(dtype=torch.float32)
    exact = torch.nn.functional.linear(h.double(), unembed.weight.double(), unembed.bias.double()).log_softmax(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        picked, everything = unembed(h, x), unembed(h)
    assert picked.dtype == everything.dtype == torch.float32
    # fp32 products of 4 terms of order 1: bf16 would be off by 1e-2.
    torch.testing.assert_close(everything.double(), exact, rtol=0, atol=2e-6)
    torch.testing.assert_close(picked.double(), exact.gather(1, x[:, None])[:, 0], rtol=0, atol=2e-6)


def test_the_interval_of_a_token_is_where_it_is_drawn(small_chunks):
    unembed, h, _ = _case()
    probability = unembed(h).exp().detach()
    for token in range(11):
        x = torch.full((7,), token)
        below, mass = unembed(h, x, interval=True)
        torch.testing.assert_close(below, probability[:, :token].sum(1), rtol=0, atol=FP64)
        torch.testing.assert_close(mass, probability[:, token], rtol=0, atol=FP64)
        for inside in (1e-9, 0.5, 1 - 1e-9):  # far wider than the rounding of the sums
            assert unembed.draw(h, below + inside * mass).tolist() == x.tolist()


def test_tokens_of_probability_0_are_never_drawn():
    log_prob = torch.tensor([-torch.inf, 0.3, -torch.inf, 1.0, -torch.inf], dtype=torch.float64)
    uniform = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)  # the ends of what a uniform may be
    assert inverse_cdf(log_prob.expand(2, 5), uniform).tolist() == [1, 3]


def test_rare_tokens_are_drawn():
    """One of 2^-40: no fp32 uniform is so near to 1."""
    log_prob = torch.tensor([0.0, -40 * torch.log(torch.tensor(2.0, dtype=torch.float64))], dtype=torch.float64)
    assert inverse_cdf(log_prob, torch.tensor(1 - 2.0**-41, dtype=torch.float64)) == 1
    assert inverse_cdf(log_prob, torch.tensor(1 - 2.0**-39, dtype=torch.float64)) == 0
