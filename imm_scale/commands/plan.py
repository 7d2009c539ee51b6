"""`imm-scale plan`."""

import argparse
import json

from imm_scale.commands.base import Command, add_config_args
from imm_scale.planner import hardware


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_args(parser)
    parser.add_argument("--nodes", type=int, default=1, help="default 1")
    parser.add_argument("--gpus-per-node", type=int, default=1, help="default 1")
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(hardware.GPUS)}")
    parser.add_argument(
        "--link", help=f"between nodes, one of {', '.join(hardware.LINKS)}; default {hardware.DEFAULT_LINK}"
    )
    parser.add_argument("--compare", action="store_true", help="add a table over ZeRO stages and micro-batches")
    parser.add_argument("--json", action="store_true", help="print the numbers alone, in bytes and seconds")


def _run(args: argparse.Namespace) -> int:
    from imm_scale import config as configs
    from imm_scale.planner import estimate as planner
    from imm_scale.planner import text

    config = configs.load_words(args.positionals).config
    estimate = planner.estimate(config, args.nodes, args.gpus_per_node, args.gpu, args.link)
    if args.json:
        print(json.dumps(planner.as_dict(estimate), indent=2))
        return 0
    print(text.render(config, estimate, [] if estimate.fits else planner.suggest(config, estimate)))
    if args.compare:
        print("\n" + text.compare(config, estimate))
    return 0


PLAN = Command(
    _add_arguments,
    _run,
    """examples:
  imm-scale plan imagenet256_dit_xl2 --nodes 64 --gpus-per-node 8 --gpu h100-80gb --link ib-ndr
  imm-scale plan imagenet256_dit_xl2 precision=bf16 --gpus-per-node 8 --gpu a100-40gb --compare
  imm-scale plan demo data.latent_shape=[1,8,8] data.num_classes=10 --gpu l4-24gb --json

Memory, FLOPs and bytes on the wire follow from the code and are tested against real engines on CPU; times are a model.
No GPU is needed, and no data where data.latent_shape and data.num_classes are set. See docs/planning.md.""",
    interrupted="the same command starts over",
)
