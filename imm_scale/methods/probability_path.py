"""Trajectories between data (t = 0) and the prior (t = 1), and the interpolant that moves along them (eq 11).

Times may be any float tensor; results have the dtype of the times. Work in fp64 wherever times differ by little.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from imm_scale.errors import UserError


class Interpolant(ABC):
    """x_t = alpha(t) x + sigma(t) eps, with eps ~ N(0, sigma_d^2 I)."""

    name: str
    # d(sigma)/dt alpha - d(alpha)/dt sigma, a constant on both trajectories: -d(log-SNR)/dt = 2 rate / (alpha sigma).
    rate: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the data at times t, of the same shape."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the noise at times t, of the same shape."""

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor:
        """d(alpha)/dt at times t, of the same shape."""

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """d(sigma)/dt at times t, of the same shape."""

    @abstractmethod
    def eta_inverse(self, eta: Tensor) -> Tensor:
        """The time at which sigma / alpha = eta."""

    @abstractmethod
    def determinant(self, s: Tensor, t: Tensor) -> Tensor:
        """alpha(s) sigma(t) - sigma(s) alpha(t), written without the cancellation at s close to t."""

    @abstractmethod
    def eta_at(self, t: float) -> float:
        """sigma / alpha at a single time known beforehand: no tensor, so nothing to wait for on any device."""

    def eta(self, t: Tensor) -> Tensor:
        """sigma / alpha."""
        return self.sigma(t) / self.alpha(t)

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda_t = 2 log(alpha / sigma)."""
        return -2.0 * torch.log(self.eta(t))

    def log_snr_inverse(self, log_snr: Tensor) -> Tensor:
        """The time at which the log-SNR has this value."""
        return self.eta_inverse(torch.exp(-0.5 * log_snr))

    def dlog_snr_dt(self, t: Tensor) -> Tensor:
        """d lambda_t / dt, negative everywhere and -inf at both ends."""
        return -2.0 * self.rate / (self.alpha(t) * self.sigma(t))

    def norm(self, t: Tensor) -> Tensor:
        """sqrt(alpha^2 + sigma^2): the standard deviation of x_t over sigma_d for unit-scaled data."""
        return torch.hypot(self.alpha(t), self.sigma(t))

    def dlog_norm_dt(self, t: Tensor) -> Tensor:
        """d log(norm) / dt."""
        return (self.alpha(t) * self.dalpha(t) + self.sigma(t) * self.dsigma(t)) / self.norm(t) ** 2


class OTFlowMatching(Interpolant):
    """Straight lines: alpha = 1 - t, sigma = t."""

    name = "ot_fm"
    rate = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def dalpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def eta_inverse(self, eta: Tensor) -> Tensor:
        return torch.where(torch.isinf(eta), torch.ones_like(eta), eta / (1.0 + eta))

    def determinant(self, s: Tensor, t: Tensor) -> Tensor:
        return t - s

    def eta_at(self, t: float) -> float:
        return t / (1.0 - t) if t < 1.0 else math.inf


class VPCosine(Interpolant):
    """Variance preserving: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    name = "vp_cosine"
    rate = math.pi / 2

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))

    def dalpha(self, t: Tensor) -> Tensor:
        return -self.rate * self.sigma(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return self.rate * self.alpha(t)

    def eta_inverse(self, eta: Tensor) -> Tensor:
        return torch.atan(eta) * (2 / math.pi)

    def determinant(self, s: Tensor, t: Tensor) -> Tensor:
        return torch.sin((t - s) * (math.pi / 2))

    def eta_at(self, t: float) -> float:
        return math.sin(t * (math.pi / 2)) / math.cos(t * (math.pi / 2))

    def norm(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


TRAJECTORIES: dict[str, type[Interpolant]] = {kind.name: kind for kind in (OTFlowMatching, VPCosine)}


def build(trajectory: str) -> Interpolant:
    """The trajectory of that name. Raises UserError for an unknown one."""
    if trajectory not in TRAJECTORIES:
        raise UserError(f"trajectory {trajectory!r} is unknown; choose one of {', '.join(TRAJECTORIES)}")
    return TRAJECTORIES[trajectory]()


# DDPM's linear schedule (arXiv 2006.11239, section 4): beta from 1e-4 to 0.02 over 1,000 steps, which DiT keeps.
_DDPM_STEPS, _FIRST_BETA, _LAST_BETA = 1000, 1e-4, 0.02


def _ddpm_log_alpha_bar(device: torch.device) -> Tensor:
    """(1001,) fp64 log alpha-bar of data (step -1, where it is 0) and of DDPM's steps 0 to 999, decreasing."""
    betas = torch.linspace(_FIRST_BETA, _LAST_BETA, _DDPM_STEPS, dtype=torch.float64, device=device)
    return torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])


def ddpm_step(interp: Interpolant, t: Tensor) -> Tensor:
    """The step of DDPM's linear schedule with the noise-to-data ratio of time t, a real number of the shape of t.

    0 to 999 are the steps DDPM trains on, -1 is data; between them log alpha-bar is taken as linear. What is noisier
    than step 999 is step 999.
    """
    table = _ddpm_log_alpha_bar(t.device)
    wanted = -torch.log1p(interp.eta(t.double()).square())  # alpha-bar = alpha^2 / (alpha^2 + sigma^2)
    wanted = torch.maximum(wanted, table[-1])
    above = torch.searchsorted(-table, -wanted, right=True).clamp(1, _DDPM_STEPS)
    before, after = table[above - 1], table[above]
    return (above - 2 + (before - wanted) / (before - after)).to(t.dtype)


def diffuse(interp: Interpolant, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha_t x + sigma_t eps, (N, C, H, W). `t` broadcasts against x; the result has the dtype of x."""
    return interp.alpha(t).to(x.dtype) * x + interp.sigma(t).to(x.dtype) * eps


def velocity(interp: Interpolant, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """dx_t/dt = alpha'_t x + sigma'_t eps, (N, C, H, W), of one sample's path. Arguments as in `diffuse`."""
    return interp.dalpha(t).to(x.dtype) * x + interp.dsigma(t).to(x.dtype) * eps


def ddim(interp: Interpolant, x_t: Tensor, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The interpolant (eq 11): moves x_t FROM time t TO time s, given the clean x.

    Args:
        x_t: noisy sample at time t.
        x: clean sample (or its estimate), same shape.
        s: target time, 0 <= s <= t, broadcastable against x.
        t: source time, t > 0.

    Returns:
        (alpha_s - alpha_t sigma_s / sigma_t) x + (sigma_s / sigma_t) x_t. Self-consistent: t -> r -> s equals t -> s.
    """
    sigma_t = interp.sigma(t)
    return (interp.determinant(s, t) / sigma_t).to(x.dtype) * x + (interp.sigma(s) / sigma_t).to(x.dtype) * x_t
