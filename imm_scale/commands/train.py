"""`imm-scale train`."""

import argparse

from imm_scale.commands.base import EXIT_PREEMPTED, Command, add_config_args
from imm_scale.errors import UserError


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_args(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and what it means, then stop")
    parser.add_argument("--world-size", type=int, help="ranks to assume for --dry-run")


def _run(args: argparse.Namespace) -> int:
    from imm_scale import config as configs

    loaded = configs.load_words(args.positionals)
    if args.world_size is not None and not args.dry_run:
        raise UserError(f"--world-size {args.world_size} is for --dry-run: leave it out, or start that many ranks")
    from imm_scale import preflight
    from imm_scale.checkpoint import init_weights, resume
    from imm_scale.checkpoint.format import committed_steps
    from imm_scale.parallel import world
    from imm_scale.sampling import source
    from imm_scale.training import trainer

    source.check_start(loaded.config)
    if args.dry_run:
        prepared = preflight.prepare(loaded.config, args.world_size or world.detect().size)
        resume.check_run_folder(prepared)
        if not committed_steps(prepared.config.run_dir):  # else it goes on from there, and its source may be gone
            init_weights.check(prepared)
        print(preflight.describe(prepared))
        return 0
    outcome = trainer.train(loaded.config)
    world.shutdown()
    return EXIT_PREEMPTED if outcome == "preempted" else 0


TRAIN = Command(
    _add_arguments,
    _run,
    """examples:
  imm-scale train demo
  imm-scale train my_run.yaml optimizer.lr=5e-4
  imm-scale train demo run.name=wide model.width=128 --dry-run
  torchrun --nproc-per-node 2 -m imm_scale train demo zero.stage=2""",
    interrupted="the same command goes on from the last checkpoint, or starts over where there is none",
)
