"""Packs texts or images as sequences of tokens into WebDataset tars: `imm-scale pack-tokens --help`."""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.common import paths_are_the_users, write_json
from data_tools.sources.built_in import BUILT_IN
from data_tools.tokens import corpus as corpora
from data_tools.tokens import numbers, spool, writing
from data_tools.tokens.corpus import Corpus
from data_tools.tokens.spool import Spool
from data_tools.tokens.train_fsq import autoencoder
from data_tools.tokens.writing import HELD_OUT, IDENTITY, MANIFEST, Target
from imm_scale import storage
from imm_scale.cli import entry
from imm_scale.data.manifest import Manifest, TokenCodec
from imm_scale.data.tokens.images import CODES
from imm_scale.errors import UserError

_OF_CODES = ("images", "autoencoder", "train_steps")
_TRAIN_STEPS = 1000


@paths_are_the_users()
def pack_tokens(args: argparse.Namespace) -> None:
    """Does what the command line asks. Raises UserError."""
    _check_arguments(args)
    writing.check_folder(args.out)
    corpus = _corpus(args)
    codec = TokenCodec(corpus.vocabulary, corpus.tokenizer, corpus.tokenizer_hash, corpus.image_shape)
    length = corpus.length or args.length
    with tempfile.TemporaryFile() as file:
        documents = tqdm(corpus.documents, total=corpus.count, unit="document", disable=None)
        tokens = spool.fill(file, documents, codec.stored_dtype)
        identity = _identity(args, corpus, tokens, length)
        finished = writing.check_identity(args.out, identity)
        if finished is None:
            print("\n".join(_write(args, corpus, codec, identity, tokens, length)))
        else:
            print(f"already packed: {finished.num_samples} sequences in {len(finished.shards)} shards in {args.out}")
    for folder in (args.out, storage.join(args.out, HELD_OUT)):
        writing.remove_records(folder)


def _write(
    args: argparse.Namespace, corpus: Corpus, codec: TokenCodec, identity: dict[str, Any], tokens: Spool, length: int
) -> list[str]:
    """Shards and manifests of both parts, and what is said at the end."""
    held_out = tokens.split(args.heldout, args.seed)
    targets = _targets(args, corpus, codec, identity, tokens, held_out, length)
    write_json(storage.join(args.out, IDENTITY), identity)
    # The training set last: its manifest says that all is there.
    manifests = {part: writing.write(targets[part], tokens, args.shard_samples, args.seed, part) for part in targets}
    return _table(args, tokens, held_out, length, manifests)


def _check_arguments(args: argparse.Namespace) -> None:
    for name, least in (("length", 1), ("stride", 1), ("shard_samples", 1), ("train_steps", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least {least}")
    if not 0 <= args.heldout < 1:
        raise UserError(f"--heldout is {args.heldout}: a share from 0 to below 1 is needed")
    if args.source == CODES and args.images is None:
        raise UserError("--source codes needs --images PACK, a folder that imm-scale pack finished")
    for name in _OF_CODES:
        if args.source != CODES and getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for --source codes: leave it out")
    if args.autoencoder is not None and args.train_steps is not None:
        raise UserError(
            "--train-steps trains an autoencoder, --autoencoder names one that is trained: give one of them"
        )
    source = os.path.realpath(os.path.expanduser(args.source))
    if os.path.isdir(source) and storage.is_local(args.out):
        target = os.path.realpath(storage.local_path(args.out))
        if os.path.commonpath([source, target]) == source:
            raise UserError(f"--out {args.out} lies inside --source {args.source}: choose a folder outside of it")
    storage.check_writable(args.out)


def _corpus(args: argparse.Namespace) -> Corpus:
    if args.source in BUILT_IN:
        return corpora.of_binary(args)
    if args.source == CODES:
        args.train_steps = args.train_steps or _TRAIN_STEPS
        return corpora.of_codes(args, *autoencoder(args))
    return corpora.of_texts(args)


def _identity(args: argparse.Namespace, corpus: Corpus, tokens: Spool, length: int) -> dict[str, Any]:
    """What decides the bytes of all shards."""
    return {
        "source": args.source,
        "source_sha256": tokens.sha256,
        "documents": len(tokens.lengths),
        "tokenizer": corpus.tokenizer,
        "tokenizer_hash": corpus.tokenizer_hash,
        "length": length,
        "stride": args.stride or length,
        "heldout": args.heldout,
        "shard_samples": args.shard_samples,
        "seed": args.seed,
    }


def _targets(
    args: argparse.Namespace,
    corpus: Corpus,
    codec: TokenCodec,
    identity: dict[str, Any],
    tokens: Spool,
    held_out: NDArray[np.bool_],
    length: int,
) -> dict[str, Target]:
    """The folders to write: "heldout", where there is one, and "train". Raises UserError for one without windows."""
    bits = tokens.bits / max(int(tokens.lengths.sum()), 1) * length
    codec = replace(codec, bits_in=bits)
    targets = {}
    for part, chosen in ((HELD_OUT, held_out), ("train", ~held_out)):
        if part == HELD_OUT and args.heldout == 0:
            continue
        starts, labels = spool.windows(tokens, chosen, length, args.stride or length)
        if not len(starts):
            longest = int(tokens.lengths[chosen].max(initial=0))
            raise UserError(
                f"none of the {int(chosen.sum())} documents of {part} has {length} tokens, the longest {longest}: "
                "lower --length, or change --heldout"
            )
        folder = storage.join(args.out, HELD_OUT) if part == HELD_OUT else args.out
        names = corpus.class_names
        targets[part] = Target(folder, identity, codec, starts, labels, length, len(names) or 1, names, corpus.files)
    return targets


def _table(
    args: argparse.Namespace, tokens: Spool, held_out: NDArray[np.bool_], length: int, manifests: dict[str, Manifest]
) -> list[str]:
    """What is said at the end, a line for each part."""
    stride = args.stride or length
    lines = ["  part     documents    tokens   windows   too short  tokens left out"]
    for part, manifest in sorted(manifests.items(), reverse=True):
        chosen = held_out if part == HELD_OUT else ~held_out
        lengths = tokens.lengths[chosen]
        short = int((lengths < length).sum())
        counts = np.where(lengths < length, 0, (lengths - length) // stride + 1)
        covered = np.where(counts > 0, length + (counts - 1) * min(stride, length), 0)
        left_out = int((lengths - covered).sum())
        lines.append(
            f"  {part:8s} {len(lengths):9d} {lengths.sum():9d} {manifest.num_samples:9d} {short:11d} {left_out:16d}"
        )
    first = manifests["train"]
    codec = first.token_codec
    lines.append(
        f"sequences of {length} tokens of {codec.vocabulary} ({codec.tokenizer} {codec.tokenizer_hash[:12]}), bit "
        f"compression {numbers.bit_compression(first):.4g}; sha256 of the source {tokens.sha256[:12]}"
    )
    lines.append(f"train on them: data.manifest={storage.join(args.out, MANIFEST)}")
    if HELD_OUT in manifests:
        lines[-1] += f" data.holdout_manifest={storage.join(args.out, HELD_OUT, MANIFEST)}"
    return lines


main = entry("pack-tokens")

if __name__ == "__main__":
    sys.exit(main())
