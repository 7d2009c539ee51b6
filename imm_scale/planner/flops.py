"""What a step costs in work and on the wire. A multiply-add counts once, as in the DiT and IMM papers' GFLOPs."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from torch import nn

from imm_scale.choices import MethodConfig, Passes
from imm_scale.models.base import Architecture
from imm_scale.planner.counting import forward_multiply_adds, on_meta, stream_multiply_adds, token_multiply_adds

__all__ = [
    "Parameters",
    "SamplingPasses",
    "Traffic",
    "forward_multiply_adds",
    "parameters",
    "recomputed",
    "sampling_passes",
    "spared",
    "step_passes",
    "stream_multiply_adds",
    "token_multiply_adds",
    "training_multiply_adds",
    "wire",
]


def step_passes(method: MethodConfig, net: Architecture, alignment: int) -> Passes:
    """What a method's step costs with a net, in forward passes of the same net for samples that are drawn at once.

    Of several blocks the clean stream is one more pass with gradient, and no pass is whole: a branch's block attends to
    the blocks before and itself alone. Blocks of one sample differ in whether s = t, so that spares nothing then.
    Of branches apart from the transformer, replicas are as many more of each.
    """
    if net.sequence_blocks == 1:
        return method.passes_at(alignment)
    passes, forward = method.passes_at(1), forward_multiply_adds(net)
    clean, branch = (cost / forward for cost in stream_multiply_adds(net))
    branch *= method.replicas
    return Passes(grad=clean + passes.grad * branch, no_grad=passes.no_grad * branch)


def recomputed(net: Architecture, passes: Passes) -> float:
    """Passes, of those of `step_passes`, that activation checkpointing runs again: of blocks all streams with gradient,
    the clean one alone where branches do not go through them."""
    if net.branches_apart:
        return stream_multiply_adds(net).clean / forward_multiply_adds(net)
    return passes.grad if net.sequence_blocks > 1 else 1.0


class SamplingPasses(NamedTuple):
    """What sampling costs, in forward passes of the same net for samples that are drawn at once.

    Attributes:
        call: of a call, which is of one block.
        clean: of the clean stream of a whole sample.
    """

    call: float
    clean: float


def sampling_passes(net: Architecture) -> SamplingPasses:
    """Of several blocks all but the last go through the net once more, clean; 2 % are between this and a count."""
    blocks = net.sequence_blocks
    if not net.branches_apart:
        return SamplingPasses(1.0 / blocks, 1.0 - 1.0 / blocks)
    clean, branch = (cost / forward_multiply_adds(net) for cost in stream_multiply_adds(net))
    return SamplingPasses(branch / blocks, clean)


def spared(method: MethodConfig, net: Architecture, alignment: int) -> str:
    """What other micro-batches would spare of a step, in words; "" where there is nothing to spare."""
    return method.spared(alignment) if net.sequence_blocks == 1 else ""


def training_multiply_adds(net: Architecture, passes: Passes, global_batch_size: int) -> int:
    """Multiply-adds of one optimizer step."""
    return round(passes.forwards * forward_multiply_adds(net) * global_batch_size)


@dataclass(frozen=True)
class Parameters:
    """Trainable elements of a net, counted on the meta device.

    Attributes:
        total: all of them.
        half: those that 16-bit autocast casts, and DeepSpeed may send in 16 bits (plain linear and conv layers).
        block, block_half: the same of one block.
        blocks, tensors: how many of them, and of parameters, there are.
        fixed: elements that are not trained, as of a position table.
    """

    total: int
    half: int
    block: int
    block_half: int
    blocks: int
    tensors: int
    fixed: int


# As DeepSpeed's torch_autocast.LOWER_PRECISION_SAFE_MODULES: the exact class, so that Fp32Linear stays in fp32.
_CAST = (nn.Linear, nn.Conv2d)


def _numel(module: nn.Module, only_cast: bool) -> int:
    parts = (part for part in module.modules() if not only_cast or type(part) in _CAST)
    return sum(p.numel() for part in parts for p in part.parameters(recurse=False))


@cache
def parameters(net: Architecture) -> Parameters:
    """Counts a net's parameters on meta tensors, without memory for them."""
    model = on_meta(net)
    block = model.blocks[0]
    return Parameters(
        total=_numel(model, False),
        half=_numel(model, True),
        block=_numel(block, False),
        block_half=_numel(block, True),
        blocks=len(model.blocks),
        tensors=len(list(model.parameters())),
        fixed=sum(buffer.numel() for buffer in model.buffers()),
    )


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in one optimizer step.

    Attributes:
        collective: all_reduce, all_gather or reduce_scatter.
        what: gradients, weights, or a teacher's.
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
    still_gathered = min(2 * (4.0 * p.block - (2.0 * p.block_half if half else 0.0)), weights)
    return 2.0 * weights - still_gathered
