"""Tokens that samples are given: a text they begin with, or sequences whose gaps are filled.

Legend: N samples, n given sequences, T tokens.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imm_scale import storage
from imm_scale.build import ModelSpec
from imm_scale.config.schema import SamplingConfig
from imm_scale.data.tokens.spaces import Tokens
from imm_scale.data.tokens.tokenizers import TOKENIZER_FILE, tokenizer_of
from imm_scale.errors import UserError

UNKNOWN = -1  # a token that is to be drawn, in a file


@dataclass(frozen=True)
class KnownTokens:
    """Sample i is given sequence i mod n.

    Attributes:
        ids: (n, T) int64, UNKNOWN where a token is to be drawn.
        sha256: of the ids.
    """

    ids: Tensor
    sha256: str

    def put(self, start_NT: Tensor, index_N: Tensor) -> Tensor:
        """What sampling starts from, (N, T), with the tokens that samples of these numbers are given."""
        known = self.ids[index_N % len(self.ids)].to(start_NT.device)
        return torch.where(known == UNKNOWN, start_NT, known)


def known_tokens(config: SamplingConfig, spec: ModelSpec) -> KnownTokens | None:
    """What `sampling.prompt` or `sampling.given` say of samples that are tokens; None where neither does.

    Raises:
        UserError: both of them, samples that are no tokens, a prompt without tokens or that leaves nothing to draw, a
            file that holds no such tokens, or a count of blocks, which is for latents.
    """
    space = spec.space
    if config.prompt is not None and not isinstance(space, Tokens):
        raise UserError(
            f"sampling.prompt={config.prompt!r} is for nets that draw tokens, and this one draws {type(space).__name__}"
        )
    if not isinstance(space, Tokens) or (config.prompt is None and config.given is None):
        return None
    if config.given_blocks != 1:
        raise UserError(
            f"sampling.given_blocks={config.given_blocks} is for latents: of tokens the file itself says which are "
            "given; leave it out"
        )
    if config.prompt is not None and config.given is not None:
        raise UserError("sampling.prompt beside sampling.given: give one of them")
    ids = _of_file(config.given, space) if config.given is not None else _of_text(config, space)
    if getattr(spec.net, "causal", False):
        _check_order(ids, config.given)
    if not bool((ids == UNKNOWN).any()):
        raise UserError(f"all {space.length} tokens are given: there is nothing left to draw")
    return KnownTokens(ids, hashlib.sha256(ids.numpy().tobytes()).hexdigest())


def _check_order(ids: Tensor, url: str | None) -> None:
    """Raises UserError for tokens (n, T) that are given behind one to draw, which a causal net cannot look ahead to."""
    known = ids != UNKNOWN
    ahead = known & ~known.long().cumprod(dim=1).bool()
    if bool(ahead.any()):
        row, place = ahead.nonzero()[0].tolist()
        raise UserError(
            f"sampling.given={url}: token {place} of sequence {row} is given behind ones that are to be drawn, which a "
            "causal net cannot see: give beginnings alone, or use a net of method.name=masked"
        )


def _of_text(config: SamplingConfig, space: Tokens) -> Tensor:
    prompt = config.prompt
    assert prompt is not None
    if space.needs_decoder and config.vae is None:
        raise UserError(
            f"sampling.prompt={prompt!r} becomes tokens by {TOKENIZER_FILE}: name the folder it is in, that of the "
            "manifest, by --vae (sampling.vae)"
        )
    ids = tokenizer_of(space.codec, config.vae or "").encode(prompt, "sampling.prompt")
    if not len(ids):
        raise UserError(
            f"sampling.prompt={prompt!r} has no tokens of the tokenizer {space.codec.tokenizer}: give a text that has, "
            "or leave it out"
        )
    if len(ids) >= space.length:
        raise UserError(
            f"sampling.prompt has {len(ids)} tokens, where samples have {space.length}: shorten it to at most "
            f"{space.length - 1}"
        )
    known = torch.full((1, space.length), UNKNOWN)
    known[0, : len(ids)] = torch.from_numpy(ids)
    return known


def _of_file(url: str, space: Tokens) -> Tensor:
    ids = _ids(url)
    if ids.ndim != 2 or ids.shape[1] != space.length or not len(ids):
        raise UserError(f"sampling.given={url} holds ids of shape {tuple(ids.shape)}: (n, {space.length}) is needed")
    outside = (ids < UNKNOWN) | (ids >= space.vocabulary)
    if bool(outside.any()):
        row, place = outside.nonzero()[0].tolist()
        raise UserError(
            f"sampling.given={url}: token {place} of sequence {row} is {int(ids[row, place])}; ids are 0 to "
            f"{space.vocabulary - 1}, and {UNKNOWN} (null in jsonl) is what is to be drawn"
        )
    return ids


@lru_cache(maxsize=4)
def _ids(url: str) -> Tensor:
    """Of a .npy file, or of the `tokens` of each line of a .jsonl. Raises UserError."""
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise UserError(f"sampling.given={url} is not there") from error
    try:
        if url.endswith(".jsonl"):
            rows: list[Any] = [json.loads(line)["tokens"] for line in data.decode().splitlines() if line.strip()]
            array = np.array([_row(row) for row in rows], np.int64)
        else:
            array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, TypeError, KeyError, EOFError, OverflowError) as error:
        raise UserError(
            f"sampling.given={url} holds no tokens ({error}): give a .npy of (n, T) ids, or a .jsonl of `tokens`"
        ) from error
    if array.dtype.kind not in "iu":
        raise UserError(
            f"sampling.given={url} is of {array.dtype}: ids are whole numbers, {UNKNOWN} what is to be drawn"
        )
    return torch.from_numpy(array.astype(np.int64))


def _row(row: list[Any]) -> list[int]:
    """The ids of a sequence of a .jsonl. Raises TypeError for what json has else, which numpy would make whole."""
    odd = [one for one in row if one is not None and type(one) is not int]
    if odd:
        raise TypeError(f"{odd[0]!r} is no whole number")
    return [UNKNOWN if one is None else one for one in row]
