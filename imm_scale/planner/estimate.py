"""What a run would need on machines one does not have: memory, time, traffic, money, and what to change first.

Memory, FLOPs and bytes on the wire are closed forms that tests hold against real engines. Times are a model: a roofline
over published peaks (hardware.py) with the shares below, none of them measured on these GPUs.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from imm_scale import build, storage
from imm_scale import config as configs
from imm_scale.config.schema import Config
from imm_scale.data.manifest import Manifest, TokenCodec, unseen
from imm_scale.data.sample_order import Layout
from imm_scale.errors import UserError
from imm_scale.models.base import Architecture
from imm_scale.parallel.zero_config import REDUCE_BUCKET, check_settings, halves_gradients, overlaps
from imm_scale.planner import flops as cost
from imm_scale.planner import hardware, memory
from imm_scale.planner.activations import elementwise_bytes, kernels
from imm_scale.planner.flops import Parameters, Traffic
from imm_scale.planner.hardware import Gpu, Link
from imm_scale.planner.memory import Memory, Setting
from imm_scale.planner.sampling import SamplingMemory, sampling_memory


class Range(NamedTuple):
    """From what good kernels and a quiet network allow to what plain ones reach."""

    low: float
    high: float


# Assumed shares of the published peaks, (best, worst): matrix products, memory traffic of everything else, network.
MATMUL_SHARE = (0.75, 0.45)
BANDWIDTH_SHARE = (0.9, 0.6)
NETWORK_SHARE = (0.85, 0.5)
COMPILED_TRAFFIC = 0.5  # of the eager memory traffic, with train.compile (assumed)
LAUNCH_SECONDS = (5e-6, 10e-6)  # for the CPU to launch a kernel (assumed); a step is no shorter than its launches
COMPILED_LAUNCHES = 0.3  # of the blocks' eager kernels, with train.compile (assumed)
HOST_BANDWIDTH = (100e9, 50e9)  # bytes/s a node's CPUs step an offloaded optimizer with (assumed)
STORAGE_BANDWIDTH = (2e9, 0.25e9)  # bytes/s a node writes a checkpoint with, hashing included (assumed)
_NPY_HEADER, _TAR_BLOCK = 128, 512


@dataclass(frozen=True)
class Data:
    """What the planner knows of the data set without opening it.

    Attributes:
        shape: (C, H, W) of a latent, (T,) of a sequence of tokens.
        record_bytes: of one sample in a shard, tar headers included.
        num_samples: None where neither config nor a reachable manifest says.
        vocabulary: of the tokens, None of latents.
    """

    shape: tuple[int, ...]
    num_classes: int
    record_bytes: float
    num_samples: int | None
    vocabulary: int | None = None


@dataclass(frozen=True)
class Estimate:
    """A config on a cluster. Bytes and seconds; memory and traffic are of one GPU, FLOPs of the whole step.

    Attributes:
        memory: at the moment a GPU holds most; `memory.total + memory.reserved` is compared with `gpu.memory`.
        fits: whether that is below it.
        sampling: what drawing samples holds, of nets that keep keys and values.
        forward_flops: of one image, a multiply-add counted twice (published GFLOPs are half of this).
        step_flops: 4 forwards for IMM (without gradient, with, backward twice), 3 for flow matching.
        spared: what other micro-batches would spare of it, in words.
        executed_flops: of a GPU, with recomputation and empty slots.
        traffic: collectives of a step.
        compute_seconds, network_seconds, optimizer_seconds: parts of `step_seconds`.
        data_bytes_per_second: what all nodes read at the pace of `step_seconds` (the faster, the more).
        days, gpu_hours: of train.max_steps, checkpoints included.
    """

    net: Architecture
    parameters: Parameters
    layout: Layout
    nodes: int
    gpus_per_node: int
    gpu: Gpu
    link: Link
    data: Data
    memory: Memory
    fits: bool
    sampling: SamplingMemory | None
    forward_flops: float
    step_flops: float
    spared: str
    executed_flops: float
    traffic: tuple[Traffic, ...]
    compute_seconds: Range
    network_seconds: Range
    optimizer_seconds: Range
    step_seconds: Range
    data_bytes_per_second: Range
    checkpoint_bytes: float
    checkpoint_seconds: Range
    days: Range
    gpu_hours: Range

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.gpus_per_node

    @property
    def images_per_second(self) -> Range:
        """Training images a second, over all ranks."""
        batch = self.layout.global_batch_size
        return Range(batch / self.step_seconds.high, batch / self.step_seconds.low)

    @property
    def sent_bytes(self) -> float:
        """Bytes a GPU sends in a step."""
        return sum(traffic.sent(self.world_size) for traffic in self.traffic)


def estimate(config: Config, nodes: int, gpus_per_node: int, gpu: str, link: str | None = None) -> Estimate:
    """What `config` needs on so many nodes. Cheap (a net is built without memory for it) and without a GPU.

    Args:
        gpu, link: names of the tables in hardware.py; no link means the default one.

    Raises:
        UserError: an unknown GPU or link, more ranks than groups, sizes that do not divide, a precision the GPU lacks,
            or data that nothing describes.
    """
    if nodes < 1 or gpus_per_node < 1:
        raise UserError(f"{nodes} nodes with {gpus_per_node} GPUs each: both must be at least 1")
    check_settings(config)
    device, network = hardware.gpu(gpu), hardware.link(link)
    if config.precision == "bf16" and not device.bf16:
        raise UserError(f"{device.name} does not compute in bf16: use precision=fp16 or another --gpu")
    data = describe_data(config)
    net = planned_net(config, data)
    train = config.train
    layout = Layout(train.global_batch_size, config.method.group_size, nodes * gpus_per_node, train.micro_batch_size)
    return _estimate(config, net, data, layout, nodes, gpus_per_node, device, network)


def planned_net(config: Config, data: Data) -> Architecture:
    """The net for data of which no more is known than its shape and classes. Raises UserError where it does not fit."""
    return build.architecture(config, build.space(config, unseen(data.shape, data.num_classes, data.vocabulary)))


def describe_data(config: Config) -> Data:
    """From the config where it says shape and classes, else from the manifest. Raises UserError when neither can."""
    data = config.data
    known = data.latent_shape is not None and data.num_classes is not None
    url = data.manifest
    if url is not None and (not known or (storage.is_local(url) and storage.exists(url))):
        try:
            manifest = Manifest.load(url)
        except (UserError, OSError) as error:
            raise UserError(f"{error}; or {_SAY_SHAPE}") from error
        size = sum(shard.bytes for shard in manifest.shards) / max(manifest.num_samples, 1)
        shape, classes = manifest.latent_shape, manifest.num_classes
        return Data(shape, classes, size, manifest.num_samples, manifest.vocabulary)
    if data.latent_shape is None or data.num_classes is None:
        raise UserError(f"nothing says what the data looks like: {_SAY_SHAPE}")
    return _unseen_data(config, tuple(data.latent_shape), data.num_classes)


def _unseen_data(config: Config, shape: tuple[int, ...], num_classes: int) -> Data:
    """What a config alone says. Raises UserError where shape and vocabulary are of latents and tokens mixed."""
    vocabulary = config.data.vocabulary
    if (len(shape) == 1) != (vocabulary is not None):
        raise UserError(
            f"data.latent_shape={list(shape)} with data.vocabulary={vocabulary}: latents have channels, height and "
            "width and no vocabulary; tokens have one length, as in data.latent_shape=[64] data.vocabulary=256"
        )
    return Data(shape, num_classes, _record_bytes(config, math.prod(shape)), None, vocabulary)


_SAY_SHAPE = (
    "set data.latent_shape=[C,H,W] and data.num_classes=K to plan without the data (tokens: data.latent_shape=[T] and "
    "data.vocabulary=V)"
)


def _record_bytes(config: Config, elements: int) -> float:
    """A sample as docs/data_format.md lays it out: the array (and a mirrored one) and a label, each a tar member."""
    vocabulary = config.data.vocabulary
    has_halves = vocabulary is None and config.data.codec != "pixels"
    width = 2 if vocabulary is None else TokenCodec(vocabulary, "", "").stored_dtype.itemsize
    member = _TAR_BLOCK + -(-(_NPY_HEADER + width * elements * (1 + has_halves)) // _TAR_BLOCK) * _TAR_BLOCK
    members = 2 if config.data.flip and has_halves else 1
    return float(members * member + 2 * _TAR_BLOCK)


def setting(config: Config, net: Architecture, layout: Layout) -> Setting:
    """The part of a config and a layout that memory depends on."""
    return Setting(
        net=net,
        samples=layout.samples_per_micro_batch,
        particles=layout.particles,
        accumulation=layout.accumulation,
        world_size=layout.world_size,
        stage=config.zero.stage,
        half=config.precision in ("bf16", "fp16"),
        half_gradients=halves_gradients(config),
        two_branches=config.method.passes.no_grad + config.method.passes.tangent > 0,
        tangent_samples=round(config.method.tangent_share(layout.alignment) * layout.samples_per_micro_batch),
        live_tangent=config.method.tangents_are_live,
        checkpointing=config.train.activation_checkpointing,
        offload=config.zero.offload == "optimizer",
        bucket=_reduce_bucket(config),
        overlap=overlaps(config, layout.world_size),
        decays=tuple(config.ema.decays),
        teacher=config.method.teacher_decay is not None,
        replicas=config.method.replicas,
    )


def _reduce_bucket(config: Config) -> int:
    zero: Any = config.zero.extra.get("zero_optimization", {})
    return int(zero.get("reduce_bucket_size", REDUCE_BUCKET))


def _estimate(
    config: Config,
    net: Architecture,
    data: Data,
    layout: Layout,
    nodes: int,
    gpus_per_node: int,
    device: Gpu,
    network: Link,
) -> Estimate:
    counted = cost.parameters(net)
    memory_setting = setting(config, net, layout)
    peak = memory.peak(memory_setting, counted)
    forward = cost.forward_multiply_adds(net)
    passes = cost.step_passes(config.method, net, layout.alignment)
    forwards = passes.forwards + cost.recomputed(net, passes) * config.train.activation_checkpointing
    images = layout.slots * layout.particles  # of a rank, empty slots included
    traffic = _traffic(memory_setting, counted)
    compute = _compute_seconds(config, memory_setting, device, 2.0 * forwards * forward * images, forwards * images)
    sent = sum(item.sent(layout.world_size) for item in traffic)
    bandwidth = device.intra if nodes == 1 else min(device.intra, network.per_node(gpus_per_node))
    send = Range(*(sent / bandwidth / share for share in NETWORK_SHARE))
    optimizer = _optimizer_seconds(memory_setting, counted, device, gpus_per_node)
    hidden = _hidden_seconds(memory_setting, traffic, compute.low, bandwidth * NETWORK_SHARE[0], forwards)
    step = Range(compute.low + send.low - hidden + optimizer.low, compute.high + send.high + optimizer.high)
    saved = 4.0 * counted.total * (3 + len(config.ema.decays))
    saving = Range(*(saved / nodes / speed for speed in STORAGE_BANDWIDTH))
    train = config.train
    checkpoints = -(-train.max_steps // train.checkpoint_every)
    seconds = Range(*(train.max_steps * a + checkpoints * b for a, b in zip(step, saving, strict=True)))
    read = layout.global_batch_size * data.record_bytes * _reread(config, data)
    return Estimate(
        net=net,
        parameters=counted,
        layout=layout,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=device,
        link=network,
        data=data,
        memory=peak,
        fits=peak.total + peak.reserved <= device.memory,
        sampling=sampling_memory(config, net, counted),
        forward_flops=2.0 * forward,
        step_flops=2.0 * cost.training_multiply_adds(net, passes, layout.global_batch_size),
        spared=cost.spared(config.method, net, layout.alignment),
        executed_flops=2.0 * forwards * forward * images,
        traffic=traffic,
        compute_seconds=compute,
        network_seconds=send,
        optimizer_seconds=optimizer,
        step_seconds=step,
        data_bytes_per_second=Range(read / step.high, read / step.low),
        checkpoint_bytes=saved,
        checkpoint_seconds=saving,
        days=Range(*(value / 86400 for value in seconds)),
        gpu_hours=Range(*(value / 3600 * layout.world_size for value in seconds)),
    )


def _traffic(s: Setting, p: Parameters) -> tuple[Traffic, ...]:
    sent = cost.wire(p, s.stage, s.half, s.half_gradients, s.overlap, s.accumulation, s.world_size)
    teacher = Traffic("all_reduce", "weights of the teacher", 4.0 * p.total, overlaps=False)
    return (*sent, teacher) if s.teacher and s.world_size > 1 else sent


def _hidden_seconds(
    s: Setting, traffic: tuple[Traffic, ...], compute: float, bandwidth: float, forwards: float
) -> float:
    """At best, the time of collectives behind computation: stage 3's behind all of it, gradients of stages 1 and 2
    behind the backward pass (two forwards and the recomputation), which stage 1 has them in only once a step."""
    beside = sum(item.sent(s.world_size) for item in traffic if item.overlaps) / bandwidth
    backward = compute * (2 + s.checkpointing) / forwards
    room = {1: backward / s.accumulation, 2: backward, 3: compute}.get(s.stage, 0.0)
    return min(beside, room)


def _reread(config: Config, data: Data) -> float:
    """Bytes read over bytes used: a block at the seam of two positions of the batch is read twice (sample_order.py)."""
    if data.num_samples is None:
        return 1.0
    steps = max(data.num_samples // config.train.global_batch_size, 1)
    return 1.0 + config.data.block_samples / steps


def _compute_seconds(config: Config, s: Setting, device: Gpu, flops: float, passes: float) -> Range:
    """Matrix products at a share of their peak, then everything else at a share of the memory's bandwidth.

    The two follow one another: an eager kernel is one or the other. `passes` are forward passes of one image. Small
    micro-batches wait for the CPU that launches their kernels.
    """
    moved = passes * elementwise_bytes(s.net, s.half) * (COMPILED_TRAFFIC if config.train.compile else 1.0)
    share = COMPILED_LAUNCHES if config.train.compile else 1.0
    launched = kernels(s.net, config.method.passes, s.half, s.checkpointing, share) * s.accumulation
    peak = device.peak(config.precision)
    shares = zip(MATMUL_SHARE, BANDWIDTH_SHARE, LAUNCH_SECONDS, strict=True)
    return Range(
        *(
            max(flops / (peak * matmul) + moved / (device.bandwidth * traffic), launched * launch)
            for matmul, traffic, launch in shares
        )
    )


def _optimizer_seconds(s: Setting, p: Parameters, device: Gpu, gpus_per_node: int) -> Range:
    """Adam reads weight, gradient and two moments and writes three of them; an average reads two and writes one."""
    stepped = 4.0 * p.total / (1 if s.stage == 0 else s.world_size)
    averaged = 4.0 * p.total / s.world_size
    moved = 7 * stepped + 3 * averaged * len(s.decays)
    if s.offload:
        return Range(*(moved * gpus_per_node / speed for speed in HOST_BANDWIDTH))
    return Range(*(moved / (device.bandwidth * share) for share in BANDWIDTH_SHARE))


# --- what to change ---


@dataclass(frozen=True)
class Change:
    """key=value words that make a config fit, and what comes of them."""

    overrides: tuple[str, ...]
    estimate: Estimate


def again(config: Config, base: Estimate, overrides: tuple[str, ...]) -> Estimate:
    """The plan of a config with key=value overrides laid over it, on the same machines."""
    changed = configs.changed(config, configs.settings_of(overrides), "a change of the plan")
    return estimate(changed, base.nodes, base.gpus_per_node, base.gpu.name, base.link.name)


def _steps_down(config: Config, layout: Layout) -> Iterator[tuple[str, ...]]:
    """Single changes: smaller buckets, smaller micro-batches, more shared, recomputation, the host's memory."""
    stage = config.zero.stage
    if stage > 0 and _reduce_bucket(config) > REDUCE_BUCKET:
        yield (f"zero.extra.zero_optimization.reduce_bucket_size={REDUCE_BUCKET}",)
    samples = layout.samples_per_micro_batch
    while samples > layout.particles:
        samples = max(samples // 2 // layout.particles, 1) * layout.particles
        yield (f"train.micro_batch_size={samples}",)
    for higher in range(stage + 1, 4):
        yield (f"zero.stage={higher}",)
    if not config.train.activation_checkpointing:
        yield ("train.activation_checkpointing=true",)
    if config.zero.offload == "none":
        yield ("zero.offload=optimizer", f"zero.stage={max(stage, 2)}")


def suggest(config: Config, base: Estimate, most: int = 4) -> list[Change]:
    """Changes that were checked to fit on the same machines: one key where one will do, else pairs, fastest first."""

    def check(overrides: tuple[str, ...]) -> Change | None:
        try:
            new = again(config, base, overrides)
        except UserError:
            return None  # a change that the config does not allow is no suggestion
        return Change(overrides, new) if new.fits else None

    singles = list(_steps_down(config, base.layout))
    fitting = [change for overrides in singles if (change := check(overrides))]
    if not fitting:
        pairs = (a + b for i, a in enumerate(singles) for b in singles[i + 1 :] if _keys(a).isdisjoint(_keys(b)))
        fitting = [change for overrides in pairs if (change := check(overrides))]
    if not fitting:
        strongest: dict[str, str] = {
            override.split("=")[0]: override for overrides in singles for override in overrides
        }
        fitting = [change] if (change := check(tuple(strongest.values()))) else []
    best: dict[frozenset[str], Change] = {}
    for change in sorted(fitting, key=lambda change: sum(change.estimate.step_seconds)):
        best.setdefault(_keys(change.overrides), change)
    return list(best.values())[:most]


def _keys(overrides: tuple[str, ...]) -> frozenset[str]:
    return frozenset(override.split("=")[0] for override in overrides)


def as_dict(estimate: Estimate) -> dict[str, Any]:
    """Plain numbers, for --json."""
    values = dataclasses.asdict(estimate)
    values["memory"] |= {"total": estimate.memory.total, "reserved": estimate.memory.reserved}
    values["images_per_second"] = estimate.images_per_second
    values["sent_bytes"] = estimate.sent_bytes
    return values
