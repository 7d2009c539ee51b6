"""What passes of one sample keep, move and launch: closed forms for the DiT, counted for any other backbone.

Legend: T tokens, D width, r mlp_ratio, u = T D elements of the residual stream of a sample.
"""

from dataclasses import dataclass, replace
from typing import TypeGuard

from imm_scale.choices import Passes
from imm_scale.models.base import Architecture
from imm_scale.models.dit import DiTConfig
from imm_scale.planner.counting import elements, footprint, tangent_footprint
from imm_scale.planner.flops import parameters

_FP32, _HALF = 4, 2


@dataclass(frozen=True)
class Activations:
    """Bytes of one sample.

    Attributes:
        block: what autograd keeps of one block, without 16-bit copies of its weights.
        block_input: what it keeps of a block that is recomputed.
        around: what it keeps outside the blocks.
        widest: of the branch without gradient, inside a block.
        workspace: of the backward pass, inside a block.
        elements: of a sample's branches as the net sees them; a number.
    """

    block: float
    block_input: float
    around: float
    widest: float
    workspace: float
    elements: int


def activations(net: Architecture, half: bool, replicas: int = 1) -> Activations:
    """Of a net's passes in fp32, or under 16-bit autocast, with so many replicas of its branches."""
    if _is_plain_dit(net):
        return _of_dit(net, _HALF if half else _FP32)
    counts = footprint(net, half, replicas)
    # Counted on a pass of all streams with gradient, of which the branch without is as one.
    widest, workspace = counts.widest / streams(net), counts.workspace
    if isinstance(net, DiTConfig):  # the count is of the whole way back, whose beginning holds more than its blocks do
        workspace = streams(net) * _of_dit(net, _HALF if half else _FP32).workspace
    size = replicas * elements(net)
    return Activations(counts.kept_by_block, counts.block_input, counts.kept_around, widest, workspace, size)


def streams(net: Architecture) -> int:
    """Streams of tokens through the blocks of the net, of a pass with gradient: where samples are several blocks the
    clean one too, or alone."""
    return 1 if net.sequence_blocks == 1 or net.branches_apart else 2


def _is_plain_dit(net: Architecture) -> TypeGuard[DiTConfig]:
    return isinstance(net, DiTConfig) and net.blocks == 1


@dataclass(frozen=True)
class TangentActivations:
    """Bytes of one sample whose derivative along a tangent is computed beside its value.

    Attributes:
        held: most that a tangent without gradient holds beside what the value keeps.
        block: what autograd keeps of one block where the tangent carries a gradient too, value included.
        around: what it keeps outside the blocks then.
        workspace: of that backward pass.
    """

    held: float
    block: float
    around: float
    workspace: float


def tangent_activations(net: Architecture, half: bool) -> TangentActivations:
    """Counted for every net, a DiT's on one of its blocks, which are alike."""
    one = replace(net, depth=1) if isinstance(net, DiTConfig) else net
    counts = tangent_footprint(one, half)
    return TangentActivations(counts.held, counts.kept_by_block, counts.kept_around, counts.workspace)


def _of_dit(net: DiTConfig, size: int) -> Activations:
    """From the code of `models/layers.py`; `size` is that of an element of a matrix product.

    The branch without gradient is at its widest in the MLP: four or five of (u), and both sides of the GELU. Beside
    the blocks are residual, norm and modulated of the final layer, and the inputs. A block's backward pass holds the
    gradients of the residual and of the hidden layer of the MLP.
    """
    u = net.tokens * net.width
    wide = int(net.width * net.mlp_ratio) / net.width
    pixels = net.channels * net.height * net.image_width
    return Activations(
        block=_dit_block(net, size),
        block_input=_FP32 * u,
        around=(2 * _FP32 + size) * u + 2 * pixels * _FP32,
        widest=(4 * _FP32 + (1 + 2 * wide) * size) * u,
        workspace=(_FP32 + wide * size) * u,
        elements=pixels,
    )


def _dit_block(net: DiTConfig, size: int) -> float:
    """fp32 (12 + 2r) u: residual, norm, modulated, q, k, v, attention, its projection, residual, norm, modulated, both
    sides of the GELU, MLP. Autocast keeps residuals and norms in fp32, the other 8 + 2r in 16 bits.
    """
    u = net.tokens * net.width
    wide = 2 * int(net.width * net.mlp_ratio) / net.width
    saved = (4 * _FP32 + (8 + wide) * size) * u
    if net.qk_norm:  # both sides of the norms of q and k, which autocast runs in fp32
        saved += (5 if size == _HALF else 4) * _FP32 * u
    if net.dropout:  # two masks
        saved += 2 * size * u
    statistics = net.tokens * (4 + net.heads) * _FP32  # of two norms, and the attention's log-sum-exp
    condition = 9 * net.width * _FP32  # SiLU, the six modulations, 1 + scale twice
    return saved + statistics + condition


def elementwise_bytes(net: Architecture, half: bool) -> float:
    """Bytes that the kernels around the matrix products move in one eager forward pass of one image.

    The DiT's, per block and element of (T, D), reads and writes: two norms 4, two modulations 8, two gates 2 written,
    two residual sums 6, all in fp32; two gates 2 read, attention 4 and GELU 2 r in the type of the matrix products;
    under autocast two casts from fp32.
    """
    if not _is_plain_dit(net):
        return footprint(net, half).moved / streams(net)
    size = _HALF if half else _FP32
    hidden = int(net.width * net.mlp_ratio) / net.width
    per_element = 20 * 4 + (6 + 2 * hidden) * size + (2 * (4 + 2) if half else 0)
    return net.depth * per_element * net.tokens * net.width


def kernels(net: Architecture, passes: Passes, half: bool, checkpointing: bool, of_a_block: float = 1.0) -> float:
    """What the CPU launches for one micro-batch, forward and backward, views aside.

    Of the DiT counted by `python -m benchmarks.operators`. A block takes 19 operations in each branch, 38 backward and
    17 more where it is recomputed; under autocast 21, 50 and 27, and 8 casts of its weights for both branches together.
    Around the blocks, where draws and loss are compiled, it is 104 for IMM and 64 for flow matching, under autocast 14
    more. Of any other net the passes are counted, without draws and loss.

    Args:
        of_a_block: the share of a block's operations that is launched, below 1 where blocks are compiled.
    """
    branches = passes.grad + passes.no_grad
    if not _is_plain_dit(net):
        counts = footprint(net, half)
        again = counts.block_operators * checkpointing
        share = counts.block_operators / (counts.block_operators + counts.other_operators)
        through = 1 if net.branches_apart else branches
        inside = through * counts.block_operators + share * counts.backward_operators + again
        return of_a_block * inside + branches * counts.other_operators + (1 - share) * counts.backward_operators
    branch, casts, backward, once_more = (21, 8, 50, 27) if half else (19, 0, 38, 17)
    around = 64 + 40 * (branches - 1)
    block = branches * branch + casts + backward + once_more * checkpointing
    return of_a_block * parameters(net).blocks * block + around + 14 * half
