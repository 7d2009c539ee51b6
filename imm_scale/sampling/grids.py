"""Which times a sampler visits (app I.2): decreasing grids from t_max to t_min, fp64, of steps + 1 points."""

import torch
from torch import Tensor

from imm_scale.errors import UserError
from imm_scale.interpolant import Interpolant

GRIDS = ("uniform", "edm", "eta_1.4")
_RHO = 7.0
_MIDDLE_ETA = 1.4  # of the paper's two-step grid


def default_grid(objective: str, steps: int) -> str:
    """The paper's choice: a middle point at eta = 1.4 for two steps of IMM, uniform for all else."""
    return "eta_1.4" if objective == "imm" and steps == 2 else "uniform"


def time_grid(interp: Interpolant, kind: str, steps: int, t_min: float, t_max: float) -> Tensor:
    """The grid of that kind.

    Args:
        kind: `uniform` in t; `edm`, even in eta^(1/7); `eta_1.4`, two steps that meet at eta = 1.4.

    Raises:
        UserError: unknown kind, `eta_1.4` with other than 2 steps, `edm` from t_max = 1 where eta is infinite.
    """
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1")
    ends = torch.tensor([t_max, t_min], dtype=torch.float64)
    if kind == "uniform":
        return torch.linspace(t_max, t_min, steps + 1, dtype=torch.float64)
    if kind == "edm":
        if t_max >= 1.0:
            raise UserError(f"the edm grid needs t_max below 1, got {t_max}: use grid=uniform")
        first, last = interp.eta(ends) ** (1.0 / _RHO)
        etas = (first + torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64) * (last - first)) ** _RHO
        inner = interp.eta_inverse(etas[1:-1])
        return torch.cat([ends[:1], inner, ends[1:]])
    if kind == "eta_1.4":
        if steps != 2:
            raise UserError(f"grid=eta_1.4 has 2 steps, not {steps}: use grid=uniform or grid=auto")
        return torch.cat([ends[:1], interp.eta_inverse(torch.tensor([_MIDDLE_ETA], dtype=torch.float64)), ends[1:]])
    raise UserError(f"grid {kind!r} is unknown; choose one of {', '.join(GRIDS)}")
