"""Tokens of all documents in one temporary file, and where in it the windows begin: memory does not grow with them."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.tokens.corpus import Encoded
from imm_scale import rng


@dataclass(frozen=True)
class Spool:
    """D documents, one behind the other.

    Attributes:
        tokens: (all tokens,) a map of the file.
        first, lengths: (D,) where each document begins, and its tokens.
        labels: (D,) its class.
        held_out: (D,) 1 and 0 where the source decides, -1 where it does not.
        bits: of the text or pixels that all tokens keep.
        sha256: of the documents' names and contents.
    """

    tokens: NDArray[Any]
    first: NDArray[np.int64]
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]
    held_out: NDArray[np.int64]
    bits: float
    sha256: str

    def split(self, share: float, seed: int) -> NDArray[np.bool_]:
        """(D,) whether a document is held out: so large a share of all, by the seed, where the source does not say."""
        if share == 0 or (self.held_out >= 0).any():
            return self.held_out == 1
        documents = len(self.lengths)
        order = torch.argsort(rng.random_bits(seed, "heldout", torch.arange(documents)), stable=True).numpy()
        chosen = np.zeros(documents, bool)
        chosen[order[: min(max(1, round(share * documents)), documents - 1)]] = True
        return chosen


def fill(file: IO[bytes], documents: Iterable[Encoded], dtype: np.dtype[Any]) -> Spool:
    """Reads and encodes all documents into an empty file."""
    digest, lengths, labels, held_out, bits = hashlib.sha256(), [], [], [], 0.0
    for one in documents:
        for part in (one.name.encode(errors="surrogateescape"), one.content):
            digest.update(len(part).to_bytes(8, "little") + part)
        file.write(one.ids_T.astype(dtype).tobytes())
        lengths.append(len(one.ids_T))
        labels.append(one.label)
        held_out.append(-1 if one.held_out is None else int(one.held_out))
        bits += one.bits
    file.flush()
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = np.memmap(file, dtype, "r") if len(ends) and ends[-1] else np.empty(0, dtype)
    length_D, label_D, held_out_D = (np.array(column, np.int64) for column in (lengths, labels, held_out))
    return Spool(tokens, ends - length_D, length_D, label_D, held_out_D, bits, digest.hexdigest())


def windows(
    spool: Spool, chosen: NDArray[np.bool_], length: int, stride: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the windows of the chosen documents begin, and their classes, both (n,), document after document.

    A window never crosses from one document to the next.
    """
    counts = np.where(chosen & (spool.lengths >= length), (spool.lengths - length) // stride + 1, 0)
    document = np.repeat(np.arange(len(counts)), counts)
    inside = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    return spool.first[document] + inside * stride, spool.labels[document]
