"""What one GPU holds when samples are drawn block by block: weights, and the keys and values that are kept."""

from dataclasses import dataclass

from imm_scale.config.schema import Config
from imm_scale.methods.samplers import SAMPLES_PER_CALL
from imm_scale.models.base import Architecture
from imm_scale.planner.flops import Parameters
from imm_scale.precision import HALF

_FP32, _HALF = 4, 2


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes of one GPU.

    Attributes:
        weights: fp32.
        kept: keys and values of a call's samples at their most; with guidance those of the pass without label too.
    """

    weights: float
    kept: float

    @property
    def total(self) -> float:
        return self.weights + self.kept


def sampling_memory(config: Config, net: Architecture, parameters: Parameters) -> SamplingMemory | None:
    """None of a net that keeps nothing: its samples are drawn at once, in calls smaller than a training step's."""
    if net.kept_elements == 0:
        return None
    sampling = config.sampling
    element = _HALF if sampling.precision in HALF else _FP32
    passes = 1 if sampling.guidance_scale == 1.0 else 2
    return SamplingMemory(_FP32 * parameters.total, float(passes * element * SAMPLES_PER_CALL * net.kept_elements))
