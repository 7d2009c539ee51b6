"""Passes of a net whose transformer sees clean blocks alone, and whose branches are a small MLP on its states.

The clean stream is a learned block of tokens, then all blocks but the last; its state at one block is what the branch
of the next is given. So the transformer runs once for any number of branches, and in sampling once a block.

Legend: N samples, G groups, J blocks of b tokens, T = J b, D width. A branch may have several times the samples of the
clean stream, replica after replica.
"""

import torch
from torch import Tensor

from imm_scale.models.base import Context
from imm_scale.models.block_causal import BlockCausal, Cache
from imm_scale.models.block_mixer import BranchMlp
from imm_scale.models.streams import known_masks, training_masks

Times = tuple[Tensor, Tensor | None]


class MlpBranches(BlockCausal):
    """A `BlockCausal` whose branches are streams through its blocks, or, where there is one, a `block_mixer`."""

    block_mixer: BranchMlp | None

    @property
    def branches_apart(self) -> bool:  # type: ignore[override]
        return self.block_mixer is not None

    def forward_in_context(
        self,
        x: Tensor,
        c_noise: Tensor,
        second: Tensor | None,
        label: Tensor,
        context: Context,
        dropout_key: Tensor | None = None,
    ) -> Tensor:
        """As in the base."""
        if self.block_mixer is None:
            return super().forward_in_context(x, c_noise, second, label, context, dropout_key)
        clean, condition = self._conditions(context, [(c_noise, second)], label)
        states = self._states(self.block_mixer, context.x, clean, dropout_key)
        return self._branch(self.block_mixer, x, states, condition)

    def pair_in_context(
        self,
        x_t: Tensor,
        x_r: Tensor,
        times_t: Times,
        times_r: Times,
        label: Tensor,
        context: Context,
        dropout_key: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As in the base: the branch without gradient goes first through every layer of the MLP."""
        if self.block_mixer is None:
            return super().pair_in_context(x_t, x_r, times_t, times_r, label, context, dropout_key)
        clean, condition, still_condition = self._conditions(context, [times_t, times_r], label)
        states = self._states(self.block_mixer, context.x, clean, dropout_key)
        with torch.no_grad():
            out_r = self._branch(self.block_mixer, x_r, states.detach(), still_condition.detach())
        return self._branch(self.block_mixer, x_t, states, condition), out_r

    def _conditions(self, context: Context, times: list[Times], label: Tensor) -> list[Tensor]:
        """Of the clean stream (N, D), and of each branch (its samples, J, D), whose labels are replicas' too."""
        replicas = len(label) // len(context.x)
        c_noise, second = (None if u is None else u.repeat(replicas) for u in (context.c_noise, context.second))
        assert c_noise is not None
        clean, *branches = self.conditions([(c_noise, second), *times], label)
        return [clean[: len(context.x)], *branches]

    def _states(self, mlp: BranchMlp, x: Tensor, condition: Tensor, dropout_key: Tensor | None) -> Tensor:
        """(N, T, W): for each block of samples x what its branch is given."""
        before = x[:, :, : x.shape[2] - x.shape[2] // self.sequence_blocks]
        tokens = torch.cat([mlp.begin_tokens(len(x)), self.tokens_of(before)], dim=1)
        mask = training_masks(self.sequence_blocks, self.block_tokens, x.device).clean
        for block, key in zip(self.blocks, self.dropout_keys(dropout_key), strict=True):
            tokens, _ = self.run_block(block, tokens, condition, mask, None, key)
        return mlp.embedded(tokens)

    def _branch(self, mlp: BranchMlp, x: Tensor, states_NTW: Tensor, condition_NJD: Tensor) -> Tensor:
        """G of blocks x, given the states before them."""
        states = states_NTW.repeat(len(x) // len(states_NTW), 1, 1)
        return self.image_of(mlp(x, states, condition_NJD), condition_NJD)

    def starts(self, cache: Cache) -> bool:
        """As in the base: the learned tokens ask for it."""
        return self.block_mixer is not None and cache.states is None

    def next_block(
        self,
        x: Tensor,
        c_noise: Tensor,
        second: Tensor | None,
        label: Tensor,
        cache: Cache,
        context: Context | None = None,
    ) -> Tensor:
        """As in the base; the transformer runs on what is new alone, the MLP in every call."""
        if self.block_mixer is None:
            return super().next_block(x, c_noise, second, label, cache, context)
        if context is not None:
            self._learn(self.block_mixer, cache, context, label)
        assert cache.states is not None, "the first call has a context, if only its times"
        (condition,) = self.conditions([(c_noise, second)], label)
        return self._branch(self.block_mixer, x, cache.states, condition[:, None])

    def _learn(self, mlp: BranchMlp, cache: Cache, context: Context, label: Tensor) -> None:
        """Adds keys and values of the blocks of `context`, and before them of the learned one where none is kept."""
        size, known = self.block_tokens, cache.blocks
        begin = [mlp.begin_tokens(len(context.x))] if self.starts(cache) else []
        clean = [self.tokens_of(context.x, known * size)] if context.x.shape[2] else []
        tokens = torch.cat([*begin, *clean], dim=1)
        (condition,) = self.conditions([(context.c_noise, context.second)], label)
        kept, new = known + 1 - len(begin), tokens.shape[1] // size
        mask, layers = known_masks(new, size, kept, tokens.device).clean, []
        for layer, block in enumerate(self.blocks):
            tokens, seen = block(tokens, condition, mask, cache.past(layer))
            layers.append(seen)
        cache.blocks, cache.layers = kept + new - 1, layers
        cache.states = mlp.embedded(tokens[:, -size:])
