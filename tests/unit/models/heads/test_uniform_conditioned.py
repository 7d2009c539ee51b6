"""The student that is told its randomness: what it is taught, what it draws, and how well in one pass."""

import math

import pytest
import torch

from imm_scale.models.heads import HeadConfig, build
from imm_scale.models.heads.base import positions
from imm_scale.models.heads.unembedding import inverse_cdf
from tests.unit.models.heads import laws

K, D, V = 3, 8, 4
CONFIG = HeadConfig("uniform_conditioned")


def _uniforms(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _case():
    x = laws.all_sequences(V, K)
    return laws.random_head(CONFIG, D, V), laws.states(1, K, D).expand(len(x), -1, -1), x, torch.ones_like(x).bool()


def _placed(head, h, x, uniforms, position=None):
    """Where the teacher's distribution functions put uniforms of the tokens."""
    position = positions(x) if position is None else position
    below, mass = head.teacher.unembed(head.teacher.states(h, x, position), x, interval=True)
    return below + mass * uniforms


def test_placed_uniforms_are_those_the_teacher_turns_into_the_tokens():
    head, h, x, everything = _case()
    placed = _placed(head, h, x, 0.001 + 0.998 * _uniforms(len(x), K))  # not within rounding of the ends
    state = head.begin(h, everything)
    for j in range(K):
        assert inverse_cdf(head.conditional(state, j), placed[:, j]).equal(x[:, j])
        state = head.observe(state, j, x[:, j])


def test_likelihood_is_the_teachers_and_teaching_the_students_cross_entropy():
    head, h, x, _ = _case()
    scored, uniforms = torch.tensor([1, 0, 1]).bool().expand(len(x), -1), _uniforms(len(x), K)
    out = head(h, x, scored, uniforms)
    assert out.log_prob_N.equal(head.teacher.log_prob(h, x, scored))
    assert head(h, x, scored).teaching_N is None
    short_h, short_x, everything = h[:, ::2], x[:, ::2], scored[:, ::2]
    position = torch.tensor([0, 2]).expand_as(short_x)
    placed = _placed(head, short_h, short_x, uniforms[:, ::2], position)
    log_NKV = head.unembed(head.student_states(short_h, placed, position))
    expected = -log_NKV.gather(2, short_x[..., None])[..., 0].sum(1)
    assert everything.all()
    torch.testing.assert_close(out.teaching_N, expected, rtol=0, atol=1e-12)  # six fp64 terms in another order


def test_teaching_moves_the_student_and_the_states_but_not_the_teacher():
    head, h, x, scored = _case()
    h = h.clone().requires_grad_()
    head(h, x, scored, _uniforms(len(x), K)).teaching_N.sum().backward()
    moved = {name.split(".")[0] for name, p in head.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"unembed", "embed", "transformer"} and h.grad.any()


def test_gradients_of_the_teaching_by_finite_differences():
    """Of the student's weights: what the states do to the intervals is held."""
    head = laws.random_head(CONFIG, 4, V)
    names = [name for name, _ in head.named_parameters() if not name.startswith("teacher")]
    x, scored, uniforms = torch.tensor([[3, 0, 1]]), torch.tensor([[1, 0, 1]]).bool(), _uniforms(1, 3)

    def teaching(*weights):
        args = laws.states(1, 3, 4), x, scored, uniforms
        return torch.func.functional_call(head, dict(zip(names, weights, strict=True)), args).teaching_N

    weights = [p.detach().requires_grad_() for name, p in head.named_parameters() if name in names]
    assert torch.autograd.gradcheck(teaching, weights, fast_mode=True)


def test_draws_are_as_frequent_as_the_student_says():
    """Under one set of first uniforms the second ones draw a product."""
    head, draws, first = laws.random_head(CONFIG, D, 2), 4000, torch.tensor([0.2, 0.7, 0.4], dtype=torch.float64)
    h = laws.states(1, K, D)
    uniforms = torch.stack([first.expand(draws, -1), _uniforms(draws, K)], dim=-1)
    drawn = head.sample(h.expand(draws, -1, -1), torch.ones(draws, K).bool(), uniforms)
    p_K = head.unembed(head.student_states(h, first[None], positions(first[None])))[0, :, 1].exp()
    x = laws.all_sequences(2, K)
    expected = torch.where(x == 1, p_K, 1 - p_K).prod(1).detach() * draws
    counts = torch.bincount((drawn * torch.tensor([4, 2, 1])).sum(1), minlength=8)
    # 7 degrees of freedom: 1 in 10,000 above 30. The seed is fixed.
    assert float(((counts - expected) ** 2 / expected).sum()) < 30


@pytest.fixture(scope="module")
def trained():
    """A head that saw hands4, and the states of its two cards."""
    torch.manual_seed(0)
    hands = laws.diagonal(4)
    head, h = build(CONFIG, 16, 4, heads=2), torch.randn(2, 16)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    x = hands.repeat(16, 1)
    scored = torch.ones_like(x).bool()
    for step in range(STEPS):
        out = head(h.expand(len(x), -1, -1), x, scored, _uniforms(len(x), 2, seed=step))
        optimizer.zero_grad()
        (out.teaching_N - out.log_prob_N).mean().backward()
        optimizer.step()
    return head, h


STEPS = 400


def test_one_pass_draws_hands_that_are_valid(trained):
    """A factorized head draws a valid one a quarter of the time."""
    head, h = trained
    draws = 4000
    drawn = head.sample(h.expand(draws, -1, -1), torch.ones(draws, 2).bool(), _uniforms(draws, 2, 2, seed=10**6))
    assert (drawn[:, 0] == drawn[:, 1]).double().mean() > 0.95
    # Each about 1/4: four standard errors of 4,000 draws are .027, and the student's own edges are a little off.
    assert (torch.bincount(drawn[:, 0], minlength=4) / draws - 0.25).abs().max() < 0.05


def test_the_law_of_its_draws_is_as_near_as_its_cross_entropy_says(trained):
    """KL(data | draws) <= student's cross entropy + KL(data | teacher), with uniforms on a grid."""
    head, h = trained
    hands, side = laws.diagonal(4), 100
    grid = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    pairs = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        log_NKV = head.unembed(head.student_states(h.expand(side**2, -1, -1), pairs, positions(pairs))).double()
        drawn = torch.stack([(log_NKV[:, 0, c] + log_NKV[:, 1, c]).exp().mean() for c in range(4)])
        many, uniforms = hands.repeat(side**2 // 4, 1), pairs[torch.randperm(side**2)]
        out = head(h.expand(len(many), -1, -1), many, torch.ones_like(many).bool(), uniforms)
    kl = -math.log(4) - drawn.log().mean().item()
    bound = out.teaching_N.double().mean().item() - math.log(4) - out.log_prob_N.double().mean().item()
    assert 0 < kl < bound + 0.01, (kl, bound)  # the mean over 10,000 places in the intervals is good to .005
    assert kl < 0.1
