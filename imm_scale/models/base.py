"""What is asked of a backbone: its architecture, its blocks, and both branches of IMM in one call."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from imm_scale import rng
from imm_scale.choices import BackboneConfig


@dataclass(frozen=True)
class Architecture(ABC):
    """All that shapes a net, plain enough for JSON; it travels inside exported weights.

    Attributes:
        MAY_DIFFER: fields in which a net may differ from the one whose weights it starts from: they change nothing that
            weights compute, or `Backbone.adapted` sees to them.
        OF_THE_DATA: fields that samples decide, and no key of the `model` section.
    """

    MAY_DIFFER: ClassVar[frozenset[str]] = frozenset()
    OF_THE_DATA: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def build(self) -> "Backbone":
        """The net, freshly initialized by torch's generator."""

    @abstractmethod
    def example(self, samples: int) -> tuple[Any, ...]:
        """Arguments of one forward pass, each sample a group of its own, on torch's default device."""

    @property
    def sequence_blocks(self) -> int:
        """J, blocks of a sample that are drawn one after another; above 1 the net is a `BlockCausal`."""
        return 1

    @property
    def branches_apart(self) -> bool:
        """Branches are a small net on states of the clean stream, which alone goes through the blocks."""
        return False

    @property
    def at_once(self) -> "Architecture":
        """The same net for samples that are drawn at once."""
        return self

    @property
    def kept_elements(self) -> int:
        """Elements of keys and values that sampling holds at most of a sample; 0 of nets that draw it at once."""
        return 0

    @property
    def hidden(self) -> tuple[int, int]:
        """Multiply-adds of attention that masks hide, in a pass of the clean stream and of a branch."""
        return 0, 0


class Context(NamedTuple):
    """The clean stream that the blocks of a sample are given.

    Attributes:
        x: (N, ...) samples, or their blocks that are known, as the net takes them.
        c_noise, second: (G,) their times, as the net is told times.
    """

    x: Tensor
    c_noise: Tensor
    second: Tensor | None


class Backbone(nn.Module):
    """A network G. Its class has two more names, which a registered one must have:

        Architecture: the class of its architecture, a frozen dataclass.
        architecture(config, space, second_time): classmethod, the Architecture that the `model` section means for a
            sample space and for a method that does, or does not, tell the net a second time. Raises UserError where
            the net does not fit the space.

    Attributes:
        CAN_TAKE_GUIDANCE: `architecture` has a keyword `guidance` that makes a net with `takes_guidance`.
        takes_guidance: its passes want one more keyword, `guidance` (G, 3) fp64: 1 - 1/W of the scale W, and the first
            and last time of its interval.
        blocks: the units of activation checkpointing, compilation and ZeRO-3 gathering, of one size each.
        activation_checkpointing: recompute each block in the backward pass.
        has_dropout: takes keys of dropout masks.
        null_label: the label that stands for "no condition", or None for a net that has none.
        sequence_blocks: J, blocks of a sample that are drawn one after another. Above 1 the net is a `BlockCausal`, its
            passes want one more keyword, `context`, and times are (G, J).
        branches_apart: as in its architecture. Branches may have several times the samples of the context then.

    `forward(x_NCHW, c_noise_G, second_G, label_N, dropout_key_N)` returns G of the shape of x; c_noise and second
    are per group (N is a multiple of G) and second is None where the second time is switched off.
    """

    Config: ClassVar[type[BackboneConfig]]
    Architecture: ClassVar[type]
    CAN_TAKE_GUIDANCE: ClassVar[bool] = False
    takes_guidance: bool = False
    blocks: nn.ModuleList
    activation_checkpointing: bool = False
    null_label: int | None = None
    has_dropout: bool = False
    sequence_blocks: int = 1
    branches_apart: bool = False

    def compile_blocks(self) -> None:
        """Compiles each block on its own: one graph serves them all, and nothing around them breaks it."""
        for block in self.blocks:
            block.compile()

    def dropout_keys(self, dropout_key: Tensor | None) -> list[Tensor | None]:
        """A key for each block, of the samples' (N,); None where nothing is dropped.

        Mixed outside the blocks: a number read inside would cost the compiler a graph a block.
        """
        if dropout_key is None or not self.training or not self.has_dropout:
            return [None] * len(self.blocks)
        return [rng.random_bits(0, "dropout_layer", dropout_key, stream=index) for index in range(len(self.blocks))]

    @property
    def recomputes(self) -> bool:
        """Whether blocks called now run again in the backward pass."""
        return self.activation_checkpointing and torch.is_grad_enabled()

    def run_block(self, block: nn.Module, *args: Any) -> Any:
        """Calls a block, to be run again in the backward pass where `activation_checkpointing` asks for that."""
        if self.recomputes:
            # Nothing in a block draws from torch's generators, so there is no state to keep for the second time.
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        return block(*args)

    def adapted(
        self, weights: dict[str, Tensor], source: Any, classes: Sequence[int | None], null_is_trained: bool
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Weights of a net of this class as this one takes them, and a sentence on each thing that is new in it.

        Neither the weights nor this net are changed. What still does not fit by name or shape is refused by the caller.

        Args:
            source: the architecture the weights are of.
            classes: for each class here, its number there, None for a new one.
            null_is_trained: whether the row for "no label" is, or was never learned.
        """
        return weights, []

    def pair(
        self,
        x_t: Tensor,
        x_r: Tensor,
        c_noise_t: Tensor,
        c_noise_r: Tensor,
        second_t: Tensor | None,
        second_r: Tensor | None,
        label: Tensor,
        dropout_key: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Two branches, the second without gradient. A sharded net overrides this to gather weights once.

        The second may be of the first samples only, n of N, and so c_noise_r and second_r of their groups.
        """
        n = len(x_r)
        told_r = _told(guidance, len(c_noise_r))
        with torch.no_grad():
            key_r = None if dropout_key is None else dropout_key[:n]
            out_r = self(x_r, c_noise_r, second_r, label[:n], key_r, **told_r)
        return self(x_t, c_noise_t, second_t, label, dropout_key, **_told(guidance)), out_r

    def with_tangent(
        self,
        x: Tensor,
        dx: Tensor,
        c_noise: Tensor,
        dc_noise: Tensor,
        second: Tensor | None,
        dsecond: Tensor | None,
        label: Tensor,
        dropout_key: Tensor | None = None,
        guidance: Tensor | None = None,
        live: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """G and its derivative along a tangent of x, c_noise and second, both of the shape of x; guidance is held.

        This one is forward-mode differentiation under the one attention that has it. It costs three forward passes
        beside that of G, and works neither at ZeRO stage 3 nor where blocks are compiled or recomputed: a net that is
        to be trained so overrides it.

        Args:
            dx, dc_noise, dsecond: the tangent, of the first samples of x and groups of c_noise and second: as many as
                dx has samples.
            live: let the derivative carry a gradient too.
        """
        n, g = len(dx), len(dc_noise)
        key = None if dropout_key is None else dropout_key[:n]
        with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(live and torch.is_grad_enabled()), dual_level():
            duals = (
                make_dual(x[:n], dx),
                make_dual(c_noise[:g], dc_noise),
                None if second is None else make_dual(second[:g], dsecond),
            )
            derivative = unpack_dual(self(*duals, label[:n], key, **_told(guidance, g))).tangent
        return self(x, c_noise, second, label, dropout_key, **_told(guidance)), derivative


def _told(guidance: Tensor | None, groups: int | None = None) -> dict[str, Tensor]:
    """The keyword of nets that take guidance, for so many groups, or all; none for the others."""
    return {} if guidance is None else {"guidance": guidance[:groups]}
