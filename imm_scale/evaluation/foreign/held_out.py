"""DATA of `imm-scale profile`: held-out sequences of tokens of one length, spread evenly over what there is."""

import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imm_scale import storage
from imm_scale.data.dataset import Dataset
from imm_scale.errors import UserError
from imm_scale.evaluation.foreign import hugging_face

BYTES = "bytes"  # the tokenizer that needs no folder
HOLD_TOKENS = (".npy", ".json")  # an array, or a manifest of shards
TOKENS = "tokens"  # what such a manifest's codec is called


def check(url: str, tokenizer: str | None, length: int | None) -> None:
    """What can be known before a model is loaded. Raises UserError."""
    if not storage.exists(url):
        raise UserError(f"{url} does not exist: give an .npy file of tokens, a manifest, or a text file")
    if url.endswith(HOLD_TOKENS):
        if tokenizer is not None:
            raise UserError(f"--tokenizer {tokenizer}: {url} holds tokens already; leave it out")
    elif length is None or length < 1:
        raise UserError(f"{url} is text: give --length T, the tokens of a sequence")
    elif tokenizer is None:
        raise UserError(f"{url} is text: give --tokenizer FOLDER, or --tokenizer {BYTES}")


def read(url: str, tokenizer: str | None, length: int | None, samples: int) -> Tensor:
    """(N, T) int64 tokens, N at most `samples`. Raises UserError."""
    check(url, tokenizer, length)
    if url.endswith(HOLD_TOKENS):
        chosen = _of_manifest(url, samples) if url.endswith(".json") else _spread(_array(url), samples)
        if length is not None and length != chosen.shape[1]:
            raise UserError(f"--length {length}: {url} has sequences of {chosen.shape[1]}; leave it out")
        return torch.from_numpy(chosen.astype(np.int64))
    assert length is not None and tokenizer is not None
    tokens = _tokens(_text(url), tokenizer)
    count = len(tokens) // length
    if count == 0:
        raise UserError(f"{url} has {len(tokens)} tokens, fewer than --length {length}: give more text")
    return torch.from_numpy(_spread(tokens[: count * length].reshape(count, length), samples))


def _spread(rows: NDArray[np.integer], most: int) -> NDArray[np.integer]:
    return rows[_evenly(len(rows), most)]


def _evenly(count: int, most: int) -> NDArray[np.int64]:
    """Ascending indices of `most` of `count`, or of all."""
    return np.arange(min(most, count)) * count // min(most, count)


def _of_manifest(url: str, most: int) -> NDArray[np.integer]:
    dataset = Dataset(url)
    if dataset.manifest.codec.kind != TOKENS:
        raise UserError(f"{url} holds latents ({dataset.manifest.codec.kind}), where tokens are needed")
    tokens: NDArray[Any] = dataset.gather(_evenly(len(dataset), most))
    return tokens


def _array(url: str) -> NDArray[np.integer]:
    try:
        array = np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{url} is no .npy file of integers ({error})") from error
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{url} holds {array.dtype} of shape {array.shape}: it must be integers of shape (N, T)")
    if array.min() < 0:
        raise UserError(f"{url} holds {array.min()}: tokens are 0 or more")
    return np.asarray(array)


def _text(url: str) -> str:
    """Raises UserError for a file that is no text."""
    try:
        text = storage.read_text(url)
    except UnicodeDecodeError as error:
        raise UserError(f"{url} is no UTF-8 text ({error}): tokens come as .npy or a manifest.json") from error
    if "\0" in text:
        raise UserError(f"{url} is no text, it holds the character 0: tokens come as .npy or a manifest.json")
    return text


def _tokens(text: str, tokenizer: str) -> NDArray[np.int64]:
    if tokenizer == BYTES:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    if not hugging_face.is_folder(tokenizer):
        raise UserError(f"--tokenizer {tokenizer} is no folder: give one with a tokenizer, or {BYTES}")
    encoded = hugging_face.tokenizer(tokenizer)(text, add_special_tokens=False, verbose=False)
    return np.asarray(encoded["input_ids"], np.int64)
