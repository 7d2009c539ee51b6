"""What every head must be: a law of the tokens of S, whose parts agree with each other."""

import pytest
import torch

from imm_scale.errors import UserError
from imm_scale.models.heads import HeadConfig, build
from tests.unit.models.heads.laws import KINDS, all_sequences, random_head, states

V, K, D = 3, 4, 8
EVERYTHING = all_sequences(V, K)
# Sums of 81 fp64 numbers whose logarithms went through some hundred operations.
FP64 = 1e-12
SETS = [[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 1, 1], [0, 0, 1, 0]]

every_head = pytest.mark.parametrize("kind", KINDS)


def _case(kind, scored=None, rows=81):
    h = states(1, K, D).expand(rows, -1, -1)
    return random_head(KINDS[kind], D, V), h, torch.tensor(scored or [1] * K).bool().expand(rows, -1)


@every_head
@pytest.mark.parametrize("scored", SETS)
def test_it_is_a_law_of_the_scored_tokens(kind, scored):
    head, h, scored_NK = _case(kind, scored)
    q = head.log_prob(h, EVERYTHING, scored_NK).exp()
    outside = V ** (K - sum(scored))  # tokens elsewhere are not read, so that all of theirs count the same x^S again
    assert q.sum().item() / outside == pytest.approx(1.0, abs=FP64)
    assert q.min() > 0


