"""A net, the flow maps around it, the methods and a batch, for the sections that need no engine."""

from collections.abc import Iterator

import torch
from torch import nn

from imm_scale import rng
from imm_scale.data.batch import Batch
from imm_scale.methods import probability_path
from imm_scale.methods.base import FlowMapMethod
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.flow_matching import FlowMatching, FlowMatchingConfig
from imm_scale.methods.imm import ImmConfig, InductiveMomentMatching
from imm_scale.methods.imm_times import T_MAX
from imm_scale.models.base import Backbone
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
                # Drawn on the CPU wherever the net is: the same weights everywhere.
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator, device="cpu"))
    return model


def samples(model: DiT, groups: int, device: torch.device) -> Batch:
    """Groups of random samples of the data's standard deviation."""
    ordinal = torch.arange(groups * PARTICLES)
    shape = (model.config.channels, model.config.height, model.config.image_width)
    x = SIGMA_DATA * rng.normal(1, "data", ordinal, shape)
    return on(device, Batch(0, x, ordinal % CLASSES, ordinal, torch.ones(groups)))


def on(device: torch.device, batch: Batch, dtype: torch.dtype | None = None) -> Batch:
    """A batch elsewhere, its samples in another dtype where one is named."""
    condition, ordinal, weight = (tensor.to(device) for tensor in (batch.condition, batch.ordinal, batch.weight))
    return Batch(batch.images_seen, batch.x.to(device, dtype or batch.x.dtype), condition, ordinal, weight)


def methods(model: nn.Module, k: int = 12, min_gap: float = 0.0) -> Iterator[tuple[str, FlowMap, FlowMapMethod]]:
    """Every flow map around a net with IMM, and flow matching on both trajectories."""
    assert isinstance(model, Backbone | nn.Identity)
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
        imm = InductiveMomentMatching(ImmConfig(particles=PARTICLES, t_max=t_max, k=k, min_gap=min_gap))
        yield f"imm {trajectory} {parameterization}", flow_map, imm
        if parameterization == "simple_edm":
            yield f"flow matching {trajectory}", flow_map, FlowMatching(FlowMatchingConfig(t_max=1.0))
