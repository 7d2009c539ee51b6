"""Flags that `sample` and `evaluate` have in common, and the overrides they stand for."""

import argparse
from typing import TYPE_CHECKING

from imm_scale.commands.base import numbers
from imm_scale.errors import UserError

if TYPE_CHECKING:
    from imm_scale.config import Config


def add_sampling_flags(parser: argparse.ArgumentParser, section: str) -> None:
    """The flags; those that both sections of the config have set the key of `section`."""
    parser.set_defaults(section=section)
    parser.add_argument("positionals", nargs="*", metavar="key=value", help="overrides of the run's config")
    parser.add_argument("--steps", help="step counts, as in 1,2,4,8")
    parser.add_argument("--num", type=int, help="samples per step count")
    parser.add_argument("--seed", type=int, help="seed of the starting noise")
    parser.add_argument("--guidance", metavar="W[,W...]", help="guidance scales w, as in 1,1.5,2; 1 is off")
    parser.add_argument("--guide", help="a weaker net that guidance leads away from: a run, a checkpoint, an export")
    parser.add_argument("--guide-step", type=int, help="step of the guide; without --guide of the same run")
    parser.add_argument("--guide-ema", type=float, help="decay of the guide's average, 0 for its raw weights")
    parser.add_argument("--labels", help="classes in turn: all, 0-9 or 3,7; or counts of each: 0:500,3-4:100")
    parser.add_argument(
        "--grid",
        help="time grid: auto, uniform, edm, eta_1.4 or times as in 0.994,0.5,0; of tokens how many a step draws: "
        "uniform, cosine, best or a list",
    )
    parser.add_argument(
        "--sampler",
        help="auto, pushforward, restart, pushforward_restart, heun; of tokens unmask, blocks, verified",
    )
    parser.add_argument("--order", help="order in which unmask draws tokens: random, left_to_right or confidence")
    parser.add_argument("--block-steps", metavar="L-L...", help="steps of each block, of a net of several: 4-2-1-1")
    parser.add_argument(
        "--given",
        metavar="FILE",
        help="tokens whose gaps are filled (.npy, .jsonl), or latents (.npz) that are continued",
    )
    parser.add_argument("--given-blocks", type=int, help="how many blocks of --given are taken; 1 by default")
    parser.add_argument("--ema", type=float, help="decay of the average to use; 0 for the raw weights")
    parser.add_argument("--batch-size", type=int, help="images held at once; sample i is the same whatever it is")
    parser.add_argument("--precision", help="of the network: fp32 (default), tf32, bf16 or fp16")
    parser.add_argument("--compile", action="store_true", help="compile the network first: worth it for many images")
    parser.add_argument(
        "--vae", help="folder or hub name of the AutoencoderKL that decodes vae latents; FOLDER:vae inside a pipeline"
    )


def overrides(args: argparse.Namespace) -> list[str]:
    """What the flags and the key=value words set. Raises UserError."""
    from imm_scale import config as configs

    wrong = [arg for arg in args.positionals if not configs.is_override(arg)]
    if wrong:
        raise UserError(f"{wrong[0]!r} is not an override (key=value)")
    flags = {
        f"{args.section}.steps": _steps(args),
        "sampling.block_steps": args.block_steps,
        "sampling.given": args.given,
        "sampling.given_blocks": args.given_blocks,
        "sampling.seed": args.seed,
        "sampling.labels": args.labels,
        "sampling.ema": args.ema,
        "sampling.guide.source": args.guide,
        "sampling.guide.step": args.guide_step,
        "sampling.guide.ema": args.guide_ema,
        "sampling.batch_size": args.batch_size,
        "sampling.grid": args.grid,
        "sampling.sampler": args.sampler,
        "sampling.order": args.order,
        "sampling.precision": args.precision,
        "sampling.compile": "true" if args.compile else None,
        "sampling.vae": args.vae,
        f"{args.section}.num": args.num,
        "evaluation.repeats": getattr(args, "repeats", None),
        "evaluation.reference": getattr(args, "reference", None),
    }
    if args.num is not None and args.labels is not None and ":" in args.labels:
        raise UserError(f"--num {args.num} beside --labels {args.labels}: the counts say how many, leave --num out")
    return [f"{key}={value}" for key, value in flags.items() if value is not None] + args.positionals


def _steps(args: argparse.Namespace) -> str | None:
    """The step counts; of --block-steps alone their largest. Raises UserError."""
    if args.steps is not None:
        return f"[{args.steps}]"
    if args.block_steps is None:
        return None
    from imm_scale.sampling import blocks

    return f"[{max(blocks.parse(args.block_steps))}]"


def guidance_of(args: argparse.Namespace, config: "Config") -> tuple[float, ...]:
    """The scales of --guidance, else the config's, each as good as in the config. Raises UserError."""
    from imm_scale import config as configs

    scales = numbers(args.guidance, "--guidance") or (config.sampling.guidance_scale,)
    for scale in scales:
        configs.changed(config, {"sampling.guidance_scale": scale}, f"--guidance {args.guidance}")
    return scales
