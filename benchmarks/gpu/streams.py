"""Nets of several blocks: attention that skips what masks hide, and kept blocks, against dense masks and whole passes.

The reference of proofs is fp64 on the CPU under dense masks.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.gpu import abilities, problem
from benchmarks.gpu.case import make_net, net_config
from benchmarks.gpu.report import Context, Report
from benchmarks.gpu.timing import Budget, Stopwatch, extra_memory, part
from imm_scale import fusion
from imm_scale.methods.flow_map import FlowMap, Given
from imm_scale.methods.in_blocks import sampling
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.methods.samplers import NO_GUIDANCE, pushforward
from imm_scale.models import base, streams
from imm_scale.models.dit import DiT, DiTConfig
from imm_scale.precision import computing

BLOCKS = 4
_LARGEST = "DiT-XL/2"
_HEADS, _HEAD_SIZE = 16, 72  # of XL as published
_TOKENS = (256, 1024)  # of images of 256 and 512 pixels
# Inputs are of 16 bits on both sides; scores, weights and outputs are rounded to 2^-9, gradients on the way too.
_OUT, _BACK = 1e-2, 2e-2
# As for the derivative in `tangent`: rounding of every product, over the layers of the small net.
_NET = {"fp32": 1e-5, "bf16": 3e-2}
_NET_BACK = {"fp32": 1e-4, "bf16": 6e-2}
# fp32 sums over other shapes round otherwise, to 2^-24, in some hundred products one after the other.
_SAME = 1e-5
Masks = streams.Masks


def run(context: Context, report: Report) -> None:
    budget = Budget(context, "streams")
    prove_sampling(context, report)
    _prove_attention(context, report)
    net, reference = _net_and_reference(context)
    for precision in _NET:
        _prove_net(context, report, precision, net, reference)
    # In order of worth, with seconds that are those of compilation but for sampling.
    parts = {
        "net, bf16, compiled": (8, lambda: _prove_compiled(context, report, net, reference)),
        "sampling": (3, lambda: _measure_sampling(context, report)),
        "attention": (8, lambda: _measure_attention(context, report)),
        "a pair of passes": (6, lambda: _measure_pair(context, report)),
        "a pair of passes, compiled": (10, lambda: _measure_compiled(context, report)),
    }
    for name, (seconds, act) in parts.items():
        if budget.allows(report, name, seconds):
            with part(report, name):
                act()


def _kinds(context: Context, report: Report) -> dict[str, Callable[..., Masks]]:
    """Masks of J blocks of b tokens by how they are made; says where none can skip."""
    dense = {"dense masks": lambda blocks, size: _masks(blocks, size, context.device, False)}
    if not (context.small or streams.takes_block_masks(context.device)):
        report.skip("masks that skip", "not on this card, or nothing compiles here: the program takes dense ones")
        return dense
    return dense | {"masks that skip": lambda blocks, size: _masks(blocks, size, context.device, True)}


def _masks(blocks: int, size: int, device: torch.device, skips: bool) -> Masks:
    tokens = blocks * size
    sights = (streams.clean_sight(size, 0), tokens), (streams.branch_sight(size, tokens), 2 * tokens)
    if skips:
        return Masks(*(create_block_mask(sight, None, None, tokens, keys, device) for sight, keys in sights))
    return Masks(*(streams.dense_mask(sight, tokens, keys, device) for sight, keys in sights))


@contextlib.contextmanager
def _dense() -> Iterator[None]:
    """The program takes dense masks, as on a card that cannot skip."""
    with patch.object(streams, "takes_block_masks", lambda _: False):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Proofs


def _prove_attention(context: Context, report: Report) -> None:
    blocks, block = (BLOCKS, 4) if context.small else (BLOCKS, 64)
    generator = torch.Generator().manual_seed(0)
    tokens, heads = blocks * block, 2
    shapes = [(2, count, heads, _HEAD_SIZE) for count in (tokens, 2 * tokens, 2 * tokens, tokens)]
    drawn = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    masks = _masks(blocks, block, torch.device("cpu"), False)
    reference = _attended(*(part.double() for part in drawn), masks.branch)
    there = [part.to(context.device) for part in drawn]
    for name, make in _kinds(context, report).items():
        on_cpu = context.small and name == "masks that skip"  # where that attention has no way back
        out, gradient = _attended(*there, make(blocks, block).branch, gradient=not on_cpu)
        name = f"attention at head size {_HEAD_SIZE}, {name}, bf16"
        report.check(f"{name}: output against fp64, relative", _apart(out, reference[0]), at_most=_OUT)
        if gradient is not None and reference[1] is not None:
            report.check(f"{name}: gradient against fp64, relative", _apart(gradient, reference[1]), at_most=_BACK)


def _attended(
    q: Tensor, k: Tensor, v: Tensor, way: Tensor, mask: streams.Mask, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The output of a branch's attention, and the gradient by (q, k, v) of its product with `way`, flat."""
    leaves = [part.clone().requires_grad_(gradient) for part in (q, k, v)]
    out = streams.attend_masked(*leaves, mask, "sdpa")
    if not gradient:
        return out.detach(), None
    found = torch.autograd.grad((out * way).sum(), leaves)
    return out.detach(), torch.cat([part.flatten() for part in found])


