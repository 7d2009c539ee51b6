"""Masked diffusion: tokens are revealed step by step, each step drawn by the head from what is visible.

Trained at any number of visible tokens (Shi et al., arXiv 2406.04329; Sahoo et al., arXiv 2406.07524), or for the steps
of a sampler, whose steps then are what the head learns to draw jointly. In random order a step might draw any of the
masked tokens: the net's pass serves several sets of its size, each of which the head scores on its own.

Legend: N samples, T tokens, L steps of a sampler.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from imm_scale import rng
from imm_scale.choices import MethodConfig, option
from imm_scale.data.batch import Batch
from imm_scale.data.spaces import SampleSpace
from imm_scale.errors import UserError
from imm_scale.methods.base import GroupLosses, Method, Steps
from imm_scale.methods.tokens import masking, token_net
from imm_scale.methods.tokens.token_net import TokenNet
from imm_scale.methods.tokens.unmask import unmask
from imm_scale.models.base import Backbone
from imm_scale.registry import register_method


@dataclass(frozen=True)
class TokenMethodConfig(MethodConfig):
    """What the methods for tokens share."""

    def check_guidance(self, scale: float, interval: Any) -> None:
        if scale != 1.0:
            raise UserError(
                f"guidance_scale={scale} is for flow maps: samples of method.name={self.name} have none; use 1"
            )


@dataclass(frozen=True)
class MaskedConfig(TokenMethodConfig):
    SAMPLERS: ClassVar[tuple[str, ...]] = ("unmask",)

    name: str = option("masked", "")
    steps: list[int] = option(  # noqa: RUF009 - copied for each instance
        [],
        "Step counts of the sampler to train for, one drawn for each sample; [] trains at any number of visible "
        "tokens, which a head that draws tokens independently needs no other for.",
        range="[1, inf)",
    )
    grid: Literal["uniform", "cosine"] = option("uniform", "Sizes of these steps, as in sampling.grid.")
    order: Literal["random", "left_to_right"] = option("random", "Order in which tokens are revealed.")


class Draws(NamedTuple):
    """A micro-batch as the net meets it.

    Attributes:
        masked: (N, T) tokens, masked where they are not visible.
        sets: (N, T) int64 from 1, the set that the head scores each token in; 0: in none.
        weight: (N,) fp64 of the sum of each sample's negative log-probabilities of sets.
        t: (N,) fp64 share of masked tokens.
    """

    masked: Tensor
    sets: Tensor
    weight: Tensor
    t: Tensor


@register_method("masked")
class MaskedDiffusion(Method):
    """A bound of the likelihood that is exact for the sampler it is trained for, each sample a group of its own."""

    Config = MaskedConfig

    def wrap(self, backbone: Backbone, space: SampleSpace) -> TokenNet:
        net = token_net.wrap(backbone, space, self.config.name, causal=False)
        if not net.model.head.independent and not self.config.steps:
            raise UserError(
                f"model.head.kind={net.model.config.head.kind} draws a step's tokens jointly, so it is trained for "
                "steps: set method.steps, as in method.steps=[1,2,4,8]"
            )
        for steps in self.config.steps:
            masking.visible_counts(self.config.grid, steps, net.length)
        return net

    def grid(self, kind: str, steps: int, space: SampleSpace) -> Tensor:
        """1 - n / T, n visible tokens before each step and after the last."""
        length = space.shape[0]
        return 1.0 - masking.visible_counts(kind, steps, length).double() / length

    def sample(self, net: TokenNet, start: Tensor, condition: Tensor, steps: Steps) -> Tensor:
        return unmask(net, start, condition, steps)

    def loss(self, net: TokenNet, batch: Batch, seed: int) -> GroupLosses:
        draws = self.draw(net, batch, seed)
        key = rng.random_bits(seed, "dropout", batch.ordinal) if net.model.has_dropout else None
        taught = rng.uniform(seed, "head", batch.ordinal, net.length) if net.model.head.takes_uniforms else None
        out = net.model(draws.masked, batch.condition, batch.x, draws.sets, key, taught)
        return GroupLosses(draws.weight * out.nll, draws.t, out.monitors)

    def draw(self, net: TokenNet, batch: Batch, seed: int) -> Draws:
        """All that is random about a micro-batch: ids (N, T) of its samples, labels and ordinals (N,)."""
        rank = self.ranks(batch.ordinal, net.length, seed)
        counts = self._counts_any if not self.config.steps else self._counts_of_steps
        first, last, weight = counts(batch.ordinal, net.length, seed)
        visible = rank < first[:, None]
        size, share, number = self._sets(net, first, last)
        sets = (rank - first[:, None]) // size[:, None] + 1
        sets = sets.masked_fill(visible | (sets > number[:, None]), 0)
        masked = torch.where(visible, batch.x, net.mask)
        return Draws(masked, sets, weight * share / number, 1.0 - first.double() / net.length)

    def _sets(self, net: TokenNet, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N,) each: tokens of a set, sets that a step draws, and sets that are scored.

        In random order the masked tokens are exchangeable, and disjoint sets of them have the same mean as the one the
        step draws, with less variance. What is drawn independently is scored token by token.
        """
        step = last - first
        size = torch.ones_like(step) if net.model.head.independent else step
        if self.config.order == "random" or not self.config.steps:
            return size, step // size, (net.length - first) // size
        return size, step // size, step // size

    def ranks(self, ordinal: Tensor, length: int, seed: int) -> Tensor:
        """(N, T): the place of each token in the order in which they are revealed."""
        if self.config.order == "left_to_right":
            return torch.arange(length, device=ordinal.device).expand(len(ordinal), length)
        return masking.ranks(rng.uniform(seed, "mask", ordinal, length))

    def _counts_any(self, ordinal: Tensor, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """(n, n + 1, T) (N,): n spread evenly over the samples of a step, and over steps by chance."""
        step, position = ordinal // self.batch_size, ordinal % self.batch_size
        shift = rng.uniform(seed, "times", step)[:, 0]
        n = (length * ((shift + position / self.batch_size) % 1.0)).long().clamp_max(length - 1)
        return n, n + 1, torch.full_like(shift, length)

    def _counts_of_steps(self, ordinal: Tensor, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """(visible before, visible after, L) (N,) of a step of a sampler, both drawn for each sample."""
        u = rng.uniform(seed, "times", ordinal, 2)
        table, numbers = masking.step_table(self.config.grid, tuple(self.config.steps), length, ordinal.device)
        which = (u[:, 0] * len(numbers)).long()
        steps = numbers[which]
        step = (u[:, 1] * steps).long()
        return table[which, step], table[which, step + 1], steps.double()
