"""Several sets of one sample in one call of a head: each is scored as by a call of its own."""

import itertools

import pytest
import torch

from imm_scale.models.heads.base import means_of_runs, prefix_of, sums_of_runs
from tests.unit.models.heads.laws import KINDS, random_head, states

V, K, D = 3, 7, 8
FP64 = 1e-12  # a dozen log-probabilities, which went through some hundred operations
# Interleaved, of one size and of others, in any order of their numbers, one of all positions, and none at all.
SETS = torch.tensor(
    [[2, 1, 0, 1, 2, 0, 1], [3, 2, 1, 4, 5, 6, 7], [0, 5, 5, 0, 2, 5, 2], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]]
)
X = torch.randint(V, SETS.shape, generator=torch.Generator().manual_seed(0))
UNIFORMS = torch.rand(SETS.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

every_head = pytest.mark.parametrize("kind", KINDS)


def _case(kind):
    return random_head(KINDS[kind], D, V), states(len(SETS), K, D).requires_grad_()


def _together(head, h):
    return head(h, X, SETS, UNIFORMS)


def _one_by_one(head, h):
    return [head(h, X, number == SETS, UNIFORMS) for number in range(1, K + 1)]


@every_head
def test_the_score_is_the_sum_of_one_set_at_a_time(kind):
    head, h = _case(kind)
    together, alone = _together(head, h), _one_by_one(head, h)
    torch.testing.assert_close(together.log_prob_N, sum(one.log_prob_N for one in alone), rtol=0, atol=FP64)
    if together.teaching_N is not None:
        torch.testing.assert_close(together.teaching_N, sum(one.teaching_N for one in alone), rtol=0, atol=FP64)
    assert together.log_prob_N[-1] == 0.0, "no set"


@every_head
def test_gradients_are_too(kind):
    head, h = _case(kind)
    inputs = [h, *head.parameters()]
    together = torch.autograd.grad(_together(head, h).nll.sum(), inputs)
    alone = torch.autograd.grad(sum(one.nll.sum() for one in _one_by_one(head, h)), inputs)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # sums of hundreds of terms of order 1, in other order


@every_head
def test_what_other_sets_hold_is_not_read(kind):
    """Not their tokens, not their states, and not the uniforms of theirs."""
    head, h = _case(kind)
    other = SETS != 1
    changed_h = torch.where(other[..., None], 5.0 * states(len(SETS), K, D, seed=9), h)
    changed_x, changed_u = torch.where(other, (X + 1) % V, X), torch.where(other, 0.5, UNIFORMS)

    def of_the_first(h, x, u):
        """What is said of set 1, by the difference that leaving it out makes."""
        whole, rest = head(h, x, SETS, u), head(h, x, SETS.masked_fill(SETS == 1, 0), u)
        return whole.nll - rest.nll

    mine = of_the_first(h, X, UNIFORMS)
    # nats of states five times as large cancel to ten digits
    torch.testing.assert_close(of_the_first(changed_h, changed_x, changed_u), mine, rtol=0, atol=1e-9)


@every_head
def test_monitors_of_one_set_are_the_same_either_way(kind):
    head, h = _case(kind)
    numbered, masked = head(h, X, (SETS == 1).long(), UNIFORMS), head(h, X, SETS == 1, UNIFORMS)
    assert numbered.monitors.keys() == masked.monitors.keys()
    for name, value in numbered.monitors.items():
        torch.testing.assert_close(value, masked.monitors[name], rtol=0, atol=FP64)


def test_a_prefix_has_one_set_after_the_other():
    prefix = prefix_of(SETS)
    assert prefix.order_NK[0].tolist() == [1, 3, 6, 0, 4, 2, 5]
    assert prefix.set_NK[0].tolist() == [1, 1, 1, 2, 2, 0, 0]
    assert prefix.starts[0].tolist() == [0, 0, 0, 3, 3, 5, 5]
    assert prefix.last[0].tolist() == [False, False, True, False, True, False, False]
    assert torch.equal(prefix.scatter(prefix.take(X)), X)


def test_sums_of_runs_stand_at_their_first_places():
    """Of all runs that seven places can fall into."""
    for cuts in itertools.product([0, 1], repeat=K - 1):
        place = torch.arange(K)
        start = torch.where(torch.tensor([1, *cuts]).bool(), place, 0).cummax(0).values
        x = torch.arange(1.0, 2 * K + 1).view(1, K, 2)
        sums, means = sums_of_runs(x, start[None])[0], means_of_runs(x, start[None])[0]
        for first in start.unique().tolist():
            run = x[0, start == first]
            assert sums[first].tolist() == run.sum(0).tolist()
            torch.testing.assert_close(means[first], run.mean(0))


def test_an_autoregressive_head_knows_where_the_tokens_it_was_told_stand(monkeypatch):
    """Not only which token came before in S: S has gaps. The first of each set was told none, and looks at itself."""
    head, h = _case("autoregressive")
    plain, seen = head.transformer.forward, []

    def forward(x, at, set_NK=None):
        seen.append(at)
        return plain(x, at, set_NK)

    monkeypatch.setattr(head.transformer, "forward", forward)
    head(h[:1], X[:1], SETS[:1])
    head(h[:1], X[:1], SETS[:1] == 1)
    assert seen[0].asked_NK[0].tolist() == [1, 3, 6, 0, 4, 2, 5]
    assert seen[0].told_NK[0].tolist() == [1, 1, 3, 0, 0, 2, 2]
    assert seen[1].told_NK[0, :3].tolist() == [1, 1, 3]
