"""What one GPU holds, part by part, at the moment of a step when it holds most.

Closed forms of the order of a step (`flow_map.pair`, one backward pass) and of what DeepSpeed 0.19 allocates under fp32
parameters; what a sample's passes keep is in activations.py. Tests compare them with real engines. Bytes throughout.

Legend: N samples of a micro-batch, P parameters, S = 4 P, W ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from imm_scale.models.base import Architecture
from imm_scale.planner.activations import activations, tangent_activations
from imm_scale.planner.flops import Parameters

_FP32, _HALF, _FP64 = 4, 2, 8
_PLAIN_BUCKET = 500_000_000  # elements that DeepSpeed's stage 0 flattens at once
_MAX_SUBGROUP = 10**9  # elements whose gradients stage 3 flattens at once
# Assumed, not derived: CUDA context, NCCL channels and cuBLAS workspace, and what the allocator cannot use.
CONTEXT = 2 << 30
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Setting:
    """What decides how much a rank holds.

    Attributes:
        samples: N, of a micro-batch on this rank.
        particles: M.
        half: 16-bit autocast.
        half_gradients: its layers' gradients are summed over ranks in 16 bits too.
        two_branches: IMM and its special cases; flow matching has one.
        tangent_samples: of a micro-batch, how many a derivative along a tangent is taken of.
        live_tangent: it carries a gradient, and flow matching has a pass of its own beside it.
        bucket: elements of DeepSpeed's reduce bucket.
        overlap: gradients are reduced beside the backward pass.
        decays: of the moving averages.
        teacher: one of them is kept whole beside the net, for the loss.
        replicas: branches of each sample.
    """

    net: Architecture
    samples: int
    particles: int
    accumulation: int
    world_size: int
    stage: int
    half: bool
    half_gradients: bool
    two_branches: bool
    tangent_samples: int
    live_tangent: bool
    checkpointing: bool
    offload: bool
    bucket: int
    overlap: bool
    decays: tuple[float, ...]
    teacher: bool = False
    replicas: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment `when` it holds most. `host` is in the memory of the node.

    Attributes:
        weights: the parameters, and at stages 1 and 2 the flat buffer they live in.
        gradients: of the parameters, whole or this rank's part.
        optimizer: Adam's two moments and, at stages 1 to 3, the fp32 copy they step.
        ema: (decay, bytes) of each moving average.
        activations: what autograd keeps for the backward pass.
        buffers: 16-bit copies of weights, the branch without gradient, workspace of the backward pass.
        communication: reduce buckets, their flattened copies, gathered weights.
    """

    when: str
    weights: float
    gradients: float
    optimizer: float
    ema: tuple[tuple[float, float], ...]
    activations: float = 0.0
    buffers: float = 0.0
    communication: float = 0.0
    host: float = 0.0

    @property
    def states(self) -> float:
        """What stays from step to step, and the gradients."""
        return self.weights + self.gradients + self.optimizer + sum(size for _, size in self.ema)

    @property
    def total(self) -> float:
        """All that torch allocates."""
        return self.states + self.activations + self.buffers + self.communication

    @property
    def reserved(self) -> float:
        """Beside what torch allocates (assumed)."""
        return CONTEXT + FRAGMENTATION * self.total


def kept_by_block(s: Setting) -> float:
    """Bytes autograd keeps of one block without activation checkpointing, without 16-bit copies of its weights."""
    return s.samples * activations(s.net, s.half, s.replicas).block


def _pairs(s: Setting, elements: int) -> float:
    """Two fp64 tensors (G, M, M, elements), differences of M particles: y_t against itself and against y_r."""
    return 2 * s.samples * s.particles * elements * _FP64 if s.two_branches else 0.0


# --- what ZeRO holds ---