@every_head
def test_each_sample_may_have_a_set_of_its_own(kind):
    head, h, _ = _case(kind, rows=5)
    sets, x = torch.tensor([*SETS, [0] * 4]).bool(), EVERYTHING[[3, 50, 27, 80, 9]]
    together = head.log_prob(h, x, sets)
    alone = torch.cat([head.log_prob(h[i : i + 1], x[i : i + 1], sets[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=FP64)
    assert together[4] == 0.0, "the empty set"
    bad = torch.where(sets, x, 10**6)  # a mask, or anything: it is not read
    assert head.log_prob(h, bad, sets).equal(together)


@every_head
@pytest.mark.parametrize("scored", SETS)
def test_the_conditionals_multiply_to_the_joint_law(kind, scored):
    head, h, scored_NK = _case(kind, scored)
    state, total = head.begin(h, scored_NK), torch.zeros(len(h), dtype=torch.float64)
    for j in range(K):
        log_NV = head.conditional(state, j)
        assert log_NV.dtype == torch.float64
        torch.testing.assert_close(log_NV.exp().sum(1), torch.ones(len(h)).double(), rtol=0, atol=FP64)
        total += log_NV.gather(1, EVERYTHING[:, j : j + 1])[:, 0] * scored[j]
        state = head.observe(state, j, EVERYTHING[:, j])
    torch.testing.assert_close(total, head.log_prob(h, EVERYTHING, scored_NK), rtol=0, atol=FP64)


@pytest.mark.parametrize("kind", ["factorized", "mixture", "groups of 2", "chain"])
@pytest.mark.parametrize("scored", SETS)
def test_marginals_are_those_of_the_joint_law(kind, scored):
    head, h, scored_NK = _case(kind, scored)
    q = head.log_prob(h, EVERYTHING, scored_NK).exp() / V ** (K - sum(scored))
    marginals_KV = head.marginals(h[:1], scored_NK[:1])[0].exp()
    for j in (j for j in range(K) if scored[j]):
        summed_V = torch.stack([q[EVERYTHING[:, j] == v].sum() for v in range(V)])
        torch.testing.assert_close(marginals_KV[j], summed_V, rtol=0, atol=FP64)
    assert torch.equal(head.marginals(h[:1]), head.marginals(h[:1], torch.ones(1, K).bool()))


@pytest.mark.parametrize("kind", ["autoregressive", "uniform_conditioned"])
def test_marginals_of_a_sequential_head_are_those_of_sets_of_one(kind):
    head, h, _ = _case(kind, rows=V)
    for j in range(K):
        alone = torch.arange(K).eq(j).expand(V, -1)
        x = torch.arange(V)[:, None].expand(-1, K)
        torch.testing.assert_close(head.marginals(h[:1])[0, j], head.log_prob(h, x, alone), rtol=0, atol=FP64)


def chi_squared(x_NK, q):
    """Of draws against probabilities of all 81 sequences."""
    counts = torch.bincount((x_NK * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81)
    expected = q * len(x_NK)
    assert not counts[expected == 0].any()
    return float(((counts - expected) ** 2 / expected)[expected > 0].sum())


def _sample_of(head, h, scored, draws, seed=0):
    uniforms = torch.rand(draws, K, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return head.sample(h[:1].expand(draws, -1, -1), torch.tensor(scored).bool().expand(draws, -1), uniforms)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "uniform_conditioned"])
@pytest.mark.parametrize("scored", [SETS[0], SETS[2]])
def test_draws_are_as_frequent_as_they_are_likely(kind, scored):
    head, h, scored_NK = _case(kind, scored)
    drawable = (EVERYTHING.masked_fill(scored_NK, 0) == 0).all(1)  # 0 where not scored
    q = head.log_prob(h, EVERYTHING, scored_NK).exp().detach() * drawable
    # Of 80 degrees of freedom or 26: 1 in 10,000 above 132. The seed is fixed, so this cannot fail by chance.
    assert chi_squared(_sample_of(head, h, scored, 10_000), q) < 132


@every_head
def test_tokens_that_are_not_scored_are_drawn_as_0(kind):
    head, h, _ = _case(kind)
    x = _sample_of(head, h, SETS[2], 300)
    assert x.dtype == torch.int64 and x.shape == (300, K)
    assert (x[:, 1] == 0).all() and all(x[:, j].any() for j in (0, 2, 3))
    assert _sample_of(head, h, [0] * K, 2).tolist() == [[0] * K] * 2


@every_head
def test_a_sample_does_not_depend_on_its_batch(kind):
    head = random_head(KINDS[kind], D, V)
    h, uniforms = states(12, K, D), torch.rand(12, K, 2, dtype=torch.float64)
    sets = torch.tensor([*SETS, [0] * 4, [1, 0, 0, 0]] * 2).bool()
    together = head.sample(h, sets, uniforms)
    alone = torch.cat([head.sample(h[i : i + 1], sets[i : i + 1], uniforms[i : i + 1]) for i in range(12)])
    assert together.equal(alone)
    assert head.sample(h.flip(0), sets.flip(0), uniforms.flip(0)).flip(0).equal(together)


@every_head
def test_gradients_by_finite_differences(kind):
    head = random_head(KINDS[kind], 4, V)
    scored, x = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool(), torch.tensor([[2, 0, 1], [1, 1, 0]])
    names = [name for name, _ in head.named_parameters()]
    uniforms = torch.tensor([[0.3, 0.6, 0.1], [0.9, 0.2, 0.5]], dtype=torch.float64)

    def loss(h, *weights):
        out = torch.func.functional_call(head, dict(zip(names, weights, strict=True)), (h, x, scored, uniforms))
        # What is placed in the teacher's intervals carries no gradient: that loss has a test of its own.
        return out.log_prob_N

    inputs = (states(2, 3, 4).requires_grad_(), *(p.detach().requires_grad_() for p in head.parameters()))
    # One random direction of all inputs at once: 1e-6 of a step leaves 1e-6 of the derivative.
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@every_head
def test_every_parameter_gets_a_gradient_even_of_empty_sets(kind):
    """ZeRO waits for all of them."""
    head, h, scored_NK = _case(kind, rows=3)
    out = head(h, EVERYTHING[:3], scored_NK & False, torch.rand(3, K, dtype=torch.float64))
    (out.log_prob_N.sum() + (0.0 if out.teaching_N is None else out.teaching_N.sum())).backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


@every_head
def test_probabilities_are_fp32_under_autocast(kind):
    head, h, scored_NK = _case(kind, rows=6)
    head, h, x = head.float(), h.float(), EVERYTHING[:6]
    with torch.autocast("cpu", torch.bfloat16):
        out = head(h, x, scored_NK, torch.rand(6, K, dtype=torch.float64))
        assert head.marginals(h).dtype == torch.float32
        head.sample(h, scored_NK, torch.rand(6, K, 2, dtype=torch.float64))
        assert head.conditional(head.begin(h, scored_NK), 0).dtype == torch.float64
    assert out.log_prob_N.dtype == torch.float32
    exact = head.double().log_prob(h.double(), x, scored_NK)
    # Four tokens, whose states of order 1 went through a few layers of 8 bits.
    torch.testing.assert_close(out.log_prob_N.double(), exact, rtol=0.02, atol=0.1)


@every_head
def test_a_training_pass_reads_nothing_back(kind):
    """On tensors without data: the set S is not looked at by the host, and the planner can count the pass."""
    with torch.device("meta"):
        head = build(KINDS[kind], D, V, heads=2)
        h, x, scored = torch.zeros(2, K, D), torch.zeros(2, K, dtype=torch.int64), torch.ones(2, K).bool()
        out = head(h, x, scored, torch.zeros(2, K, dtype=torch.float64))
    (out.log_prob_N if out.teaching_N is None else out.log_prob_N + out.teaching_N).sum().backward()
    assert all(p.grad is not None for p in head.parameters())


@every_head
def test_a_single_position(kind):
    head, h, _ = _case(kind, rows=V)
    one = torch.ones(V, 1).bool()
    q = head.log_prob(h[:, :1], torch.arange(V)[:, None], one).exp()
    assert q.sum().item() == pytest.approx(1.0, abs=FP64)
    assert head.sample(h[:, :1], one, torch.rand(V, 1, 2).double()).shape == (V, 1)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (HeadConfig("factorized", components=2), r"components=2.*factorized.*use kind=mixture or chain"),
        (HeadConfig("autoregressive", components=4), r"components=4.*autoregressive.*components=1"),
        (HeadConfig("uniform_conditioned", components=4), r"components=4.*uniform_conditioned"),
        (HeadConfig("chain", components=4, group=2), r"group=2.*chain.*use kind=mixture, or group=null"),
    ],
)
def test_keys_of_other_kinds_are_refused(config, said):
    with pytest.raises(UserError, match=said):
        build(config, D, V, heads=2)
