"""What summing gradients over ranks in 16 bits costs in accuracy: `python -m benchmarks.reduction`.

A ring adds one rank's share after the other and rounds to the type that travels each time. Emulated on CPU for any
number of ranks, against the fp64 sum of the same addends: rank r's gradient is signal + noise of `NOISE` times the
signal, so what training looks for is the mean.
"""

import torch
from torch import Tensor

WORLDS = (8, 64, 512)
TYPES = (torch.bfloat16, torch.float16, torch.float32)
NOISE = 4.0
_ELEMENTS = 1 << 14


def ring_sum(addends_WN: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first axis, rounded to `dtype` after every addition; fp64."""
    total_N = addends_WN[0].to(dtype)
    for addend_N in addends_WN[1:]:
        total_N = (total_N.float() + addend_N.to(dtype).float()).to(dtype)
    return total_N.double()


def relative_error(world_size: int, dtype: torch.dtype) -> float:
    """Root mean square error of the mean over ranks, over the root mean square of the mean."""
    generator = torch.Generator().manual_seed(0)
    signal_N = torch.randn(_ELEMENTS, generator=generator)
    noise_WN = torch.randn(world_size, _ELEMENTS, generator=generator)
    # As DeepSpeed does: autocast's gradients, each divided by the number of ranks before it is sent.
    addends_WN = (signal_N + NOISE * noise_WN).bfloat16().float() / world_size
    exact_N = addends_WN.double().sum(0)
    return float((ring_sum(addends_WN, dtype) - exact_N).square().mean().sqrt() / exact_N.square().mean().sqrt())


def main() -> None:
    print("ranks  " + "  ".join(f"{str(dtype).removeprefix('torch.'):>9}" for dtype in TYPES))
    for world_size in WORLDS:
        print(f"{world_size:5}  " + "  ".join(f"{relative_error(world_size, dtype):9.2g}" for dtype in TYPES))


if __name__ == "__main__":
    main()
