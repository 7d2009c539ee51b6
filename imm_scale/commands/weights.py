"""`imm-scale export` and `imm-scale import`."""

import argparse

from imm_scale.commands.base import Command


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="file to write, ending in .safetensors, or folder for diffusers")
    parser.add_argument(
        "--format",
        default="safetensors",
        help="safetensors: one file; diffusers: config.json and diffusion_pytorch_model.safetensors in a folder",
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN | FILE.safetensors | FOLDER")
    parser.add_argument("--ema", type=float, help="decay of the average; default the first, 0 for the raw weights")
    _add_out(parser)


def _export(args: argparse.Namespace) -> int:
    from imm_scale.checkpoint import export

    export.export(args.run, args.out, args.ema, format=args.format)
    for warning in export.warnings(args.run, args.ema):
        print(f"warning: {warning}")
    print(args.out)
    return 0


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.pkl")
    parser.add_argument("--second-time", choices=("s", "t_minus_s"), help="in place of what the file records")
    parser.add_argument("--vae", help="folder of the AutoencoderKL that decodes its latents")
    _add_out(parser)


def _import(args: argparse.Namespace) -> int:
    from imm_scale.checkpoint import export
    from imm_scale.checkpoint.released import mapping

    export.check_out(args.out, args.format)
    released = mapping.read(args.file, args.second_time, args.vae)
    export.write(released.spec, released.weights, args.out, args.format)
    print("\n".join([*released.notes, args.out]))
    return 0


EXPORT = Command(
    _add_export,
    _export,
    """examples:
  imm-scale export runs/demo/imm --out digits.safetensors --ema 0.995
  imm-scale export digits.safetensors --out digits --format diffusers""",
)
IMPORT = Command(
    _add_import,
    _import,
    """examples:
  imm-scale import imagenet256_ts_a2.pkl --out ts_a2.safetensors --vae /models/sd-vae-ft-ema
  imm-scale import imagenet256_s_a1.pkl --out s_a1.safetensors --second-time s""",
)
