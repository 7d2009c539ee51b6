"""Which samples, and how each is drawn: the same bits whatever the batch size, the number of ranks, or a restart."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from imm_scale import build, precision, rng
from imm_scale.build import ModelSpec
from imm_scale.config.schema import SamplingConfig
from imm_scale.errors import UserError
from imm_scale.methods.base import Steps
from imm_scale.methods.samplers import SAMPLES_PER_CALL, Guidance
from imm_scale.models.base import Backbone
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World
from imm_scale.sampling import blocks, prompts
from imm_scale.sampling.blocks import Prefix
from imm_scale.sampling.prompts import KnownTokens

ALONE = World()
STARTING_NOISE = "sample"  # purpose of the draws that sampling starts from


@dataclass(frozen=True)
class SamplingPlan:
    """Everything that decides the samples, and how many are held at once.

    Attributes:
        steps: steps of the sampler.
        grid: kind of time grid, or the times themselves.
        labels: image i has label labels[i mod n].
        guidance_interval: (low, high] of t in which guidance is in force.
        batch_size: samples held at once, rounded up to whole calls of the net; decides none of their bits.
        compile: whether the net's blocks are compiled.
        tells_guidance: whether the net is told scale and interval, and evaluated once a step.
        blocks: in which a sample is drawn, one after another.
        block_times: falling times of each, where they have their own.
        given: the first blocks of samples, where they are known.
        known: tokens of samples that are known.
        sampler, order, num, seed, guidance_scale, precision: as in the `sampling` section of the config.
    """

    steps: int
    grid: str = "uniform"
    labels: tuple[int, ...] = (0,)
    num: int = 64
    seed: int = 0
    guidance_scale: float = 1.0
    batch_size: int = 64
    sampler: str = "pushforward"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    precision: str = "fp32"
    compile: bool = False
    tells_guidance: bool = False
    order: str = "random"
    blocks: int = 1
    block_times: tuple[tuple[float, ...], ...] = ()
    given: Prefix | None = None
    known: KnownTokens | None = None

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        if not 0.0 <= low < high <= 1.0:
            raise UserError(f"guidance_interval={(low, high)} is no interval of times within 0 to 1, as in (0.1, 0.8)")

    @property
    def guidance(self) -> Guidance:
        """Scale and interval of the guidance."""
        return Guidance(self.guidance_scale, *self.guidance_interval)

    def guide_forwards(self, times: Tensor, passes: tuple[float, float] | None = None) -> float:
        """Those of `forwards` that guidance adds: of the null label, or of the guide."""
        return self.forwards(times, passes) - replace(self, guidance_scale=1.0).forwards(times, passes)

    def forwards(self, times: Tensor, passes: tuple[float, float] | None = None) -> float:
        """Passes over whole samples that `function_evaluations` amount to, but for 2 %.

        Of several blocks a call is of one, and all but the last pass once more, clean, for each of label and guidance.

        Args:
            passes: what a call and the clean stream of a whole sample are in place of that, as a net has it whose
                branches are apart (`planner.flops.sampling_passes`).
        """
        call, clean = passes or (1.0 / self.blocks, 1.0 - 1.0 / self.blocks)
        calls = self.function_evaluations(times)
        guided = calls > replace(self, guidance_scale=1.0).function_evaluations(times)
        return calls * call + clean * (1 + guided)

    def function_evaluations(self, times: Tensor) -> int:
        """Calls of the network, and its guide, one after another per image, along (steps + 1,) times in every block."""
        of_blocks = blocks.grids(self.block_times) or [times] * self.blocks
        return sum(map(self._calls, of_blocks[self.blocks - self.sequence_passes :]))

    @property
    def sequence_passes(self) -> int:
        """Blocks that are drawn, one after another."""
        return self.blocks - (0 if self.given is None else self.given.blocks)

    def _calls(self, times: Tensor) -> int:
        calls = [1 if self.tells_guidance or self.guidance.at(t) == 1.0 else 2 for t in times[:-1]]
        return sum(calls) + (sum(calls[1:]) if self.sampler == "heun" else 0)

    @property
    def batches(self) -> list[tuple[int, int]]:
        """(first, last + 1) of each batch: batch_size rounded up to whole calls of the net."""
        size = -(-self.batch_size // SAMPLES_PER_CALL) * SAMPLES_PER_CALL
        return [(start, min(start + size, self.num)) for start in range(0, self.num, size)]

    def label(self, index: Tensor) -> Tensor:
        """(n,) labels of the samples of these (n,) numbers."""
        return torch.tensor(self.labels)[index % len(self.labels)]


def times_of(spec: ModelSpec, plan: SamplingPlan) -> Tensor:
    """The plan's time grid for this model, (steps + 1,) fp64, falling."""
    return build.method(spec).grid(plan.grid, plan.steps, spec.space)


