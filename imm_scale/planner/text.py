"""A plan as text: what `imm-scale plan` prints. What no test measures says "model" beside it."""

from collections.abc import Iterator

from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.methods.samplers import SAMPLES_PER_CALL
from imm_scale.models.base import Architecture
from imm_scale.planner.estimate import MATMUL_SHARE, NETWORK_SHARE, Change, Estimate, Range, again
from imm_scale.planner.memory import CONTEXT
from imm_scale.planner.sampling import SamplingMemory
from imm_scale.precision import HALF

_GIB = 1 << 30


def render(config: Config, estimate: Estimate, changes: list[Change]) -> str:
    """The whole page; `changes` are shown where the plan does not fit."""
    parts = [
        _head(config, estimate),
        _memory(estimate),
        *([_sampling(config, estimate, estimate.sampling)] if estimate.sampling is not None else []),
        _work(config, estimate),
        _time(config, estimate),
        _storage(estimate),
    ]
    if not estimate.fits:
        parts.append(_changes(changes))
    return "\n\n".join("\n".join(part) for part in parts)


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<22} {value:>16}" + (f"   {note}" if note else "")


def _bytes(value: float) -> str:
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def _count(value: float) -> str:
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} "


def _span(value: Range, unit: str, scale: float = 1.0) -> str:
    low, high = f"{value.low * scale:,.3g}", f"{value.high * scale:,.3g}"
    if value.high * scale >= 1000:
        low, high = f"{value.low * scale:,.0f}", f"{value.high * scale:,.0f}"
    return f"{low} to {high} {unit}" if low != high else f"{low} {unit}"


def _seconds(value: Range) -> str:
    return _span(value, "ms", 1000) if value.high < 1 else _span(value, "s")


def _head(config: Config, estimate: Estimate) -> Iterator[str]:
    layout, net = estimate.layout, estimate.net
    micro = layout.samples_per_micro_batch
    empty = layout.slots * layout.world_size - layout.num_groups
    link = f" over {estimate.link.name}" if estimate.nodes > 1 else ""
    yield f"{estimate.nodes} x {estimate.gpus_per_node} {estimate.gpu.name}{link}: {layout.world_size} ranks"
    yield (
        f"{config.model.title}{_shape(net)}, {estimate.parameters.total:,} trainable parameters, {config.method.name}, "
        f"{config.precision}, ZeRO stage {config.zero.stage}"
        + (", activation checkpointing" * config.train.activation_checkpointing)
    )
    yield (
        f"global batch {layout.global_batch_size} = micro-batch {micro} x accumulation {layout.accumulation} "
        f"x {layout.world_size} ranks" + (f", {empty} of the group slots stay empty" if empty else "")
    )
    unknown = [key for key in config.zero.extra if key != "zero_optimization"]
    inner = config.zero.extra.get("zero_optimization", {})
    unknown += [f"zero_optimization.{key}" for key in inner if key != "reduce_bucket_size"]
    if unknown:
        yield f"not modelled: zero.extra.{', zero.extra.'.join(unknown)}"


def _shape(net: Architecture) -> str:
    """What a net says of its own shape, in brackets."""
    shown = {"width": "width {}", "depth": "depth {}", "tokens": "{} tokens"}
    parts = [form.format(getattr(net, name)) for name, form in shown.items() if hasattr(net, name)]
    return f" ({', '.join(parts)})" if parts else ""


def _memory(estimate: Estimate) -> Iterator[str]:
    m = estimate.memory
    yield f"memory of a GPU when it holds most ({m.when})"
    yield _row("weights", _bytes(m.weights))
    yield _row("gradients", _bytes(m.gradients))
    yield _row("optimizer", _bytes(m.optimizer), "moments, and the fp32 copy that ZeRO steps")
    for decay, size in m.ema:
        yield _row(f"ema {decay!r}", _bytes(size))
    yield _row("activations", _bytes(m.activations))
    yield _row("buffers", _bytes(m.buffers), "branch without gradient, 16-bit weights, workspace")
    yield _row("communication", _bytes(m.communication), "reduce buckets, gathered weights")
    yield _row("CUDA and allocator", _bytes(m.reserved), "model: 2 GiB and 5 %")
    yield _in_all(m.total + m.reserved, estimate)
    yield _row(
        "host memory, a node", _bytes(m.host * estimate.gpus_per_node), "a checkpoint's copy, and what is offloaded"
    )


def _in_all(used: float, estimate: Estimate) -> str:
    there = estimate.gpu.memory
    verdict = "fits" if used <= there else "DOES NOT FIT"
    return _row("in all", _bytes(used), f"of {_bytes(there)}: {used / there:.0%}, {verdict}")


def _sampling(config: Config, estimate: Estimate, memory: SamplingMemory) -> Iterator[str]:
    guided = config.sampling.guidance_scale != 1.0
    yield f"memory of a GPU that samples, {SAMPLES_PER_CALL} at once in {config.sampling.precision}"
    yield _row("weights", _bytes(memory.weights))
    yield _row("kept keys and values", _bytes(memory.kept), "at most" + ", with and without label" * guided)
    yield _row("CUDA", _bytes(CONTEXT), "model")
    yield _in_all(memory.total + CONTEXT, estimate)
    if memory.total + CONTEXT > estimate.gpu.memory:
        lighter = ["sampling.precision=bf16"] * (config.sampling.precision not in HALF)
        lighter += ["sampling.guidance_scale=1"] * guided
        less = f"halved by each of: {', '.join(lighter)}" if lighter else "use a GPU with more memory, or a smaller net"
        yield f"  {less}"


