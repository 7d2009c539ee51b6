"""`imm-scale evaluate`."""

import argparse
from typing import TYPE_CHECKING

from imm_scale.commands.base import Command, numbers, say
from imm_scale.commands.sampling_flags import add_sampling_flags, overrides

if TYPE_CHECKING:
    from imm_scale.evaluation import command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", metavar="RUN | CHECKPOINT | FILE.safetensors | IMAGES")
    add_sampling_flags(parser, "evaluation")
    parser.add_argument("--repeats", type=int, help="sampling seeds; their spread is the error bar")
    parser.add_argument("--reference", help=".npz or EDM2's .pkl to compare with; default the training data")
    parser.add_argument("--watch", action="store_true", help="measure checkpoints as they come, until the run ends")
    parser.add_argument("--poll", type=float, metavar="SECONDS", help="how often --watch looks; default 30")
    parser.add_argument("--search", nargs="+", metavar="guidance=LOW:HIGH", help="find the best guidance; steps=1,2,4")
    parser.add_argument(
        "--make-reference", metavar="MANIFEST | FOLDER | FILE.npz", help="write the statistics of these images to --out"
    )
    parser.add_argument("--out", help=".npz that --make-reference writes, or folder for evaluations of exports")
    parser.add_argument(
        "--gallery",
        nargs="*",
        metavar="RUN",
        help="draw the same noises at all steps, and by other runs; see the report",
    )


def _parsed(args: argparse.Namespace) -> "tuple[command.Arguments, list[str]]":
    """The command's own arguments, and the overrides of the config. Raises UserError."""
    from imm_scale import config as configs
    from imm_scale.evaluation import command

    # Flags with several values, and argparse where a flag stands first, take tokens that are meant for others.
    gallery = tuple(token for token in args.gallery or () if not configs.is_override(token))
    values = [args.source, *(args.search or ()), *(args.gallery or ()), *args.positionals]
    tokens = [token for token in values if token is not None]
    settings = [token for token in tokens if configs.is_override(token)]
    search = tuple(token for token in settings if args.search and token.partition("=")[0] in ("guidance", "steps"))
    own = [args.source, *(args.search or ()), *args.positionals]
    bare = [token for token in own if token is not None and token not in settings]
    args.positionals = [token for token in settings if token not in search] + bare[1:]
    if args.gallery is not None:
        args.section = "sampling"  # which has the step counts that are drawn
    arguments = command.Arguments(
        source=bare[0] if bare else None,
        guidance=numbers(args.guidance, "--guidance"),
        watch=args.watch,
        poll=args.poll,
        search=search,
        make_reference=args.make_reference,
        out=args.out,
        gallery=None if args.gallery is None else gallery,
        may_come=args.watch or getattr(args, "may_come", False),
    )
    return arguments, overrides(args)


def _check(args: argparse.Namespace) -> None:
    from imm_scale.evaluation import command

    command.check(*_parsed(args))


def _run(args: argparse.Namespace) -> int:
    from imm_scale import precision
    from imm_scale.evaluation import command
    from imm_scale.parallel import world

    precision.set_tf32(False)  # but where a key allows it
    arguments, settings = _parsed(args)
    command.run(arguments, settings, world.detect(), say)
    world.shutdown()
    return 0


EVALUATE = Command(
    _add_arguments,
    _run,
    """examples:
  imm-scale evaluate runs/demo/imm --steps 1,2,4,8 --repeats 5
  imm-scale evaluate runs/demo/imm --watch
  imm-scale evaluate runs/demo/imm --search guidance=1.0:3.0 steps=1,2,4,8
  imm-scale evaluate --make-reference images/ --out ref.npz evaluation.extractor.kind=pixels
  imm-scale evaluate samples/steps-2.npz --reference ref.npz evaluation.extractor.kind=pixels""",
    check=_check,
    interrupted="what was measured is kept, the same command goes on after it",
)
