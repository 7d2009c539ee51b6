"""A net, the flow maps around it, the objectives and a batch, for the sections that need no engine."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from imm_scale import rng
from imm_scale.methods import probability_path
from imm_scale.methods.base import Objective
from imm_scale.methods.flow_map import ConditionalNet, FlowMap
from imm_scale.methods.flow_matching import FlowMatching
from imm_scale.methods.imm import InductiveMomentMatching
from imm_scale.methods.imm_times import T_MAX
from imm_scale.models.dit import DiT, DiTConfig

CLASSES = 10
PARTICLES = 4
SIGMA_DATA = 0.5
# Trajectory and what the net predicts: all pairs that exist.
KINDS = (
    ("ot_fm", "euler_fm"),
    ("ot_fm", "simple_edm"),
    ("ot_fm", "identity"),
    ("vp_cosine", "simple_edm"),
    ("vp_cosine", "identity"),
)


class Samples(NamedTuple):
    """x (N, C, H, W) fp32, label (N,), ordinal (N,)."""

    x: Tensor
    label: Tensor
    ordinal: Tensor


def net(small: bool, seed: int = 0) -> DiT:
    """A DiT whose every parameter has a gradient: not zero where adaLN-Zero starts from zero. On the CPU, fp32."""
    width, depth, heads, side = (32, 2, 2, 8) if small else (128, 4, 4, 16)
    torch.manual_seed(seed)
    model = DiT(DiTConfig(width, depth, heads, 2, channels=4, height=side, image_width=side, num_classes=CLASSES))
    return wake(model)


def wake(model: DiT) -> DiT:
    """Gives the layers that adaLN-Zero starts at zero the weights they might have later on."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02, generator=generator)
    return model


def samples(model: DiT, groups: int, device: torch.device) -> Samples:
    """Groups of random samples of the data's standard deviation."""
    ordinal = torch.arange(groups * PARTICLES)
    shape = (model.config.channels, model.config.height, model.config.image_width)
    x = SIGMA_DATA * rng.normal(1, "data", ordinal, shape)
    return Samples(x.to(device), (ordinal % CLASSES).to(device), ordinal.to(device))


def objectives(model: nn.Module, k: int = 12, min_gap: float = 0.0) -> Iterator[tuple[str, FlowMap, Objective]]:
    """Every flow map around a net with IMM, and flow matching on both trajectories."""
    assert isinstance(model, ConditionalNet | nn.Identity)
    null_label = getattr(model, "null_label", CLASSES)
    for trajectory, parameterization in KINDS:
        flow_map = FlowMap(
            model,  # type: ignore[arg-type]
            probability_path.build(trajectory),
            parameterization,
            sigma_data=SIGMA_DATA,
            null_label=null_label,
        )
        t_max = T_MAX[trajectory]
        imm = InductiveMomentMatching(particles=PARTICLES, t_min=0.0, t_max=t_max, k=k, min_gap=min_gap)
        yield f"imm {trajectory} {parameterization}", flow_map, imm
        if parameterization == "simple_edm":
            yield f"flow matching {trajectory}", flow_map, FlowMatching(t_min=0.0, t_max=1.0, particles=PARTICLES)