def _work(config: Config, estimate: Estimate) -> Iterator[str]:
    forwards = estimate.step_flops / estimate.forward_flops / estimate.layout.global_batch_size
    yield "work of a step (a multiply-add is 2 FLOPs; published GFLOPs of DiT and IMM count it once)"
    yield _row("forward, an image", _count(estimate.forward_flops) + "FLOPs")
    yield _row(
        "step",
        _count(estimate.step_flops) + "FLOPs",
        f"{forwards:.3g} forwards x {estimate.layout.global_batch_size}{estimate.spared}",
    )
    recomputes = ", blocks run again" * config.train.activation_checkpointing
    slots = f"{estimate.layout.slots} slots of {estimate.layout.particles} images"
    yield _row("a GPU runs", _count(estimate.executed_flops) + "FLOPs", slots + recomputes)
    yield "sent by a GPU in a step (ring)"
    for item in estimate.traffic:
        how = f"beside {_beside(config)}" if item.overlaps else "after the backward pass"
        if item.collective == "all_gather" and not item.overlaps:
            how = "after the optimizer"
        yield _row(f"{item.collective} {item.what}", _bytes(item.sent(estimate.world_size)), how)
    if not estimate.traffic:
        yield _row("nothing", "0 B", "one rank")


def _beside(config: Config) -> str:
    """What collectives that overlap run beside."""
    return "the computation" if config.zero.stage == 3 else "the backward pass"


def _time(config: Config, estimate: Estimate) -> Iterator[str]:
    train = config.train
    hidden = any(item.overlaps for item in estimate.traffic)
    best = f"hidden behind {_beside(config)} at best" if hidden else "not hidden"
    yield "time (model: shares of published peaks, not fitted to any GPU)"
    yield _row("computation", _seconds(estimate.compute_seconds), _shares("matrix peak", MATMUL_SHARE))
    yield _row("network", _seconds(estimate.network_seconds), f"{_shares('bandwidth', NETWORK_SHARE)}, {best}")
    yield _row("optimizer, averages", _seconds(estimate.optimizer_seconds))
    yield _row("step", _seconds(estimate.step_seconds), f"{_span(estimate.images_per_second, 'images/s')}")
    peak = estimate.gpu.peak(config.precision) * estimate.world_size
    useful = Range(*(estimate.step_flops / (seconds * peak) for seconds in reversed(estimate.step_seconds)))
    yield _row("share of peak (MFU)", _span(useful, "%", 100))
    yield _row("days", _span(estimate.days, "days"), f"{train.max_steps:,} steps and their checkpoints")
    yield _row("GPU-hours", _span(estimate.gpu_hours, "h"))


def _shares(what: str, shares: tuple[float, float]) -> str:
    return f"{shares[0]:.0%} to {shares[1]:.0%} of the {what}"


def _storage(estimate: Estimate) -> Iterator[str]:
    data, nodes = estimate.data, estimate.nodes
    yield "storage"
    reading = estimate.data_bytes_per_second
    yield _row("data, all nodes", _span(reading, "MB/s", 1e-6), f"{data.record_bytes / 1024:.1f} KiB an image (model)")
    if nodes > 1:
        yield _row("data, a node", _span(Range(*(value / nodes for value in reading)), "MB/s", 1e-6))
    if data.num_samples:
        epochs = data.num_samples / estimate.layout.global_batch_size
        yield _row("epoch", f"{epochs:,.0f} steps", f"{data.num_samples:,} images")
    yield _row("checkpoint", _bytes(estimate.checkpoint_bytes), "weights, two moments, each average, in fp32")
    yield _row("writing it", _seconds(estimate.checkpoint_seconds), "model: 2 to 0.25 GB/s a node; training waits")


def _changes(changes: list[Change]) -> Iterator[str]:
    if not changes:
        yield "nothing tried fits: use a GPU with more memory, a smaller model, or more nodes with zero.stage=3"
        return
    yield "it fits with any of these (each planned the same way; the fastest first)"
    for change in changes:
        memory = change.estimate.memory
        share = (memory.total + memory.reserved) / change.estimate.gpu.memory
        seconds = _seconds(change.estimate.step_seconds)
        yield f"  {' '.join(change.overrides)}   {share:.0%} of the memory, {seconds} a step"


def compare(config: Config, estimate: Estimate) -> str:
    """A table over ZeRO stages and micro-batches on the same machines."""
    head = f"  {'stage':>5} {'micro':>6} {'accum':>6} {'memory':>11}  {'fits':<4} {'sent':>11}  step"
    lines = ["ZeRO stages and micro-batches", head]
    particles, most = config.method.group_size, estimate.layout.slots_per_rank * config.method.group_size
    sizes = sorted({max(most >> shift, particles) // particles * particles for shift in range(8)}, reverse=True)
    for stage in range(4):
        for size in sizes:
            overrides = (f"zero.stage={stage}", f"train.micro_batch_size={size}")
            try:
                other = again(config, estimate, overrides)
            except UserError:
                continue  # a stage the config's other keys rule out
            total = other.memory.total + other.memory.reserved
            lines.append(
                f"  {stage:>5} {size:>6} {other.layout.accumulation:>6} {_bytes(total):>11}  "
                f"{'yes' if other.fits else 'no':<4} {_bytes(other.sent_bytes):>11}  {_seconds(other.step_seconds)}"
            )
    return "\n".join(lines)