def plan_of(config: SamplingConfig, spec: ModelSpec, steps: int, num: int, seed: int) -> SamplingPlan:
    """The `sampling` section of a config, resolved for a model and a step count.

    Given class counts fix the number of samples, whatever `num` says. Raises UserError for bad labels, and for jumps
    and guidance that the model never learned.
    """
    labels, method = parse_labels(config.labels, spec.space.num_classes), build.method(spec)
    sampler = method.config.sampler_named(config.sampler)
    method.config.check_sampler(sampler, [steps])
    method.config.check_guidance(config.guidance_scale, config.guidance_interval)
    known = prompts.known_tokens(config, spec)
    return SamplingPlan(
        steps=steps,
        grid=method.default_grid(steps) if config.grid == "auto" else config.grid,
        labels=labels,
        num=len(labels) if has_counts(config.labels) else num,
        seed=seed,
        guidance_scale=config.guidance_scale,
        batch_size=config.batch_size,
        sampler=sampler,
        order=config.order,
        guidance_interval=(config.guidance_interval[0], config.guidance_interval[1]),
        precision=config.precision,
        compile=config.compile,
        tells_guidance=method.config.tells_guidance,
        blocks=spec.net.sequence_blocks,
        block_times=blocks.times(config, spec, method, steps),
        given=None if known is not None else blocks.prefix(config, spec),
        known=known,
    )


def check_machine(config: SamplingConfig) -> None:
    """Raises UserError for a precision, or compilation, that this machine is not up to."""
    precision.check(config.precision, "sampling.precision")
    if config.compile:
        precision.check_compiler("sampling.compile")


def has_counts(labels: str) -> bool:
    """Whether labels say how many samples each class gets, as in 0:500,3-4:100."""
    return ":" in str(labels)


def parse_labels(text: str, num_classes: int) -> tuple[int, ...]:
    """Labels of the samples, in turn.

    Args:
        text: "all", "0-9" or "3,7,1-2": classes that take turns, so their counts differ by one at most; or
            "0:500,3-4:100": so many samples of each class, class after class.

    Raises:
        UserError: anything else, or a class outside the table.
    """
    if text == "all":
        return tuple(range(num_classes))
    labels: list[int] = []
    counted = has_counts(text)
    for part in str(text).split(","):
        classes, colon, count = part.strip().partition(":")
        first, dash, last = classes.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or bool(colon) != counted:
            raise UserError(f"labels={text!r}: give all, a range (0-9), a list (3,7), or counts (0:500,3-4:100)")
        if counted and not count.isdecimal():
            raise UserError(f"labels={text!r}: {count!r} is no count of samples, as in 0:500,3-4:100")
        labels += [label for label in range(int(first), int(last or first) + 1) for _ in range(int(count or 1))]
    outside = sorted({label for label in labels if label >= num_classes})
    if outside or not labels:
        raise UserError(f"labels={text!r}: the model knows classes 0 to {num_classes - 1}, not {outside or 'none'}")
    return tuple(labels)


