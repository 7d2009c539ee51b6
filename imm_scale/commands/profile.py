"""`imm-scale profile`."""

import argparse
from typing import TYPE_CHECKING

from imm_scale.commands.base import Command, say
from imm_scale.errors import UserError

if TYPE_CHECKING:
    from imm_scale.evaluation.foreign import command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODULE:CALLABLE | FOLDER", help="tokens to logits, or a Hugging Face folder")
    parser.add_argument("data", metavar="TOKENS.npy | MANIFEST | TEXT", help="held-out tokens (N, T), or text")
    parser.add_argument("--tokenizer", metavar="FOLDER | bytes", help="of a text; default that of the model's folder")
    parser.add_argument("--length", type=int, metavar="T", help="tokens of a sequence of a text")
    parser.add_argument("--samples", type=int, default=1024, help="sequences at most; default 1024")
    parser.add_argument("--mask", type=int, metavar="ID", help="id of the mask; default the model's or tokenizer's")
    parser.add_argument("--passes", type=int, help="of a masked model: scores of each sequence; default 32 for each n")
    parser.add_argument("--steps", metavar="1,2,4", help="of a masked model: numbers of steps; default 1,2,4,.. and T")
    parser.add_argument("--causal", action="store_true", help="MODULE:CALLABLE is causal: logits of the next token")
    parser.add_argument("--begin", type=int, metavar="ID", help="of a causal model: id before every sequence")
    parser.add_argument("--block", type=int, metavar="K", help="of a causal model: longest block; default 4")
    parser.add_argument("--rollouts", type=int, help="of a causal model: continuations of a prefix; default 16")
    parser.add_argument("--contexts", type=int, help="of a causal model: prefixes for the blocks; default 256")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences at once; default 16")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16", "fp16"), default="fp32", help="default fp32")
    parser.add_argument("--seed", type=int, default=0, help="of masks and rollouts; default 0")
    parser.add_argument("--out", metavar="FOLDER", help="for profile.json, .html and .png; a pass goes on from there")


def _parsed(args: argparse.Namespace) -> "command.Arguments":
    from imm_scale.evaluation.foreign import command
    from imm_scale.evaluation.foreign.models import Chosen

    return command.Arguments(
        chosen=Chosen(args.model, args.mask, args.begin, args.causal, args.precision, args.batch_size),
        data=args.data,
        tokenizer=args.tokenizer,
        length=args.length,
        samples=args.samples,
        passes=args.passes,
        steps=None if args.steps is None else _counts(args.steps),
        block=args.block,
        rollouts=args.rollouts,
        contexts=args.contexts,
        seed=args.seed,
        out=args.out,
    )


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(item) for item in text.split(","))
    except ValueError as error:
        raise UserError(f"--steps {text}: give whole numbers, as in 1,2,4") from error


def _check(args: argparse.Namespace) -> None:
    from imm_scale.evaluation.foreign import command

    command.check(_parsed(args))


def _run(args: argparse.Namespace) -> int:
    from imm_scale import precision
    from imm_scale.evaluation.foreign import command
    from imm_scale.parallel import world
    from imm_scale.report import token_profile

    precision.set_tf32(False)  # but where --precision allows it
    document = command.run(_parsed(args), world.device(world.detect()), say)
    if args.out is not None:
        say("\n" + "\n".join(token_profile.write(document, args.out)))
    return 0


PROFILE = Command(
    _add_arguments,
    _run,
    """examples:
  imm-scale profile my_models:net held_out.npy --mask 256 --out profiles/net
  imm-scale profile models/bert held_out.txt --length 128 --out profiles/bert
  imm-scale profile models/gpt2 held_out.txt --length 128 --block 4 --rollouts 64

A masked model's profile says what sampling in any number of steps must cost; a causal one's, what blocks of independent
tokens lose. Nothing is fetched or unpickled. See docs/profile.md.""",
    description="Say from one held-out pass of a token model what drawing several tokens at once must cost.",
    interrupted="with --out what was scored is kept, the same command goes on after it",
    check=_check,
)
