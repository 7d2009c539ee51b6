"""Streams of tokens through one transformer: known blocks, and the branches that are drawn given them.

A sample is J blocks of b neighbouring tokens. A token of the clean stream sees the clean blocks up to its own; a token
of a branch sees the clean blocks before its own, and its own block of the branch. So every block of a branch is a net
given the blocks before, and all J of them run at once; in sampling the clean keys and values are kept instead.

Legend: N samples, J blocks, T = J b tokens, D width, H heads, K head width, S parts of the tokens.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from imm_scale import fusion
from imm_scale.models.layers import Block, attend, keyed_dropout, modulate

Sight = Callable[[Any, Any, Tensor, Tensor], Tensor]  # (sample, head, query, key): whether the query sees the key
Mask = Tensor | BlockMask | None


class Seen(NamedTuple):
    """Keys and values of clean tokens in one layer, each (N, tokens, H, K)."""

    key: Tensor
    value: Tensor

    def detach(self) -> "Seen":
        """Without a way back for the gradient."""
        return Seen(self.key.detach(), self.value.detach())


class Masks(NamedTuple):
    """Of clean tokens over clean ones, and of a branch's over clean and its own; None: all are seen."""

    clean: Mask = None
    branch: Mask = None


def clean_sight(block: int, known: int) -> Sight:
    """Of clean tokens after `known` tokens that are kept: whole blocks of so many, up to their own."""
    return lambda sample, head, query, key: key // block <= (known + query) // block


