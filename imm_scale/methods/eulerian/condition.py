"""Guidance as a condition (improved MeanFlow, arXiv 2512.02012): the net is told by how much it is to be guided.

    v_g = v + (1 - 1/W) (u(x_t; t, t | y, W) - u(x_t; t, t | null, 1))

Where u(x_t; t, t | y, W) is v_g itself, as it is once trained, that is W v - (W - 1) u(x_t; t, t | null, 1): guidance
of scale W. It is in force at times from t_lo to t_hi, which the net is told as well, so that samples choose both, at
one forward pass a step.

What the paper leaves open, and its code does in one of several ways:

- A velocity at one time lies inside or outside the interval: it is asked for with W, or with 1, and told the interval
  from 0 to 1, which is what the samples with s = t train. So the velocity with a label is one pass, for v_g and for the
  tangent alike; the published code takes two, which differ where their difference is multiplied by 0.
- A sample without label has v as its target, and is told W = 1, as it is where it is subtracted. The published code
  tells it the W drawn, and lets its tangent run along the velocity of the label that was dropped.

Legend: N samples, each a group of its own; `told` is (N, 3) fp64, 1 - 1/W, t_lo and t_hi.
"""

import torch
from torch import Tensor

from imm_scale import rng
from imm_scale.methods.eulerian.guidance import EARLIEST_END, LATEST_START, TrainingGuidanceConfig
from imm_scale.methods.flow_map import FlowMap, per_sample


def scales(config: TrainingGuidanceConfig, u: Tensor) -> Tensor:
    """W in [1, largest] of density ~ W^-power from uniforms of any shape, by the inverse of the distribution."""
    if config.power == 1.0:
        return config.largest**u
    left = 1.0 - config.power
    return (1.0 + u * (config.largest**left - 1.0)) ** (1.0 / left)


def draw(config: TrainingGuidanceConfig, group: Tensor, equal: Tensor, dropped: Tensor, seed: int) -> Tensor:
    """What each group is told: W = 1 where the label was `dropped`, all times where s is `equal` to t; each (N,)."""
    u = rng.uniform(seed, "guidance", group, 3)
    strength = torch.where(dropped, 0.0, 1.0 - 1.0 / scales(config, u[:, 0]))
    low = LATEST_START * u[:, 1]
    high = EARLIEST_END + (1.0 - EARLIEST_END) * u[:, 2]
    return torch.stack([strength, torch.where(equal, 0.0, low), torch.where(equal, 1.0, high)], dim=1)


@torch.no_grad()
def guided(
    net: FlowMap, x_t: Tensor, v: Tensor, t: Tensor, label: Tensor, dropout_key: Tensor | None, told: Tensor
) -> tuple[Tensor, Tensor]:
    """v_g and u(x_t; t, t | y, W inside the interval), which is that of the tangent, each (N, ...)."""
    assert net.null_label is not None, "guidance needs a null label"
    strength, low, high = told.unbind(1)
    strength = torch.where((t >= low) & (t <= high), strength, 0.0)
    always = torch.stack([strength, torch.zeros_like(t), torch.ones_like(t)], dim=1)
    own = net.velocity(x_t, t, label, dropout_key, always)
    none = net.velocity(x_t, t, torch.full_like(label, net.null_label), dropout_key)
    return v + per_sample(strength.to(v.dtype), v) * (own - none), own