def _apart(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double().cpu() - expected).norm() / expected.norm())


class _Pair:
    """A net of several blocks, and what a pair of its passes takes: samples, the clean ones, times, labels."""

    def __init__(self, net: DiT, samples: int):
        c, generator = net.config, torch.Generator().manual_seed(0)
        shape = (samples, c.channels, c.height, c.image_width)
        self.net, (self.clean, self.x) = net, torch.randn(2, *shape, generator=generator)
        self.times = 1000 * torch.rand(2, samples, c.blocks, generator=generator, dtype=torch.float64)
        self.label = torch.arange(samples) % c.num_classes

    def on(self, device: torch.device, dtype: torch.dtype) -> "_Pair":
        """The same there; times stay in fp64."""
        there = copy.copy(self)
        there.net = copy.deepcopy(self.net).to(device, dtype)
        there.clean, there.x = self.clean.to(device, dtype), self.x.to(device, dtype)
        there.times, there.label = self.times.to(device), self.label.to(device)
        return there

    def passes(self, precision: str = "fp32") -> Tensor:
        """Both branches, (2, N, C, H, W), the second without gradient."""
        (c_noise, second), still = self.times, torch.zeros(len(self.x), dtype=torch.float64, device=self.x.device)
        given = base.Context(self.clean, still, still)
        with computing(precision, self.x.device):
            times = c_noise, 0.9 * c_noise, second, 0.9 * second
            return torch.stack(self.net.pair(self.x, 0.9 * self.x, *times, self.label, context=given))

    def evaluate(self, precision: str = "fp32") -> tuple[Tensor, Tensor]:
        """Both branches, and the gradient of half the first one's square, flat."""
        self.net.zero_grad(set_to_none=True)
        out = self.passes(precision)
        (0.5 * out[0].float().square().sum() if precision == "bf16" else 0.5 * out[0].square().sum()).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.net.parameters()]
        return out.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def _small_net(context: Context) -> DiT:
    plain = problem.net(context.small)
    net = DiT(replace(plain.config, blocks=BLOCKS))
    net.load_state_dict(plain.state_dict())
    return net


def _net_and_reference(context: Context) -> tuple[_Pair, tuple[Tensor, Tensor]]:
    """A net on the device, and what it answers in fp64 on the CPU."""
    here = _Pair(_small_net(context), 4)
    return here.on(context.device, torch.float32), here.on(torch.device("cpu"), torch.float64).evaluate()


def _prove_net(context: Context, report: Report, precision: str, net: _Pair, reference: tuple[Tensor, Tensor]) -> None:
    """fp32 takes dense masks everywhere; bf16 those that skip, where there are some."""
    missing = abilities.lacks_precision(context, precision)
    if missing:
        report.skip(f"net, {precision}", missing)
        return
    _compare_net(report, f"net, {precision}", net.evaluate(precision), reference, precision)