class Drawer:
    """Draws ranges of a plan's samples.

    Raises:
        UserError: a grid or a sampler that does not fit, or guidance with a net trained without label drop.
    """

    def __init__(self, net: Any, spec: ModelSpec, plan: SamplingPlan):
        guide = getattr(net, "guide", None)
        if plan.guidance_scale != 1.0 and net.null_label is None and guide is None:
            raise UserError(
                f"guidance_scale={plan.guidance_scale} needs a net trained with method.label_drop above 0, or a guide "
                "(sampling.guide); use 1"
            )
        self.plan = plan
        self.times = times_of(spec, plan)
        build.method(spec).check(net, plan.sampler, self.times)
        self._net, self._space, self._method = net, spec.space, build.method(spec)
        self._device = next(net.parameters()).device
        for backbone in (net.model, *([guide.model] if guide is not None else [])):
            _set_compiled(backbone, plan.compile)

    def draw(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Samples [start, stop); start is a multiple of SAMPLES_PER_CALL.

        Returns:
            (index, label, z): (n,) and (n,) int64 and (n, C, H, W) fp64 normalized latents, all on CPU.

        Raises:
            UserError: a sample that is not finite.
        """
        assert start % SAMPLES_PER_CALL == 0, start
        calls = [self._call(first) for first in range(start, stop, SAMPLES_PER_CALL)]
        index, z = torch.arange(start, stop), torch.cat(calls)[: stop - start]
        label = self.plan.label(index)
        finite = torch.isfinite(z.float()).flatten(1).all(dim=1)  # fp32 is what decoders and outputs take
        if not finite.all():
            bad = int(index[~finite][0])
            raise UserError(
                f"sample {bad} (class {int(label[bad - start])}, seed {self.plan.seed}, {self.plan.steps} steps) is "
                "not finite: the weights have diverged, or guidance is too strong; try an earlier checkpoint"
                + (", or sampling.precision=bf16, which has the range of fp32" if self.plan.precision == "fp16" else "")
            )
        return index, label, z

    def _call(self, first: int) -> Tensor:
        index = torch.arange(first, first + SAMPLES_PER_CALL)
        label, there = self.plan.label(index).to(self._device), index.to(self._device)
        start = self._space.prior(self.plan.seed, STARTING_NOISE, there)
        start = start.double() if start.is_floating_point() else start
        if self.plan.known is not None:
            start = self.plan.known.put(start, index)
        steps = Steps(
            self.times,
            self.plan.sampler,
            self.plan.guidance,
            partial(self._fresh_noise, there),
            lambda stream, count: rng.uniform(self.plan.seed, "tokens", there, count, stream),
            self.plan.order,
            blocks.grids(self.plan.block_times),
            None if self.plan.given is None else self.plan.given.of(index, self.plan.blocks).to(self._device),
        )
        # Around the net in fp64 there are no matrix products, and autocast leaves its conditioning in fp32.
        with precision.computing(self.plan.precision, self._device), torch.no_grad():
            z = self._method.sample(self._net, start, label, steps)
        return z.cpu()

    def _fresh_noise(self, index: Tensor, step: int) -> Tensor:
        """As much a function of seed, index and step alone as what sampling starts from."""
        return self._space.prior(self.plan.seed, "restart", index, stream=step).double()


def _set_compiled(net: Backbone, enabled: bool) -> None:
    """Compiles a net's blocks, or takes that back, so that a plan's samples do not depend on the plan before."""
    compiled = [module for module in net.modules() if module._compiled_call_impl is not None]
    if not enabled:
        for module in compiled:
            module._compiled_call_impl = None
    elif not compiled:
        net.compile_blocks()


def sample(
    net: Any, spec: ModelSpec, plan: SamplingPlan, world: World = ALONE, progress: str | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's share of the samples, batch by batch; batches go to ranks in turn.

    Yields:
        (index, label, z) as `Drawer.draw` returns them: (n,), (n,) and (n, C, H, W).

    Raises:
        UserError: as `Drawer` does.
    """
    drawer = Drawer(net, spec, plan)
    hidden = None if progress is not None and world.is_main else True  # None: shown on a terminal only
    batches = plan.batches[world.rank :: world.size]
    with tqdm(total=sum(b - a for a, b in batches), desc=progress, unit="image", disable=hidden, leave=False) as bar:
        for start, stop in batches:
            yield drawer.draw(start, stop)
            bar.update(stop - start)


def collect(net: Any, spec: ModelSpec, plan: SamplingPlan, world: World, progress: str | None = None) -> Tensor:
    """All samples in order, (num, C, H, W) fp32 latents, on every rank."""
    out = torch.zeros(plan.num, *spec.space.shape)
    for index, _, z in sample(net, spec, plan, world, progress):
        out[index] = z.float()
    return distributed.all_sum(out)
