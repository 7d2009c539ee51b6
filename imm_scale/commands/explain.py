"""`imm-scale explain`."""

import argparse

from imm_scale.commands.base import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("positionals", nargs="*", metavar="KEY | RECIPE | FILE.yaml | key=value")


def _run(args: argparse.Namespace) -> int:
    from imm_scale import config as configs

    files, overrides, keys = configs.split_args(args.positionals)
    loaded = configs.load(files, overrides)
    print("\n\n".join(configs.explain(key, loaded) for key in keys) if keys else configs.overview(loaded))
    return 0


EXPLAIN = Command(
    _add_arguments,
    _run,
    """examples:
  imm-scale explain method.k
  imm-scale explain optimizer demo
  imm-scale explain""",
    interrupted="the same command starts over",
)
