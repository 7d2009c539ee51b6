"""`imm-scale sample`."""

import argparse

from imm_scale.commands.base import Command, say
from imm_scale.commands.sampling_flags import add_sampling_flags, guidance_of, overrides


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN | CHECKPOINT | FILE.safetensors | FOLDER")
    add_sampling_flags(parser, "sampling")
    parser.add_argument("--prompt", help="text that every sample begins with, of nets that draw tokens")
    parser.add_argument("--out", help="folder to write to, any fsspec URL; default RUN/samples/step-N")
    parser.add_argument(
        "--format",
        help="one or more of grid (a PNG, a row a class), folder (PNG files), npz (as ADM reads it), webdataset, "
        "of tokens text and jsonl; default grid,npz, of text text,npz",
    )
    parser.add_argument("--latents", action="store_true", help="keep the latents too, in npz and webdataset")


def _run(args: argparse.Namespace) -> int:
    from imm_scale import config as configs
    from imm_scale import precision
    from imm_scale.parallel import world as distributed
    from imm_scale.sampling import job
    from imm_scale.sampling import source as sources

    precision.set_tf32(False)  # but where a key allows it
    source = sources.find(args.source)
    settings = overrides(args)
    whole = sources.config_of(source, settings, job.READS)
    typed = tuple(configs.settings_of(settings))
    if args.prompt is not None:  # as it is: an override would be read as YAML, which takes newlines for spaces
        whole, typed = configs.changed(whole, {"sampling.prompt": args.prompt}, "--prompt"), (*typed, "sampling.prompt")
    config, guidance = whole.sampling, guidance_of(args, whole)
    formats = () if args.format is None else tuple(args.format.split(","))
    request = job.Request(args.out, guidance, formats, args.latents, typed)
    world = distributed.detect()
    distributed.init(world)
    job.run(source, config, request, world, say)
    distributed.shutdown()
    return 0


SAMPLE = Command(
    _add_arguments,
    _run,
    """examples:
  imm-scale sample runs/demo/imm --steps 1,2,4,8 --num 64 --labels 0-9
  imm-scale sample digits.safetensors --steps 2 --guidance 1,1.5 --out pictures
  torchrun --nproc-per-node 8 -m imm_scale sample RUN --num 50000 --steps 1,2,4 --format webdataset --out s3://b/run""",
    interrupted="the same command goes on after the parts that are finished",
)
