"""What is packed: documents as tokens, one after the other, with what a manifest says of them."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.encode import load_images, read_batches
from data_tools.records import class_names
from data_tools.sources.built_in import BUILT_IN
from data_tools.tokens.texts import texts
from imm_scale.data.tokens.images import AUTOENCODER_FILE, BINARY, BINARY_HASH, CODES, FSQAutoencoder, binarized
from imm_scale.data.tokens.tokenizers import TOKENIZER_FILE, FromFile, Tokenizer, open_tokenizer
from imm_scale.errors import UserError

_IMAGES_AT_ONCE = 256


@dataclass(frozen=True)
class Encoded:
    """A document as tokens.

    Attributes:
        content: its bytes before, which the source's hash is made of.
        bits: of the text or pixels that its tokens keep.
        held_out: decided by the source; None leaves it to the seed.
    """

    name: str
    label: int
    ids_T: NDArray[np.integer]
    content: bytes
    bits: float
    held_out: bool | None = None


@dataclass(frozen=True)
class Corpus:
    """All documents of a source as tokens.

    Attributes:
        documents: read and encoded as they are asked for.
        length: of every document where they are images, None of texts.
        image_shape: height and width of images, None of texts.
        class_names: a name per class, or none where all are class 0.
        files: what a reader of the data needs beside the manifest, by name.
    """

    count: int
    documents: Iterator[Encoded]
    vocabulary: int
    tokenizer: str
    tokenizer_hash: str
    length: int | None = None
    image_shape: tuple[int, int] | None = None
    class_names: tuple[str, ...] = ()
    files: dict[str, bytes] = field(default_factory=dict)


def of_texts(args: argparse.Namespace) -> Corpus:
    """Documents of --source by --tokenizer. Raises UserError."""
    if args.tokenizer == BINARY:
        raise UserError(
            f"--tokenizer {BINARY} is for images: --source digits or mnist5k; texts take bytes, text27 or hf:FILE"
        )
    if args.length is None:
        raise UserError("--length is missing: of how many tokens is a sequence?")
    tokenizer = open_tokenizer(args.tokenizer or "bytes")
    source = texts(args.source, args.heldout)
    files = {TOKENIZER_FILE: tokenizer.definition} if isinstance(tokenizer, FromFile) else {}
    documents = (_encoded(one.name, one.content, tokenizer, one.held_out) for one in source.documents)
    return Corpus(source.count, documents, tokenizer.vocabulary, tokenizer.name, tokenizer.hash, files=files)


def _encoded(name: str, content: bytes, tokenizer: Tokenizer, held_out: bool | None) -> Encoded:
    ids_T = tokenizer.encode(content, name)
    return Encoded(name, 0, ids_T, content, 8.0 * tokenizer.bytes_of(content, ids_T), held_out)


def of_binary(args: argparse.Namespace) -> Corpus:
    """The digits or MNIST's, a token a pixel. Raises UserError."""
    _check_images_options(args, BINARY)
    source = BUILT_IN[args.source]()
    images_NHW = np.stack([np.asarray(image) for image in source.images])
    height, width = images_NHW.shape[1:]
    parts = zip(source.names, source.labels, images_NHW, binarized(images_NHW), strict=True)
    documents = (Encoded(name, label, ids, image.tobytes(), 8.0 * image.size) for name, label, image, ids in parts)
    return Corpus(
        len(images_NHW),
        documents,
        2,
        BINARY,
        BINARY_HASH,
        height * width,
        (height, width),
        tuple(source.class_names),
    )


def of_codes(args: argparse.Namespace, net: FSQAutoencoder, file: bytes, file_hash: str) -> Corpus:
    """Images of an `imm-scale pack` as the codes of an autoencoder. Raises UserError."""
    _check_images_options(args, CODES)
    pack = load_images(args.images)
    height, width, channels = pack.image_shape
    if (height, width, channels) != (net.shape.side, net.shape.side, net.shape.channels):
        raise UserError(
            f"{args.images} has images of {height}x{width}x{channels}, the autoencoder takes {net.shape.side}x"
            f"{net.shape.side}x{net.shape.channels}: pack them with --size and --channels, or train another one"
        )

    def documents() -> Iterator[Encoded]:
        for batch in read_batches(args.images, pack, range(len(pack.shards)), _IMAGES_AT_ONCE):
            codes = net.encode(batch.images_NHWC).numpy()
            images = batch.images_NHWC.numpy()
            for key, label, image, ids in zip(batch.keys, batch.labels, images, codes, strict=True):
                yield Encoded(key, label, ids, image.tobytes(), 8.0 * image.size)

    return Corpus(
        pack.num_images,
        documents(),
        net.shape.vocabulary,
        CODES,
        file_hash,
        net.shape.grid**2,
        (height, width),
        tuple(class_names(args.images)),
        {AUTOENCODER_FILE: file},
    )


def all_images(folder: str) -> torch.Tensor:
    """uint8 (N, H, W, C) of a pack. Raises UserError."""
    pack = load_images(folder)
    batches = read_batches(folder, pack, range(len(pack.shards)), _IMAGES_AT_ONCE)
    return torch.cat([batch.images_NHWC for batch in batches])


def _check_images_options(args: argparse.Namespace, tokenizer: str) -> None:
    """An image is one sequence, whatever its length."""
    if args.tokenizer not in (None, tokenizer):
        raise UserError(
            f"--tokenizer {args.tokenizer}: --source {args.source} has the tokenizer {tokenizer}, leave it out"
        )
    for name in ("length", "stride"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} is for texts: an image of --source {args.source} is one sequence, leave it out")