def _model_states(s: Setting, p: Parameters) -> Memory:
    """Weights, optimizer and averages, the same all the time; gradients only where they are never freed (stage 3)."""
    size = _FP32 * p.total
    part = size / s.world_size
    weights = (part if s.stage == 3 else size) + size * s.teacher
    optimizer = 2 * size if s.stage == 0 else 3 * part
    gradients = part if s.stage == 3 else 0.0
    averages = tuple((decay, part) for decay in s.decays)
    copy = (3 + len(averages)) * part  # of weights, moments and averages, from which checkpoints are written
    memory = Memory("between steps", weights, gradients, optimizer, averages, host=copy)
    if s.stage == 3:
        memory = replace(memory, communication=_buckets(s, p))
    if s.offload:
        host = optimizer + part + sum(average for _, average in averages)  # and the gradients it steps with
        memory = replace(memory, optimizer=0.0, gradients=0.0, ema=tuple((d, 0.0) for d in s.decays), host=copy + host)
    return memory


def _dtypes(s: Setting, p: Parameters) -> list[tuple[int, int]]:
    """(elements, bytes of an element) of the gradients that are sent in each type."""
    return [(p.half, _HALF), (p.total - p.half, _FP32)] if s.half_gradients else [(p.total, _FP32)]


def _buckets(s: Setting, p: Parameters) -> float:
    """Contiguous buffers for gradients, one per type they are sent in: fp32 at stages 1 and 2, that type at stage 3.

    Where they are reduced beside the backward pass, stages 1 and 2 fill a second one meanwhile.
    """
    if s.stage == 0:
        return 0.0
    if s.stage == 3:
        return float(sum(s.bucket * size for _, size in _dtypes(s, p)))
    return float((1 + s.overlap) * s.bucket * _FP32 * len(_dtypes(s, p)))


def _flattened(s: Setting, p: Parameters) -> float:
    """The copy of a full bucket that a collective runs on, the larger of the types."""
    limit = _PLAIN_BUCKET if s.stage == 0 else s.bucket
    copies = []
    for numel, size in _dtypes(s, p):
        converted = size if s.stage in (1, 2) and size != _FP32 else 0
        copies.append(min(numel, limit) * ((size if s.stage == 3 else _FP32) + converted))
    return float(max(copies))


def _gathered_weights(s: Setting, p: Parameters) -> float:
    """Stage 3: two live blocks and one on its way, in the types they are sent in; one fp32 rank works on its own."""
    if s.stage < 3 or (s.world_size == 1 and not s.half):
        return 0.0
    return 3.0 * (_FP32 * p.block - (_HALF * p.block_half if s.half else 0))


def _gradients_before(s: Setting, p: Parameters) -> float:
    """Of earlier micro-batches of the step, while the next one runs."""
    if s.accumulation == 1 or s.stage == 3 or (s.offload and s.stage == 2):
        return 0.0
    return _FP32 * p.total / (s.world_size if s.stage == 2 else 1)


def _casts(s: Setting, p: Parameters) -> float:
    """Weights that autocast has cast to 16 bits; at stage 3 they are gathered so."""
    return _HALF * p.half if s.half and s.stage < 3 else 0.0


# --- moments ---


@dataclass(frozen=True)
class _Kept:
    """Bytes of a micro-batch's passes.

    Attributes:
        block: kept by a block whose backward pass comes.
        saved: kept by a block until its backward pass comes.
        around: kept outside the blocks.
        beside: held by branches and tangents without gradient, inside a block.
        workspace: of a backward pass through a block.
    """

    block: float
    saved: float
    around: float
    beside: float
    workspace: float


