"""What a step costs in work and on the wire. A multiply-add counts once, as in the DiT and IMM papers' GFLOPs."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from imm_scale.choices import Passes
from imm_scale.models.dit import DiT, DiTConfig

_TIME_CHANNELS = 256


def forward_multiply_adds(net: DiTConfig) -> int:
    """Multiply-adds of one forward pass of one sample, embedders included."""
    tokens, width = net.tokens, net.width
    patch = net.patch_size**2 * net.channels
    hidden = int(width * net.mlp_ratio)
    attention = tokens * 4 * width**2 + 2 * tokens**2 * width
    mlp = 2 * tokens * width * hidden
    block = attention + mlp + 6 * width**2
    final = tokens * width * patch + 2 * width**2
    embedders = (2 if net.second_time else 1) * (_TIME_CHANNELS * width + width**2)
    return tokens * patch * width + net.depth * block + final + embedders


def training_multiply_adds(net: DiTConfig, passes: Passes, global_batch_size: int) -> int:
    """Multiply-adds of one optimizer step."""
    return passes.forwards * forward_multiply_adds(net) * global_batch_size


def elementwise_bytes(net: DiTConfig, half: bool) -> float:
    """Bytes that the kernels around the matrix products move in one eager forward pass of one image.

    Per block and element of (T, D), reads and writes: two norms 4, two modulations 8, two gates 2 written, two
    residual sums 6, all in fp32; two gates 2 read, attention 4 and GELU 2 r in the type of the matrix products;
    under autocast two casts from fp32.
    """
    size = 2 if half else 4
    hidden = int(net.width * net.mlp_ratio) / net.width
    per_element = 20 * 4 + (6 + 2 * hidden) * size + (2 * (4 + 2) if half else 0)
    return net.depth * per_element * net.tokens * net.width


def kernels(net: DiTConfig, passes: Passes, half: bool, checkpointing: bool, of_a_block: float = 1.0) -> float:
    """What the CPU launches for one micro-batch, forward and backward, views aside.

    Counted by `python -m benchmarks.operators`. A block takes 19 operations in each branch, 38 backward and 17 more
    where it is recomputed; under autocast 21, 50 and 27, and 8 casts of its weights for both branches together. Around
    the blocks, where draws and loss are compiled, it is 104 for IMM and 64 for flow matching, under autocast 14 more.

    Args:
        of_a_block: the share of a block's operations that is launched, below 1 where blocks are compiled.
    """
    branch, casts, backward, again = (21, 8, 50, 27) if half else (19, 0, 38, 17)
    branches = passes.grad + passes.no_grad
    around = 64 + 40 * (branches - 1)
    block = branches * branch + casts + backward + again * checkpointing
    return of_a_block * net.depth * block + around + 14 * half


@dataclass(frozen=True)
class Parameters:
    """Trainable elements of a net, counted on the meta device.

    Attributes:
        total: all of them.
        half: those that 16-bit autocast casts, and DeepSpeed may send in 16 bits (plain linear and conv layers).
        block, block_half: the same of one block.
        tensors: how many parameters there are.
    """

    total: int
    half: int
    block: int
    block_half: int
    tensors: int


# As DeepSpeed's torch_autocast.LOWER_PRECISION_SAFE_MODULES: the exact class, so that Fp32Linear stays in fp32.
_CAST = (nn.Linear, nn.Conv2d)


def _numel(module: nn.Module, only_cast: bool) -> int:
    parts = (part for part in module.modules() if not only_cast or type(part) in _CAST)
    return sum(p.numel() for part in parts for p in part.parameters(recurse=False))


@cache
def parameters(net: DiTConfig) -> Parameters:
    """Counts a net's parameters on meta tensors, without memory for them."""
    with torch.device("meta"):
        model = DiT(net)
    block = model.blocks[0]
    return Parameters(
        total=_numel(model, False),
        half=_numel(model, True),
        block=_numel(block, False),
        block_half=_numel(block, True),
        tensors=len(list(model.parameters())),
    )


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in one optimizer step.

    Attributes:
        collective: all_reduce, all_gather or reduce_scatter.
        what: gradients or weights.
        payload: bytes of the whole tensors, summed over the step.
        overlaps: whether it runs beside the computation or after it.
    """

    collective: str
    what: str
    payload: float
    overlaps: bool

    def sent(self, world_size: int) -> float:
        """Bytes a rank sends by a ring: S (W - 1) / W, twice that for an all-reduce."""
        passes = 2 if self.collective == "all_reduce" else 1
        return passes * self.payload * (world_size - 1) / world_size


def wire(
    p: Parameters, stage: int, half: bool, half_gradients: bool, overlap: bool, accumulation: int, world_size: int
) -> tuple[Traffic, ...]:
    """What a step sends at a ZeRO stage, as DeepSpeed 0.19 does it (stages 1 and 2 all-reduce whole buckets).

    Args:
        p: of the net.
        half: 16-bit autocast: stage 3 gathers the weights of its layers in 16 bits.
        half_gradients: gradients of these layers are reduced in 16 bits.
        overlap: gradients are reduced beside the backward pass.
        accumulation: micro-batches per step. Stages 2 and 3 reduce after each, stages 0 and 1 once.
    """
    if world_size == 1:
        return ()
    gradients = 4.0 * p.total - (2.0 * p.half if half_gradients else 0.0)
    if stage == 0:  # DeepSpeed's plain engine: in fp32 whatever autocast does
        return (Traffic("all_reduce", "gradients", 4.0 * p.total, False),)
    if stage < 3:
        times = accumulation if stage == 2 else 1
        return (
            Traffic("all_reduce", "gradients", gradients * times, overlap),
            Traffic("all_gather", "weights", 4.0 * p.total, False),
        )
    weights = 4.0 * p.total - (2.0 * p.half if half else 0.0)
    return (
        Traffic("all_gather", "weights", _gathered(p, weights, half) * accumulation, True),
        Traffic("reduce_scatter", "gradients", gradients * accumulation, True),
    )


def _gathered(p: Parameters, weights: float, half: bool) -> float:
    """Stage 3, one micro-batch: every weight for the forward passes (both branches at once) and again for the backward.

    The last blocks are still there when the backward pass begins, up to the limit of live parameters (two blocks).
    """
    kept = min(2 * (4.0 * p.block - (2.0 * p.block_half if half else 0.0)), weights)
    return 2.0 * weights - kept
