"""A backbone whose samples are blocks of tokens, each drawn given the blocks before: its passes over streams.

Legend: N samples, G groups, J blocks of b tokens, T = J b, D width.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from imm_scale.models.base import Backbone, Context
from imm_scale.models.streams import Masks, Seen, known_masks, training_masks


class Cache:
    """What a net has seen of the blocks that are known: keys and values of every layer.

    Attributes:
        blocks: how many blocks that are.
        states: what the branch of the next block is given, of a net whose branches are apart from its blocks.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self.states: Tensor | None = None
        self.layers: list[Seen] = []

    def past(self, layer: int) -> Seen | None:
        """Of one layer, None where no block is known."""
        return self.layers[layer] if self.layers else None


# Of one block's code: training's with its last block, the same without gradient for a held-out loss, and sampling's
# with and without clean tokens, kept ones, and kept ones of any number: 10, where torch by itself stops at 8.
_GRAPHS = 24


class BlockCausal(Backbone):
    """What such a net adds to its parts: tokens, conditions, blocks made of `StreamBlock`, and the way back."""

    def compile_blocks(self) -> None:
        """As in the base, with room for the graphs of all the ways a block is called."""
        import torch._dynamo  # takes a second, which nets that are not compiled are spared

        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
        super().compile_blocks()

    @abstractmethod
    def tokens_of(self, x: Tensor, first: int = 0) -> Tensor:
        """(N, tokens, D) of x, a sample or some of its rows, of which `first` tokens come before."""

    @abstractmethod
    def image_of(self, tokens_NTD: Tensor, condition: Tensor) -> Tensor:
        """What the net answers on the tokens of a sample, or of some rows; condition (N, D) or (N, J, D)."""

    @abstractmethod
    def conditions(self, times: list[tuple[Tensor, Tensor | None]], label_N: Tensor) -> list[Tensor]:
        """Of c_noise and second time, each (G,) or (G, J), what every adaLN takes: (N, D) or (N, J, D)."""

    @property
    @abstractmethod
    def block_tokens(self) -> int:
        """b."""

    def forward_in_context(
        self,
        x: Tensor,
        c_noise: Tensor,
        second: Tensor | None,
        label: Tensor,
        context: Context,
        dropout_key: Tensor | None = None,
    ) -> Tensor:
        """G of all blocks of x at once, of the shape of x, each given the clean blocks before; times (G, J)."""
        clean, condition = self.conditions([(context.c_noise, context.second), (c_noise, second)], label)
        branch, _ = self._through(self._beside(context.x, x), clean, condition, dropout_key)
        return self.image_of(branch, condition)

    def pair_in_context(
        self,
        x_t: Tensor,
        x_r: Tensor,
        times_t: tuple[Tensor, Tensor | None],
        times_r: tuple[Tensor, Tensor | None],
        label: Tensor,
        context: Context,
        dropout_key: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Two branches of all samples beside one clean stream, the second branch without gradient.

        As in `DiT.pair` that one goes first through every layer, and each block's weights are gathered once.
        """
        clean, condition, still_condition = self.conditions(
            [(context.c_noise, context.second), times_t, times_r], label
        )
        with torch.no_grad():
            still = self.tokens_of(x_r)
        both = self._beside(context.x, x_t)
        branch, after = self._through(both, clean, condition, dropout_key, still, still_condition)
        assert after is not None
        with torch.no_grad():
            out_r = self.image_of(after, still_condition)
        return self.image_of(branch, condition), out_r

    def _beside(self, clean: Tensor, branch: Tensor) -> Tensor:
        """(N, 2 T, D) tokens of the clean stream and behind them those of a branch, by one call of the embedder."""
        return torch.cat(self.tokens_of(torch.cat([clean, branch])).chunk(2), dim=1)

    def _through(
        self,
        both: Tensor,
        clean: Tensor,
        condition: Tensor,
        dropout_key: Tensor | None,
        still: Tensor | None = None,
        still_condition: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The branch (N, T, D) of both streams (N, 2 T, D), and the one without gradient."""
        size, masks = self.block_tokens, training_masks(self.sequence_blocks, self.block_tokens, both.device)
        for block, key in zip(self.blocks, self.dropout_keys(dropout_key), strict=True):
            given, ends = (both, clean, condition, size, masks, None, key), block is self.blocks[-1]
            if still is None or not self.recomputes:
                both, _, still = self.run_block(block, *given, still, still_condition, ends)
            else:
                both, seen, _ = self.run_block(block, *given, None, None, ends)
                still = self._alone(block, still, still_condition, masks, seen, key)
        return both, still

    @torch.no_grad()
    def _alone(
        self, block: nn.Module, still: Tensor, condition: Tensor | None, masks: Masks, seen: Seen, key: Tensor | None
    ) -> Tensor:
        """The branch without gradient where the others, alone, are to be recomputed for the backward pass."""
        out: Tensor = block(still, None, condition, self.block_tokens, masks, seen.detach(), key)[0]
        return out

    def starts(self, cache: Cache) -> bool:
        """Whether `next_block` needs a context though no block is known: times of the clean stream, and no rows."""
        return False

    def next_block(
        self,
        x: Tensor,
        c_noise: Tensor,
        second: Tensor | None,
        label: Tensor,
        cache: Cache,
        context: Context | None = None,
    ) -> Tensor:
        """G of the block after all that are known, of its shape.

        Args:
            x: (N, C, rows, W), the rows of this block alone; c_noise and second are (G,).
            cache: what is known, to which the blocks of `context` are added.
            context: blocks that are known since the last call: they ride in this one.
        """
        size, known = self.block_tokens, cache.blocks
        clean = [] if context is None else [self.tokens_of(context.x, known * size)]
        new = sum(part.shape[1] for part in clean) // size
        both = torch.cat([*clean, self.tokens_of(x, (known + new) * size)], dim=1)
        times = [(c_noise, second), *([] if context is None else [(context.c_noise, context.second)])]
        condition, *of_clean = self.conditions(times, label)
        masks, layers = known_masks(new, size, known, x.device), []
        for layer, block in enumerate(self.blocks):
            given = both, of_clean[0] if of_clean else None, condition[:, None], size, masks, cache.past(layer)
            both, seen, _ = block(*given)
            layers.append(seen)
        # Of no block nothing is kept: tensors without tokens would be one more shape to compile for.
        cache.blocks, cache.layers = known + new, layers if known + new else []
        return self.image_of(both[:, new * size :], condition)
