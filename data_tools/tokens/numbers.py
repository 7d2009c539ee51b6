"""Numbers of a data set of tokens, for `imm-scale stats`."""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from imm_scale.data import sample_order
from imm_scale.data.dataset import Dataset
from imm_scale.data.manifest import Manifest

_CHUNK = 1024
_SHOWN = 8


def bit_compression(manifest: Manifest) -> float:
    """Bits of the text or the 8-bit pixels that a sequence stands for, over the T log2(vocabulary) bits of its tokens.

    Raises:
        UserError: the manifest is of latents.
    """
    codec = manifest.token_codec
    return codec.bits_in / (manifest.latent_shape[0] * math.log2(codec.vocabulary))


def lines(dataset: Dataset) -> list[str]:
    """What stats prints of tokens: their length, vocabulary, frequencies and compression."""
    manifest, codec = dataset.manifest, dataset.manifest.token_codec
    counts = _counts(dataset)
    share = counts[counts > 0] / counts.sum()
    entropy, most = float(-(share * np.log2(share)).sum()), math.log2(codec.vocabulary)
    frequent = ", ".join(f"{i} ({counts[i] / counts.sum():.1%})" for i in np.argsort(-counts, kind="stable")[:_SHOWN])
    return [
        f"sequences of {manifest.latent_shape[0]} tokens, {codec.tokenizer} {codec.tokenizer_hash[:12]}, stored as "
        f"{manifest.stored_dtype.name}",
        f"{np.count_nonzero(counts)} of {codec.vocabulary} tokens occur; entropy of one alone {entropy:.4f} bits of "
        f"{most:.4f}",
        f"most frequent: {frequent}",
        f"bit compression: {bit_compression(manifest):.4g} ({codec.bits_in:.6g} bits of a sample over "
        f"{manifest.latent_shape[0]} x {most:.4f} bits of tokens)",
    ]


def _counts(dataset: Dataset) -> NDArray[np.int64]:
    """(V,) how often each token occurs."""
    vocabulary = dataset.manifest.token_codec.vocabulary
    counts = np.zeros(vocabulary, np.int64)
    for tokens in _chunks(dataset):
        counts += np.bincount(tokens.reshape(-1), minlength=vocabulary)
    return counts


def _chunks(dataset: Dataset) -> Iterator[NDArray[np.int64]]:
    table = sample_order.block_table(dataset.shard_samples, _CHUNK)
    for start, size in zip(table.start.tolist(), table.size.tolist(), strict=True):
        yield dataset.read(start, start + size).astype(np.int64)