def _prove_compiled(context: Context, report: Report, net: _Pair, reference: tuple[Tensor, Tensor]) -> None:
    name = "net, bf16"
    if not abilities.compiles_afresh(context, report, name):
        return
    net.net.compile_blocks()
    _compare_net(report, f"{name}, compiled", net.evaluate("bf16"), reference, "bf16")
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    report.check(f"{name}, compiled: graph breaks", breaks, at_most=0)
    net.evaluate("bf16")
    more = counters["stats"]["unique_graphs"] - graphs
    report.check(f"{name}, compiled: graphs after the first step", more, at_most=0)


def _compare_net(
    report: Report, name: str, actual: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], precision: str
) -> None:
    out, gradient = (_apart(*both) for both in zip(actual, reference, strict=True))
    report.check(f"{name}: both branches against fp64, relative", out, at_most=_NET[precision])
    report.check(f"{name}: gradient against fp64, relative", gradient, at_most=_NET_BACK[precision])


class _Whole(sampling.BlockMap):
    """A block's map without anything kept: every call is a pass over all clean blocks, as in training."""

    def _answer(
        self, scaled: Tensor, times: tuple[Tensor, Tensor | None], label: Tensor, labelled: bool = True, **told: Tensor
    ) -> Tensor:
        rows, known = scaled.shape[2], self.known.shape[2]
        missing = rows * BLOCKS - known
        clean = torch.cat(
            [self.known, self.known.new_zeros(*self.known.shape[:2], missing, self.known.shape[3])], dim=2
        )
        x = scaled.new_zeros(clean.shape)
        x[:, :, known : known + rows] = scaled
        of_blocks = [None if u is None else u[:, None].expand(-1, BLOCKS) for u in times]
        given = self.context(Given(clean, torch.zeros(1, dtype=torch.float64, device=x.device)))
        out: Tensor = self.model(x, *of_blocks, label, context=given)
        return out[:, :, known : known + rows]


def _drawn(net: DiT, start: Tensor, label: Tensor, whole: bool, precision: str) -> Tensor:
    """Samples (N, C, H, W) in two steps a block."""
    flow_map = FlowMap(net, OTFlowMatching(), null_label=net.null_label)
    grids = [torch.linspace(1.0, 0.0, 3, dtype=torch.float64)] * BLOCKS
    kind = _Whole if whole else sampling.BlockMap
    # The map's own arithmetic uncompiled: its compilation would be most of this section.
    with computing(precision, start.device), fusion.override(False), patch.object(sampling, "BlockMap", kind):
        return sampling.sample(flow_map, pushforward, start, grids, label, NO_GUIDANCE)