def _kept(s: Setting, depth: int) -> _Kept:
    """Of the passes whose graphs a step goes back through."""
    sample = activations(s.net, s.half, s.replicas)
    block, around, entry, workspace = sample.block, sample.around, sample.block_input, sample.workspace
    beside = s.samples * sample.widest if s.two_branches else 0.0
    if s.tangent_samples:
        tangent = tangent_activations(s.net, s.half)
        beside = max(beside, s.tangent_samples * tangent.held)
        if s.live_tangent:
            # A value and its tangent, and flow matching's value, enter each block. The graph of the latter is made last
            # and so goes first: it makes room for what the way back through the tangent holds, if it is there.
            around, entry = around + tangent.around, 3 * entry
            room = 0.0 if s.checkpointing else depth * block
            workspace = max(workspace, tangent.workspace - room)
            block = tangent.block if s.checkpointing else tangent.block + block
    saved = entry if s.checkpointing else block
    return _Kept(s.samples * block, s.samples * saved, s.samples * around, beside, s.samples * workspace)


def moments(s: Setting, p: Parameters) -> Iterator[Memory]:
    """What a rank holds at the points of a step where it may hold most, in their order."""
    states = _model_states(s, p)
    before, gathered = _gradients_before(s, p), _gathered_weights(s, p)
    lasting = 0.0 if s.stage == 3 else _buckets(s, p)  # `states` has those of stage 3
    depth = p.blocks
    kept = _kept(s, depth)
    pairs = _pairs(s, activations(s.net, s.half, s.replicas).elements)

    def at(when: str, gradients: float, activations: float, buffers: float, communication: float) -> Memory:
        return replace(
            states,
            when=when,
            gradients=states.gradients + gradients,
            activations=activations,
            buffers=buffers,
            communication=states.communication + communication,
        )

    # Buckets live from the first gradient of a step (stage 1) or of a micro-batch (stage 2) on.
    already = lasting if s.stage == 1 and s.accumulation > 1 else 0.0
    yield at("forward", before, depth * kept.saved, kept.beside + _casts(s, p), already + gathered)
    graph_casts = 0.0 if s.checkpointing else _casts(s, p)
    head = depth * kept.saved + kept.around + pairs
    yield at("loss", before, head, pairs + graph_casts, already + gathered)
    rerun = kept.block if s.checkpointing else 0.0
    one_cast = _casts(s, p) / depth if s.checkpointing else 0.0
    buffers = kept.workspace + rerun + graph_casts + one_cast
    already_there = max(before, _gradients_after(s, p)) if s.live_tangent else before  # flow matching's
    yield at("backward, last block", already_there, depth * kept.saved, buffers, lasting + gathered)
    buffers = kept.workspace + rerun + one_cast
    others = _gradients_after(s, p) * (1 - p.block / p.total)  # the block's own come as its activations go
    yield at("backward, first block", others, kept.saved, buffers, lasting + gathered)
    yield at(
        "reducing gradients",
        _gradients_after(s, p),
        0.0,
        0.0,
        lasting + (_flattened(s, p) if s.world_size > 1 or s.stage == 0 else 0.0),  # stage 0 flattens for itself too
    )
    yield at("optimizer step", _step(s, p), 0.0, 0.0, 0.0)


def _gradients_after(s: Setting, p: Parameters) -> float:
    """At the end of a backward pass: whole at stages 0 and 1; at 2 this rank's part, twice while it is added up."""
    size = _FP32 * p.total
    if s.stage < 2:
        return size
    if s.stage == 3 or s.offload:
        return 0.0
    return size / s.world_size * (2 if s.accumulation > 1 else 1)


def _step(s: Setting, p: Parameters) -> float:
    """Gradients when the fused optimizer steps: above stage 0 those of the part once more as one flat tensor."""
    size = _FP32 * p.total
    if s.stage == 0:
        return size
    part = size / s.world_size
    if s.offload:
        return 0.0
    return min(part, _FP32 * _MAX_SUBGROUP) if s.stage == 3 else 2 * part


def peak(s: Setting, p: Parameters) -> Memory:
    """The moment of a step when a rank holds most."""
    return max(moments(s, p), key=lambda memory: memory.total)


def between_steps(s: Setting, p: Parameters) -> Memory:
    """What a rank holds when no step runs."""
    return _model_states(s, p)
