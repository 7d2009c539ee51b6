"""What mixtures and chains share: R component states for each position, and weights of components.

Legend: N samples, K positions with a state, D width, R components, G groups.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imm_scale.models.fp32_linear import Fp32Linear
from imm_scale.models.layers import Mlp

_GAIN = 0.3  # standard deviation of g_r at the start


class ComponentStates(nn.Module):
    """phi(h, e_r) = y + MLP(norm(y)) of y = h + g_r norm(h) + e_r: what component r makes of a state.

    The e_r and g_r start apart, with mean 0: alike they would get the same gradients and stay alike, and one alone
    starts as no component at all. The e_r shift the tokens of all positions alike; by the g_r, coordinate by
    coordinate, a component says something else of each position from the start. The MLP starts at 0.
    """

    def __init__(self, width: int, components: int):
        super().__init__()
        e_RD = torch.randn(components, width)
        self.e_RD = nn.Parameter(e_RD - e_RD.mean(dim=0))
        g_RD = _GAIN * torch.randn(components, width)
        self.g_RD = nn.Parameter(g_RD - g_RD.mean(dim=0))
        self.norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, width)
        nn.init.zeros_(self.mlp.fc2.weight)
        nn.init.zeros_(self.mlp.fc2.bias)

    def forward(self, h: Tensor, component: Tensor | None = None) -> Tensor:
        """States (..., D) under every component, (..., R, D); or each under one given component (...,), (..., D)."""
        g: Tensor = self.g_RD
        e: Tensor = self.e_RD
        if component is None:
            h = h[..., None, :]
        else:
            g, e = g[component], e[component]
        y = h + g * F.layer_norm(h, h.shape[-1:]) + e
        return y + self.mlp(self.norm(y))


class ComponentWeights(nn.Module):
    """log w of R components given a pooled state, fp32 or better; uniform at the start."""

    def __init__(self, width: int, components: int):
        super().__init__()
        self.linear = Fp32Linear(width, components)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """(..., D) to (..., R)."""
        return self.linear(pooled.flatten(0, -2)).view(*pooled.shape[:-1], -1).log_softmax(dim=-1)


def component_monitors(weight_NR: Tensor) -> Mapping[str, Tensor]:
    """Entropy in nats of each sample's weights (N, R), and each component's weight: one near 0 everywhere is dead."""
    weight_NR = weight_NR.detach()
    entropy_N = -torch.xlogy(weight_NR, weight_NR).sum(dim=1)
    return {"component_entropy": entropy_N} | {f"component_{r}": part for r, part in enumerate(weight_NR.unbind(dim=1))}