def _start(config: DiTConfig, samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (samples, config.channels, config.height, config.image_width)
    start = problem.SIGMA_DATA * torch.randn(shape, generator=generator, dtype=torch.float64)
    return start.to(device), (torch.arange(samples) % config.num_classes).to(device)


def prove_sampling(context: Context, report: Report) -> None:
    """Kept blocks in fp32 against none kept in fp32, and against none kept in fp64 on the CPU."""
    net, cpu = _small_net(context), torch.device("cpu")
    start, label = _start(net.config, 4, cpu)
    exact = _drawn(copy.deepcopy(net).double(), start, label, True, "fp32")
    there = net.to(context.device), start.to(context.device), label.to(context.device)
    # Less where they started: the way they went is made of the net's answers alone.
    kept, none = (_drawn(*there, whole, "fp32").cpu() - start for whole in (False, True))
    report.check("way of samples, kept blocks against none, fp32, relative", _apart(kept, none), at_most=_SAME)
    report.check("way of samples, kept blocks against fp64, relative", _apart(kept, exact - start), at_most=_SAME)


# ---------------------------------------------------------------------------------------------------------------------
# What they cost


def _measure_attention(context: Context, report: Report) -> None:
    """A branch's attention, forward and backward, in bf16: under each mask, and to as many tokens under none."""
    for tokens in (16,) if context.small else _TOKENS:
        _measure_attention_of(context, report, tokens)


def _measure_attention_of(context: Context, report: Report, tokens: int) -> None:
    samples, heads, dtype = (2, 2, torch.float32) if context.small else (64 * 256 // tokens, _HEADS, torch.bfloat16)
    counts = tokens, 2 * tokens, 2 * tokens, tokens
    q, k, v, way = (torch.randn(samples, n, heads, _HEAD_SIZE, dtype=dtype, device=context.device) for n in counts)
    masks: dict[str, streams.Mask] = {"no mask": None}
    masks["dense masks"] = _masks(BLOCKS, tokens // BLOCKS, context.device, False).branch
    if streams.takes_block_masks(context.device):
        masks["masks that skip"] = _masks(BLOCKS, tokens // BLOCKS, context.device, True).branch
    actions = [lambda mask=mask: _attended(q, k, v, way, mask) for mask in masks.values()]
    seconds = Stopwatch(context, rounds=5, warm_ups=2).medians(*actions, times=5)
    name = f"attention at head size {_HEAD_SIZE}, {samples} x {tokens} tokens of a branch"
    for kind, value in zip(masks, seconds, strict=True):
        report.figure(f"{name}, {kind}: forward and backward", 1e3 * value, "ms")
    if "masks that skip" in masks:
        report.figure(f"{name}: masks that skip over dense ones", seconds[2] / seconds[1])


def _measure_pair(context: Context, report: Report) -> None:
    """Two branches of XL beside a clean stream and the way back, uncompiled; time and memory under both masks."""
    case = _large(context, 4 if context.small else 16)
    with _dense():
        (dense,) = Stopwatch(context, rounds=3, warm_ups=1).medians(lambda: _step(case))
    name = f"{_LARGEST} in {BLOCKS} blocks, {len(case.x)} samples"
    report.figure(f"{name}: a pair of passes and back, dense masks", 1e3 * dense, "ms")
    skips = streams.takes_block_masks(context.device)
    if skips:
        (seconds,) = Stopwatch(context, rounds=3, warm_ups=1).medians(lambda: _step(case))
        report.figure(f"{name}: a pair of passes and back, masks that skip", 1e3 * seconds, "ms")
        report.figure(f"{name}: masks that skip over dense ones", seconds / dense)
    if context.device.type != "cuda":
        report.skip(f"{name}: memory", "only a GPU counts what its allocator hands out")
        return
    with _dense():
        report.figure(f"{name}: memory of a step, dense masks", _memory(case) / 2**30, "GiB")
    if skips:
        report.figure(f"{name}: memory of a step, masks that skip", _memory(case) / 2**30, "GiB")


def _large(context: Context, samples: int) -> _Pair:
    config = replace(net_config(context, _LARGEST), blocks=BLOCKS)
    return _Pair(make_net(config, context.device), samples).on(context.device, torch.float32)


def _step(case: _Pair) -> None:
    case.net.zero_grad(set_to_none=True)
    case.passes("bf16")[0].float().sum().backward()


def _memory(case: _Pair) -> int:
    case.net.zero_grad(set_to_none=True)
    return extra_memory(lambda: _step(case), case.x.device)


def _measure_compiled(context: Context, report: Report) -> None:
    missing = abilities.lacks_compiler(context)
    if missing:
        report.skip("a pair of passes, compiled", missing)
        return
    case = _large(context, 4 if context.small else 16)
    case.net.compile_blocks()
    (seconds,) = Stopwatch(context, rounds=3, warm_ups=2).medians(lambda: _step(case))
    name = f"{_LARGEST} in {BLOCKS} blocks, {len(case.x)} samples"
    report.figure(f"{name}: a pair of passes and back, compiled", 1e3 * seconds, "ms")


def _measure_sampling(context: Context, report: Report) -> None:
    """In bf16, two steps a block: with kept blocks, and by passes over all blocks."""
    config = replace(net_config(context, _LARGEST), blocks=BLOCKS)
    net = make_net(config, context.device).eval().requires_grad_(False)
    start, label = _start(config, 4 if context.small else 64, context.device)
    watch = Stopwatch(context, rounds=2, warm_ups=1)
    kept, none = watch.medians(
        *(lambda whole=whole: _drawn(net, start, label, whole, "bf16") for whole in (False, True))
    )
    name = f"{_LARGEST} in {BLOCKS} blocks of 2 steps, {len(start)} samples"
    report.figure(f"{name}: kept blocks, bf16", len(start) / kept, "images/s")
    report.figure(f"{name}: none kept, in the time of kept blocks", none / kept)