def branch_sight(block: int, tokens: int) -> Sight:
    """Of a branch over so many clean tokens and then itself: clean blocks before, and its own of the branch."""

    def sees(sample: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        own = (key >= tokens) & ((key - tokens) // block == query // block)
        return ((key < tokens) & (key // block < query // block)) | own

    return sees


@cache
def takes_block_masks(device: torch.device) -> bool:
    """Whether attention skips what a mask hides, tried once: compiled on a GPU. Elsewhere all masks are dense."""
    return device.type == "cuda" and fusion.gpu_compiles() and flex_works(device)


def flex_works(device: torch.device) -> bool:
    """Whether the kernel that skips what masks hide runs there, forward and back, at XL's heads, whose tiles are the
    largest that `suits_block_masks`. Cards with 99 KiB of shared memory have too little. Warns where it does not."""
    shapes = ((1, 2, count, 72) for count in (64, 128, 128))
    q, k, v = (torch.ones(shape, dtype=torch.bfloat16, device=device, requires_grad=True) for shape in shapes)
    try:
        mask = create_block_mask(branch_sight(32, 64), None, None, 64, 128, device)
        with torch.enable_grad():
            _compiled_flex_attention()(q, k, v, block_mask=mask).sum().backward()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"masks are dense: FlexAttention does not run on this {device.type} ({reason})", stacklevel=2)
        return False
    return True


def suits_block_masks(head_width: int, dtype: torch.dtype) -> bool:
    """Whether that kernel fits such heads: its products take 16 channels and more, and beyond 128, or in fp32, tiles
    outgrow an A100's shared memory, and compilation fails."""
    return dtype in (torch.bfloat16, torch.float16) and 16 <= head_width <= 128


def _mask(sight: Sight, queries: int, keys: int, device: torch.device) -> Tensor | BlockMask:
    if takes_block_masks(device):
        return create_block_mask(sight, None, None, queries, keys, device)
    return dense_mask(sight, queries, keys, device)


def dense_mask(sight: Sight, queries: int, keys: int, device: torch.device) -> Tensor:
    """bool (queries, keys): what each query sees."""
    places = (torch.arange(count, device=device) for count in (queries, keys))
    query, key = torch.meshgrid(*places, indexing="ij")
    return sight(None, None, query, key)


@cache
def _block_masks(blocks: int, block: int, device: torch.device) -> Masks:
    return _training_masks(blocks, block, device)


def _training_masks(blocks: int, block: int, device: torch.device) -> Masks:
    tokens = blocks * block
    clean = _mask(clean_sight(block, 0), tokens, tokens, device)
    return Masks(clean, _mask(branch_sight(block, tokens), tokens, 2 * tokens, device))


def training_masks(blocks: int, block: int, device: torch.device) -> Masks:
    """Of all J blocks at once: (T, T) and (T, 2 T)."""
    # Dense ones are a few comparisons; block masks, which are searched for what they hide, are kept.
    return (_block_masks if takes_block_masks(device) else _training_masks)(blocks, block, device)


def known_masks(new: int, block: int, known: int, device: torch.device) -> Masks:
    """Of `new` clean blocks after `known` ones, beside the branch of the next block, which sees all of them."""
    if new < 2:
        return Masks()
    return Masks(clean=_mask(clean_sight(block, known * block), new * block, (known + new) * block, device))


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def attend_masked(q_NTHK: Tensor, k_NUHK: Tensor, v_NUHK: Tensor, mask: Mask, attention: str) -> Tensor:
    """Softmax attention (N, T, H, K) to what the mask, (T, U) or of blocks, lets queries see; None is everything."""
    if mask is None:
        return attend(q_NTHK, k_NUHK, v_NUHK, attention)
    q, k, v = (x.transpose(1, 2) for x in (q_NTHK, k_NUHK, v_NUHK))
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    if q.is_cuda and not suits_block_masks(q.shape[-1], q.dtype):
        dense = dense_mask(mask.mask_mod, q.shape[2], k.shape[2], q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense).transpose(1, 2)
    # Uncompiled it would form all scores.
    compiled = q.is_cuda and not torch.compiler.is_compiling()
    flex: Any = _compiled_flex_attention() if compiled else flex_attention
    out: Tensor = flex(q, k, v, block_mask=mask)
    return out.transpose(1, 2)


class _Stream(NamedTuple):
    """Tokens (N, tokens, D), of which so many at the beginning are clean, and what conditions them."""

    tokens: Tensor
    modulation_NSD: Tensor
    dropout_key_N: Tensor | None
    clean: int

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention, then of the MLP."""
        return self.modulation_NSD.chunk(6, dim=-1)

    def dropout(self, x_NTD: Tensor, p: float, number: int) -> Tensor:
        """Both branches share the masks, whatever stands before them; clean tokens have others."""
        if self.dropout_key_N is None or p == 0.0:
            return x_NTD
        clean, branch = x_NTD[:, : self.clean], x_NTD[:, self.clean :]
        branch = keyed_dropout(branch, p, self.dropout_key_N, number)
        if not self.clean:
            return branch
        return torch.cat([keyed_dropout(clean, p, self.dropout_key_N, 2 + number), branch], dim=1)


def gated(x_NTD: Tensor, gate_NSD: Tensor, y_NTD: Tensor) -> Tensor:
    """x + gate y, (N, T, D), with a gate for each of S neighbouring parts of the tokens."""
    parts = y_NTD.unflatten(1, (gate_NSD.shape[1], -1))
    return x_NTD + (gate_NSD[:, :, None] * parts).flatten(1, 2)


class StreamBlock(Block):
    """A `Block` of the same weights for clean tokens and branches at once."""

    def forward(  # type: ignore[override]
        self,
        x_NTD: Tensor,
        clean_condition_ND: Tensor | None,
        condition_NJD: Tensor,
        block: int,
        masks: Masks,
        past: Seen | None = None,
        dropout_key_N: Tensor | None = None,
        still_NTD: Tensor | None = None,
        still_condition_NJD: Tensor | None = None,
        ends: bool = False,
    ) -> tuple[Tensor, Seen, Tensor | None]:
        """Clean tokens, where they have a condition, and those of a branch's J blocks behind them in x.

        Keys and values of clean tokens are computed once: for themselves, for the branch, and detached for a branch
        without gradient. That one goes through every layer first (see `DiT.pair`), and one call serves all three.

        Args:
            block: tokens of a block.
            past: what is seen of clean tokens before those of x.
            still_NTD: the branch without gradient.
            ends: nobody looks at the clean tokens any more: past their keys and values they are left out.

        Returns:
            x; what is seen of all clean tokens, `past` included; the branch without gradient.
        """
        branch = block * condition_NJD.shape[1]
        clean = x_NTD.shape[1] - branch
        conditions = clean_condition_ND, condition_NJD, still_condition_NJD
        modulation, still_modulation = self._modulation(*conditions, clean // block)
        both, still, out_still = _Stream(x_NTD, modulation, dropout_key_N, clean), None, None
        with torch.no_grad():
            if still_NTD is not None and still_modulation is not None:
                still = _Stream(still_NTD, still_modulation, dropout_key_N, 0)
            still_qkv = None if still is None else self._projected(still)
        query, key, value = self._projected(both)
        seen = Seen(key[:, :clean], value[:, :clean])
        if past is not None:
            seen = Seen(torch.cat([past.key, seen.key], dim=1), torch.cat([past.value, seen.value], dim=1))
        with torch.no_grad():
            if still is not None and still_qkv is not None:
                out_still = self._rest(still, self._seeing(*still_qkv, seen.detach(), masks.branch))
        attended = self._seeing(query[:, clean:], key[:, clean:], value[:, clean:], seen, masks.branch)
        if clean and ends:
            both = _Stream(x_NTD[:, clean:], modulation[:, clean // block :], dropout_key_N, 0)
        elif clean:
            of_clean = attend_masked(query[:, :clean], seen.key, seen.value, masks.clean, self.attn.attention)
            attended = torch.cat([of_clean, attended], dim=1)
        return self._rest(both, attended), seen, out_still

    def _modulation(
        self, clean_ND: Tensor | None, branch_NJD: Tensor, still_NJD: Tensor | None, clean_blocks: int
    ) -> tuple[Tensor, Tensor | None]:
        """(N, S, 6 D) of all parts of x, and (N, J, 6 D) of the branch without gradient, by one product."""
        n, blocks = branch_NJD.shape[:2]
        rows = branch_NJD.flatten(0, 1)
        rows = rows if clean_ND is None else torch.cat([rows, clean_ND])
        still = None if still_NJD is None else still_NJD.flatten(0, 1)
        out = self.adaLN_modulation[0](rows, still)
        out, still = (out, None) if still is None else out
        parts = out[: n * blocks].unflatten(0, (n, blocks))
        if clean_ND is not None:
            parts = torch.cat([out[n * blocks :, None].expand(-1, clean_blocks, -1), parts], dim=1)
        return parts, None if still is None else still.unflatten(0, (n, blocks))

    def _projected(self, stream: _Stream) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale, *_ = stream.parts
        return self.attn.project(modulate(self.norm1(stream.tokens), shift, scale))

    def _seeing(self, q_NTHK: Tensor, k_NTHK: Tensor, v_NTHK: Tensor, seen: Seen, mask: Mask) -> Tensor:
        """Attention of a branch to clean tokens and its own."""
        keys, values = torch.cat([seen.key, k_NTHK], dim=1), torch.cat([seen.value, v_NTHK], dim=1)
        return attend_masked(q_NTHK, keys, values, mask, self.attn.attention)

    def _rest(self, stream: _Stream, attended_NTHK: Tensor) -> Tensor:
        """All that comes after attention."""
        x, (_, _, gate_a, shift, scale, gate_m) = stream.tokens, stream.parts
        attended = self.attn.proj(attended_NTHK.reshape(x.shape))
        x = gated(x, gate_a, stream.dropout(attended, self.dropout, number=0))
        mixed = self.mlp(modulate(self.norm2(x), shift, scale))
        return gated(x, gate_m, stream.dropout(mixed, self.dropout, number=1))


class CausalBlock(StreamBlock):
    """The same of the clean stream alone: no branch goes through it."""

    def forward(  # type: ignore[override]
        self,
        x_NTD: Tensor,
        condition_ND: Tensor,
        mask: Mask,
        past: Seen | None = None,
        dropout_key_N: Tensor | None = None,
    ) -> tuple[Tensor, Seen]:
        """Clean tokens after those of `past`, and what is seen of all of them; the mask is (T, all tokens)."""
        stream = _Stream(x_NTD, self.adaLN_modulation(condition_ND)[:, None], dropout_key_N, 0)
        query, key, value = self._projected(stream)
        if past is not None:
            key, value = torch.cat([past.key, key], dim=1), torch.cat([past.value, value], dim=1)
        attended = attend_masked(query, key, value, mask, self.attn.attention)
        return self._rest(stream, attended), Seen(key, value)
