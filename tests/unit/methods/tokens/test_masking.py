"""The masking process and the sizes of steps, against written-out numbers."""

import pytest
import torch

from imm_scale.errors import UserError
from imm_scale.methods.tokens import masking


def test_the_visible_tokens_are_those_of_the_largest_uniforms():
    u = torch.tensor([[0.3, 0.9, 0.1, 0.5], [0.2, 0.2, 0.8, 0.2]])
    assert masking.ranks(u).tolist() == [[2, 0, 3, 1], [1, 2, 0, 3]], "of equal ones the first comes first"


def test_masks_of_all_times_are_nested():
    """Masked at time t where u < t: so many visible tokens are those of that time, and what t shows s < t shows too."""
    u = torch.rand(50, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rank, x, before = masking.ranks(u), torch.arange(16).expand(50, -1), None
    for t in (1.0, 0.8, 0.55, 0.2, 0.0):
        visible = u >= t
        assert torch.equal(rank < visible.sum(dim=1, keepdim=True), visible)
        masked = torch.where(visible, x, 16)
        # From t over r to s: tokens that r shows are kept, and the others of s are added.
        through = masked if before is None else torch.where(before != 16, before, masked)
        assert torch.equal(through, masked)
        before = masked
    assert torch.equal(before, x)


@pytest.mark.parametrize(
    ("kind", "steps", "length", "expected"),
    [
        ("uniform", 1, 8, [0, 8]),
        ("uniform", 3, 8, [0, 2, 5, 8]),  # floor of 8/3 and 16/3
        ("uniform", 8, 8, list(range(9))),
        ("cosine", 1, 16, [0, 16]),
        ("cosine", 4, 16, [0, 1, 5, 10, 16]),  # 16 (1 - cos) of 22.5, 45 and 67.5 degrees: 1.22, 4.69, 9.88
        ("cosine", 5, 6, [0, 1, 2, 3, 4, 6]),  # .29, 1.15, 2.47, 4.15: one each at least
        ("cosine", 6, 6, list(range(7))),
        ("1,3,12,48", 4, 64, [0, 1, 4, 16, 64]),
        (" 2, 1", 2, 3, [0, 2, 3]),
    ],
)
def test_counts_of_visible_tokens(kind, steps, length, expected):
    counts = masking.visible_counts(kind, steps, length)
    assert counts.dtype == torch.int64 and counts.tolist() == expected


@pytest.mark.parametrize("kind", masking.GRIDS)
def test_every_step_of_every_number_draws_something(kind):
    for length in (1, 2, 7, 64):
        for steps in range(1, length + 1):
            counts = masking.visible_counts(kind, steps, length)
            assert counts[0] == 0 and counts[-1] == length and (counts.diff() >= 1).all() and len(counts) == steps + 1


@pytest.mark.parametrize(
    ("kind", "steps", "named"),
    [
        ("uniform", 9, r"9 steps for 8 tokens.*at most 8"),
        ("cosine", 9, r"9 steps for 8 tokens.*at most 8"),
        ("linear", 2, r"grid='linear' is unknown.*uniform, cosine, best"),
        ("4,0,4", 3, r"grid='4,0,4' is unknown"),
        ("4,5", 2, r"grid=4,5: 2 steps that draw 9 tokens, where 2 steps have to draw 8"),
        ("4,4", 3, r"2 steps that draw 8 tokens, where 3 steps have to draw 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kind, steps, named):
    with pytest.raises(UserError, match=named):
        masking.visible_counts(kind, steps, 8)


def test_times_stand_for_counts_of_any_length():
    for length in (3, 64, 1000, 1024):  # 1 - n / T loses digits that must come back
        n = torch.arange(length + 1)
        assert torch.equal(masking.counts_at(1.0 - n.double() / length, length), n)
