"""`imm-scale export` and `imm-scale import`."""

import argparse
from typing import TYPE_CHECKING

from imm_scale.commands.base import Command
from imm_scale.errors import UserError

if TYPE_CHECKING:
    from imm_scale.checkpoint.released.dit_layout import Released


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="file to write, ending in .safetensors, or folder for diffusers")
    parser.add_argument(
        "--format",
        default="safetensors",
        help="safetensors: one file; diffusers: a folder that DiffusionPipeline.from_pretrained loads",
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN | FILE.safetensors | FOLDER")
    parser.add_argument("--ema", type=float, help="decay of the average; default the first, 0 for the raw weights")
    parser.add_argument(
        "--width",
        type=float,
        help="in place of --ema, an average of this relative width, such as 0.08, made of all that the run's "
        "checkpoints up to --step hold",
    )
    parser.add_argument("--step", type=int, help="of the run's checkpoint; default the newest")
    parser.add_argument("--vae", help="folder of the AutoencoderKL of its latents, to put into a diffusers folder")
    _add_out(parser)


def _export(args: argparse.Namespace) -> int:
    from imm_scale.checkpoint import export, post_hoc_ema

    if args.width is not None:
        if args.ema is not None:
            raise UserError(f"--ema {args.ema:g} is kept by the run, --width {args.width:g} is made: give one of them")
        print(post_hoc_ema.write(args.run, args.out, args.width, args.step, args.format, args.vae))
        print(args.out)
        return 0
    export.export(args.run, args.out, args.ema, args.step, args.format, args.vae)
    for warning in export.warnings(args.run, args.ema, args.step):
        print(f"warning: {warning}")
    print(args.out)
    return 0


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE")
    parser.add_argument(
        "--from",
        dest="family",
        choices=("imm", "sit", "dit"),
        help="whose it is: the .pkl of IMM's authors (default), or a state dict (.pt, .safetensors) of SiT or DiT",
    )
    parser.add_argument("--second-time", choices=("s", "t_minus_s"), help="of imm, in place of what the file records")
    parser.add_argument("--heads", type=int, help="of sit and dit, attention heads of a net of no published size")
    parser.add_argument("--vae", help="folder or hub name of the AutoencoderKL that decodes its latents")
    _add_out(parser)


def _import(args: argparse.Namespace) -> int:
    from imm_scale.checkpoint import export

    export.check_out(args.out, args.format)
    released = _released(args)
    export.write(released.spec, released.weights, args.out, args.format)
    print("\n".join([*released.notes, args.out]))
    return 0


def _released(args: argparse.Namespace) -> "Released":
    from imm_scale.checkpoint.released import mapping, state_dicts

    if args.family is None and args.file.endswith((".pt", ".pth", ".safetensors")):
        raise UserError(f"{args.file}: SiT's and DiT's weights have the same names; give --from sit or --from dit")
    if args.family in (None, "imm"):
        if args.heads is not None:
            raise UserError(f"--heads {args.heads}: IMM's files record their heads; it is for --from sit and dit")
        return mapping.read(args.file, args.second_time, args.vae)
    if args.second_time is not None:
        raise UserError(f"--second-time {args.second_time}: {args.family} knows no second time; it is for --from imm")
    return state_dicts.read(args.file, args.family, args.heads, args.vae)


EXPORT = Command(
    _add_export,
    _export,
    """examples:
  imm-scale export runs/demo/imm --out digits.safetensors --ema 0.995
  imm-scale export runs/demo/imm --out wide.safetensors --width 0.15
  imm-scale export digits.safetensors --out digits --format diffusers
  imm-scale export runs/xl --step 200000 --out xl --format diffusers --vae /models/sd-vae-ft-mse""",
    interrupted="nothing is half-written, the same command starts over",
)
IMPORT = Command(
    _add_import,
    _import,
    """examples:
  imm-scale import imagenet256_ts_a2.pkl --out ts_a2.safetensors --vae /models/sd-vae-ft-ema
  imm-scale import imagenet256_s_a1.pkl --out s_a1.safetensors --second-time s
  imm-scale import SiT-XL-2-256x256.pt --from sit --out sit_xl2.safetensors --vae /models/sd-vae-ft-ema
  imm-scale import DiT-XL-2-256x256.pt --from dit --out dit_xl2.safetensors""",
    interrupted="nothing is half-written, the same command starts over",
)
