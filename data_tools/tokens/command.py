"""What `imm-scale pack-tokens` is told, without importing what does the work."""

import argparse

from imm_scale.commands.base import Command


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        required=True,
        help="a folder of texts (each file a document) or one file; 'python' (the sources of this interpreter's own "
        "library), 'kjv' (the King James Version, a document a chapter); of images 'digits' (8x8) and 'mnist5k' "
        "(28x28) in black and white, and 'codes' (of an autoencoder of --images)",
    )
    parser.add_argument(
        "--tokenizer", help="of texts: bytes (default), text27 (a to z and space), or hf:FILE, a tokenizer.json"
    )
    parser.add_argument("--length", type=int, metavar="T", help="tokens of a sequence")
    parser.add_argument(
        "--stride", type=int, metavar="S", help="tokens from one window to the next (default: the length)"
    )
    parser.add_argument("--out", required=True, help="output folder, a path or an fsspec URL")
    parser.add_argument(
        "--heldout",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of the documents in OUT/heldout (default 0.1)",
    )
    parser.add_argument("--shard-samples", type=int, default=8192, help="sequences of a shard (default 8192)")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle, the split and the autoencoder (default 0)")
    codes = parser.add_argument_group("codes")
    codes.add_argument("--images", metavar="PACK", help="folder of square images that imm-scale pack finished")
    codes.add_argument(
        "--autoencoder", metavar="FILE", help="an autoencoder.safetensors of another pack; default: train one"
    )
    codes.add_argument(
        "--train-steps", type=int, metavar="N", help="of the autoencoder, of 64 images each (default 1000)"
    )


def _run(args: argparse.Namespace) -> int:
    from data_tools import pack_tokens

    pack_tokens.pack_tokens(args)
    return 0


PACK_TOKENS = Command(
    _add,
    _run,
    description="""\
Packs documents as sequences of tokens: windows of one length, which never cross from one document to the next,
shuffled once, in WebDataset tars (KEY.tokens.npy, KEY.cls) with indices, and manifest.json, which data.manifest of a
config names. A share of the documents goes to OUT/heldout/manifest.json (data.holdout_manifest), so that no window of
training shares a document with what is held out; of a single file that is its end. An image is one sequence, and keeps
its class; texts are class 0.

An interrupted job goes on after its last whole shard, to the same bytes. A finished one compares the hash of its source
and what was asked for, and returns.""",
    examples="""\
examples:
  imm-scale pack-tokens --source python --tokenizer bytes --length 64 --out data/python
  imm-scale pack-tokens --source kjv --tokenizer text27 --length 64 --stride 32 --out data/kjv
  imm-scale pack-tokens --source digits --out data/digits/tokens
  imm-scale pack-tokens --source codes --images data/mnist/images --out data/mnist/codes
  imm-scale pack-tokens --source texts/ --tokenizer hf:tokenizer.json --length 1024 --out s3://bucket/tokens""",
)
