"""The masking process, and the sizes of the steps that undo it.

Token i of a sample has u^i ~ U(0, 1), and is masked at time t where u^i < t; so masks of all times are nested, and
n tokens are visible at t = 1 - n / T: those of the n largest u.

Legend: N samples, T tokens, L steps, S samplers.
"""

import math
from functools import cache

import torch
from torch import Tensor

from imm_scale.errors import UserError

GRIDS = ("uniform", "cosine")


def ranks(u_NT: Tensor) -> Tensor:
    """(N, T) int64: how many tokens of the sample have a larger u, so that the visible ones are those below n."""
    order = u_NT.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(u_NT.shape[1], device=u_NT.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def visible_counts(kind: str, steps: int, length: int) -> Tensor:
    """(steps + 1,) int64 from 0 to the length: how many tokens are visible before each step, and after the last.

    Args:
        kind: `uniform` (steps of one size, the larger ones last), `cosine` (few tokens first; MaskGIT, arXiv
            2202.04200), or sizes as in "1,3,12,48".

    Raises:
        UserError: an unknown kind, sizes that do not fit, or more steps than tokens.
    """
    if kind not in GRIDS:
        return _listed(kind, steps, length)
    if steps > length:
        raise UserError(f"{steps} steps for {length} tokens: a step draws at least one; use at most {length}")
    if kind == "uniform":
        return torch.arange(steps + 1) * length // steps
    ideal = [length * (1.0 - math.cos(math.pi / 2 * step / steps)) for step in range(steps + 1)]
    counts = [0]
    for step in range(1, steps + 1):  # at least one token in each step, and enough left for those that follow
        counts.append(min(max(round(ideal[step]), counts[-1] + 1), length - (steps - step)))
    return torch.tensor(counts)


def _listed(kind: str, steps: int, length: int) -> Tensor:
    parts = [part.strip() for part in kind.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(
            f"grid={kind!r} is unknown for tokens: use uniform, cosine, best, or how many tokens each step draws, as "
            "in 1,3,12,48"
        )
    sizes = [int(part) for part in parts]
    if len(sizes) != steps or sum(sizes) != length:
        raise UserError(
            f"grid={kind}: {len(sizes)} steps that draw {sum(sizes)} tokens, where {steps} steps have to draw {length}"
        )
    return torch.tensor([0, *sizes]).cumsum(0)


@cache  # copied to a device once: each copy would wait for it
def step_table(kind: str, steps: tuple[int, ...], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`visible_counts` of samplers of so many steps, (S, L + 1) padded with the length, and their steps (S,)."""
    table = torch.full((len(steps), max(steps) + 1), length)
    for row, number in zip(table, steps, strict=True):
        row[: number + 1] = visible_counts(kind, number, length)
    return table.to(device), torch.tensor(steps, device=device)


def counts_at(times: Tensor, length: int) -> Tensor:
    """(steps + 1,) int64 counts of visible tokens that falling times 1 - n / T (steps + 1,) stand for."""
    return ((1.0 - times) * length).round().long()
