"""`imm-scale doctor`."""

import argparse

from imm_scale.commands.base import EXIT_FAILED, Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", default="runs", help="folder that run folders lie in")
    parser.add_argument("--url", help="folder in an object store that a run reads or writes")


def _run(args: argparse.Namespace) -> int:
    from imm_scale import doctor
    from imm_scale.parallel import world

    healthy = doctor.examine(args.dir, args.url, world.detect())
    world.shutdown()
    return 0 if healthy else EXIT_FAILED


DOCTOR = Command(
    _add_arguments,
    _run,
    """examples:
  imm-scale doctor --dir runs
  imm-scale doctor --dir /scratch/me/runs --url s3://bucket/latents
  srun --ntasks-per-node 8 imm-scale doctor --dir /scratch/me/runs""",
    interrupted="the same command starts over",
)
