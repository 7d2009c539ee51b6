"""What a method is, and what those have in common that train a flow map.

Legend: N samples, G groups of M particles, N = G M. `ordinal` is a sample's global ordinal on the clock, its group
ordinal // M; every draw follows from (seed, purpose, ordinal) and so from nothing a rank or a micro-batch decides.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from imm_scale import rng
from imm_scale.choices import MethodConfig, Passes, option
from imm_scale.data.batch import Batch
from imm_scale.data.spaces import SampleSpace
from imm_scale.errors import UserError
from imm_scale.methods import probability_path, samplers
from imm_scale.methods.flow_map import FlowMap, FlowMapConfig, Given
from imm_scale.methods.in_blocks import draws as block_draws
from imm_scale.methods.in_blocks import sampling as block_sampling
from imm_scale.methods.samplers import NO_GUIDANCE, SAMPLERS, Guidance
from imm_scale.methods.time_grids import time_grid
from imm_scale.models.base import Backbone


@dataclass(frozen=True)
class FlowMapMethodConfig(MethodConfig):
    """What the methods share that train a flow map."""

    DEFAULT_T_MAX: ClassVar[dict[str, float]] = {"ot_fm": 1.0, "vp_cosine": 1.0}

    flow_map: FlowMapConfig = field(default_factory=FlowMapConfig)
    t_min: float = option(0.0, "Smallest time: 0 on latents, 0.006 on pixels.", range="[0, 1)")
    t_max: float | None = option(
        None, "Largest time; null: 0.994 on ot_fm and 0.996 on vp_cosine for imm, else 1.", range="(0, 1]"
    )
    label_drop: float = option(
        0.1, "Share of samples trained without their label; guidance needs it above 0.", range="[0, 1)"
    )
    context_noise: float = option(
        0.0,
        "model.blocks above 1: the blocks given to others are diffused to a time of up to this, which the net is told.",
        range="[0, 1)",
    )

    @property
    def has_second_time(self) -> bool:
        return self.flow_map.second_time != "none"

    @property
    def jumps_to_data_only(self) -> bool:
        """Whether s = t_min in all that is learned, as by a consistency model."""
        return False

    @property
    def why_not_blocks(self) -> str:
        """What keeps this loss from samples of several blocks (`model.blocks`), "" where nothing does."""
        return "its loss is of whole samples"

    def check_sampler(self, sampler: str, steps: Sequence[int]) -> None:
        if self.jumps_to_data_only and sampler != "restart" and max(steps, default=1) > 1:
            raise UserError(
                f"sampling.sampler={sampler} in {max(steps)} steps lands between noise and data, where a net trained "
                f"by method.name={self.name} with s = {self.t_min:g} alone was never sent: use "
                "sampling.sampler=restart, or one step"
            )

    def resolved(self, precision: str) -> Self:
        t_max = self.DEFAULT_T_MAX[self.flow_map.trajectory] if self.t_max is None else self.t_max
        return replace(self, t_max=t_max)

    def unlike(self, source: MethodConfig) -> dict[str, tuple[Any, Any]]:
        """As in the base; what a net is newly told, a second time or guidance, starts by an embedder that answers 0."""
        if not isinstance(source, FlowMapMethodConfig):
            return super().unlike(source)
        there, here = asdict(source.flow_map), asdict(self.flow_map)
        if there["second_time"] == "none":
            there["second_time"] = here["second_time"]
        found = {f"flow_map.{key}": (there[key], here[key]) for key in here if there[key] != here[key]}
        if source.tells_guidance and not self.tells_guidance and source.name != self.name:
            found["name"] = (source.name, self.name)
        return found

    def validate(self) -> None:
        self.flow_map.validate()
        t_max = 1.0 if self.t_max is None else self.t_max
        if not 0.0 <= self.t_min < t_max <= 1.0:
            raise UserError(f"times must satisfy 0 <= method.t_min={self.t_min} < method.t_max={t_max} <= 1")
        last = self.DEFAULT_T_MAX[self.flow_map.trajectory] if self.t_max is None else self.t_max
        if last == 1.0 and self.flow_map.parameterization == "epsilon":
            raise UserError(
                "method.t_max=1 is noise alone, from which parameterization=epsilon knows no data: use "
                "method.t_max=0.994 on ot_fm, 0.996 on vp_cosine"
            )


class GroupLosses(NamedTuple):
    """Of one micro-batch.

    Attributes:
        loss_G: carries the gradient.
        t_G: where on the trajectory each group was.
        monitors: further quantities per group (G,), detached, whose means are logged; with "gap", t - s, among them
            those of the others by thirds of t and of t - s.
    """

    loss_G: Tensor
    t_G: Tensor
    monitors: Mapping[str, Tensor] = MappingProxyType({})


def concatenated(parts: Sequence[GroupLosses]) -> GroupLosses:
    """Of several micro-batches, detached, one."""
    monitors = {name: torch.cat([part.monitors[name] for part in parts]) for name in parts[0].monitors}
    return GroupLosses(torch.cat([p.loss_G for p in parts]), torch.cat([p.t_G for p in parts]), monitors)


class Steps(NamedTuple):
    """How samples are to be drawn.

    Attributes:
        times: decreasing times (steps + 1,) fp64, or whatever `Method.grid` gave.
        sampler: name of the sampler, as in `sampling.sampler`.
        guidance: scale and interval of classifier-free guidance.
        fresh_noise: samples of the prior for the i-th step of samplers that add some.
        uniform: uniform(stream, count), fp64 uniforms (N, count) of samplers that draw tokens, a stream for each call.
        order: in which order tokens are drawn, as in `sampling.order`.
        block_times: `times` of each block of a sample, where they have their own.
        given: the first blocks of the samples, (N, C, rows, W), where they are known.
    """

    times: Tensor
    sampler: str = "pushforward"
    guidance: Guidance = NO_GUIDANCE
    fresh_noise: Callable[[int], Tensor] | None = None
    uniform: Callable[[int, int], Tensor] | None = None
    order: str = "random"
    block_times: Sequence[Tensor] = ()
    given: Tensor | None = None


class Method(ABC):
    """How to sample, and what to minimize so that this sampler is right. Built from its own Config, as it is resolved.

    A method knows tensors: no other section of a config, no ranks. `net` is what its `wrap` gave.

    Attributes:
        group_size: samples that must stay together on one rank, neighbours in a batch.
        passes: forward passes of a step.
        batch_size: samples of a step over all ranks, for draws that are spread evenly over them; who trains sets it.
        teacher: where `config.teacher_decay` names an average, a net as `wrap` gave it with those weights. Who trains
            the method sets it and keeps its weights up to date.
    """

    Config: ClassVar[type[MethodConfig]]
    batch_size: int = 1
    teacher: Any = None

    def __init__(self, config: Any):
        self.config = config

    @property
    def group_size(self) -> int:
        return self.config.group_size

    @property
    def passes(self) -> Passes:
        return self.config.passes

    @abstractmethod
    def wrap(self, backbone: Backbone, space: SampleSpace) -> nn.Module:
        """The net that is trained and sampled: a module with the backbone as `model`, and `null_label`.

        Raises:
            UserError: a backbone or a space this method cannot use.
        """

    @abstractmethod
    def grid(self, kind: str, steps: int, space: SampleSpace) -> Tensor:
        """Times (steps + 1,) fp64 that a sampler of samples of a space visits; kinds as in `sampling.grid`.

        Raises:
            UserError: an unknown kind, or steps that do not fit.
        """

    def default_grid(self, steps: int) -> str:
        """The kind that `sampling.grid=auto` stands for."""
        return "uniform"

    def check(self, net: Any, sampler: str, times: Tensor) -> None:  # noqa: B027 - most nets take every plan
        """Raises UserError for a sampler or a grid (steps + 1,) that this net, whose weights are not looked at, cannot
        be drawn with."""

    @abstractmethod
    def sample(self, net: Any, start: Tensor, condition: Tensor, steps: Steps) -> Tensor:
        """Samples (N, ...) in the dtype of `start`, (N, ...) of the prior; condition (N,)."""

    @abstractmethod
    def loss(self, net: Any, batch: Batch, seed: int) -> GroupLosses:
        """Losses of whole groups, (G,) fp64, and their times."""

    def group(self, ordinal: Tensor) -> Tensor:
        """(G,) global group numbers.

        Raises:
            UserError: samples that are not whole groups. Ordinals on a GPU are not looked at: that would wait for it.
        """
        size = self.group_size
        if ordinal.shape[0] % size:
            raise UserError(f"{ordinal.shape[0]} samples are not whole groups of {size}")
        group = ordinal.view(-1, size) // size
        readable = ordinal.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and not torch.equal(group, group[:, :1].expand_as(group)):
            split = int(group[(group != group[:, :1]).any(dim=1)][0, 0])
            raise UserError(f"group {split} is not whole on this rank: its {size} particles must be neighbours")
        return group[:, 0]


class FlowMapMethod(Method):
    """What the methods share that train a flow map: how it is sampled, and the draws of every loss."""

    Config: ClassVar[type[FlowMapMethodConfig]]

    def wrap(self, backbone: Backbone, space: SampleSpace) -> FlowMap:
        settings = self.config.flow_map
        sigma_data = getattr(space, "sigma_data", None)
        if sigma_data is None:
            raise UserError(
                f"method.name={self.config.name} trains a flow map from Gaussian noise: it needs a sample space with a "
                f"sigma_data, as data.space.name=latents has; {type(space).__name__} has none"
            )
        self._check_told(backbone)
        block_draws.check(self.config, self.config.why_not_blocks, self.config.context_noise, backbone)
        return FlowMap(
            backbone,
            probability_path.build(settings.trajectory),
            settings.parameterization,
            settings.second_time,
            sigma_data,
            settings.time_scale,
            backbone.null_label if self.config.label_drop > 0 else None,
            settings.time_input,
        )

    def _check_told(self, backbone: Backbone) -> None:
        tells, takes = self.config.tells_guidance, backbone.takes_guidance
        if tells != takes:
            raise UserError(
                f"method.name={self.config.name} {'tells' if tells else 'does not tell'} the net its guidance, which "
                f"this {type(backbone).__name__} {'wants to be told' if takes else 'cannot be told'}: "
                "method.guidance.kind=condition and a net built with guidance=True belong together"
            )

    def grid(self, kind: str, steps: int, space: SampleSpace) -> Tensor:
        interp = probability_path.build(self.config.flow_map.trajectory)
        return time_grid(interp, kind, steps, self.config.t_min, self.config.t_max)

    def check(self, net: FlowMap, sampler: str, times: Tensor) -> None:
        samplers.check(sampler, net)

    def sample(self, net: FlowMap, start: Tensor, condition: Tensor, steps: Steps) -> Tensor:
        sampler = SAMPLERS[steps.sampler]
        if net.blocks == 1:
            return sampler(net, start, steps.times, condition, steps.guidance, steps.fresh_noise)
        grids = steps.block_times or [steps.times] * net.blocks
        more = condition, steps.guidance, steps.fresh_noise, steps.given
        return block_sampling.sample(net, sampler, start, grids, *more)

    def drop_labels(
        self, flow_map: FlowMap, label: Tensor, ordinal: Tensor, seed: int, share: float | None = None
    ) -> Tensor:
        """(N,) labels, `share` of them replaced by the null label, decided per sample, once for all passes.

        The share is `label_drop` where none is given.
        """
        share = self.config.label_drop if share is None else share
        if share == 0.0:
            return label
        assert flow_map.null_label is not None, "label drop needs a null label"
        dropped = rng.uniform(seed, "label_drop", ordinal)[:, 0] < share
        return torch.where(dropped, flow_map.null_label, label)

    def given(self, flow_map: FlowMap, x: Tensor, ordinal: Tensor, seed: int) -> Given | None:
        """What blocks of samples x (N, ...) are given; None for a net that draws samples at once."""
        return block_draws.given(flow_map, x, ordinal, self.group(ordinal), seed, self.config.context_noise)

    @staticmethod
    def dropout_key(flow_map: FlowMap, ordinal: Tensor, seed: int) -> Tensor | None:
        """(N,) keys of the dropout masks, shared by both branches; None for a net without dropout."""
        return rng.random_bits(seed, "dropout", ordinal) if flow_map.model.has_dropout else None


def prior_noise(flow_map: FlowMap, x: Tensor, ordinal: Tensor, seed: int) -> Tensor:
    """eps ~ N(0, sigma_d^2 I) of the shape and dtype of x (N, ...), keyed by sample."""
    return flow_map.sigma_data * rng.normal(seed, "noise", ordinal, tuple(x.shape[1:])).to(x.dtype)


def regression(out: Tensor, residual: Tensor, wt: Tensor) -> Tensor:
    """wt ||e||^2 (N,) fp64, whose gradient is 2 wt e d(out): a regression of `out` (N, ...) on out - e, held still."""
    e = residual.detach().double().flatten(1)
    slope = (e * out.double().flatten(1)).sum(dim=1)
    return wt.detach() * (e.square().sum(dim=1) + 2.0 * (slope - slope.detach()))


def zero_filled(first: Tensor, like: Tensor) -> Tensor:
    """(n, ...) with zeros behind, up to the samples of `like` (N, ...)."""
    return torch.cat([first, torch.zeros_like(like[len(first) :])])
