"""A net small enough to be trained in a test, on points of the plane."""

import torch
from torch import nn

from imm_scale.models.base import Backbone


class Mlp(Backbone):
    """A small net of (x, t, s); times arrive as `time_scale` t, per group."""

    def __init__(self, time_scale: float, width: int = 64):
        super().__init__()
        self.time_scale = time_scale
        self.layers = nn.Sequential(
            nn.Linear(2 + 4 * 2, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        )
        self.out = nn.Linear(width, 2)
        nn.init.zeros_(self.out.weight)

    def forward(self, x, c_noise, second, label, dropout_key=None):
        powers = 2.0 ** torch.arange(2)
        angles = torch.cat([u.float()[:, None] / self.time_scale * powers for u in (c_noise, second)], dim=1)
        features = torch.cat([angles.sin(), angles.cos()], dim=1).repeat_interleave(len(x) // len(c_noise), dim=0)
        return self.out(self.layers(torch.cat([x, features], dim=1)))
