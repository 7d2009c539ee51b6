"""What a sample is measured by: a vector per sample, under a name that goes into every result."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Extractor:
    """Latents (N, C, H, W) to features (N, F) in fp64."""

    name: str
    features: Callable[[Tensor], Tensor]


# The normalized space the model samples in, element by element.
LATENTS = Extractor("latents", lambda z: z.flatten(1).double())
