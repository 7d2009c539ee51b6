"""`imm-scale`: train, plan, sample, evaluate, export, import, report, explain.

Exit codes: 0 done, 2 the user's mistake (a message, no traceback), 75 preempted and resumable, 1 anything else.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence

from imm_scale import config as configs
from imm_scale import distributed, storage
from imm_scale.config import Config
from imm_scale.errors import UserError
from imm_scale.scaling import hardware

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75


def _train(args: argparse.Namespace) -> int:
    loaded = configs.load_words(args.words)
    from imm_scale.training import setup, trainer

    if args.dry_run:
        print(setup.describe(loaded.config, args.world_size or distributed.detect().size))
        return 0
    outcome = trainer.train(loaded.config)
    distributed.shutdown()
    return EXIT_PREEMPTED if outcome == "preempted" else 0


def _plan(args: argparse.Namespace) -> int:
    from imm_scale.scaling import page, plan

    config = configs.load_words(args.words).config
    found = plan.estimate(config, args.nodes, args.gpus_per_node, args.gpu, args.link)
    if args.json:
        print(json.dumps(plan.as_dict(found), indent=2))
        return 0
    print(page.render(config, found, [] if found.fits else plan.suggest(config, found)))
    if args.compare:
        print("\n" + page.compare(config, found))
    return 0


def _run_config(run_dir: str, args: argparse.Namespace) -> Config:
    """The config a run was started with, changed by the command's own flags."""
    url = storage.join(run_dir, "config.yaml")
    if not storage.exists(url):
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml")
    overrides = [f"run.dir={run_dir}", *_overrides(args)]
    files = [url] if storage.is_local(url) else []
    return configs.load(files, overrides).config


def _overrides(args: argparse.Namespace) -> list[str]:
    """What the flags and the key=value words of `sample` and `evaluate` set."""
    wrong = [word for word in args.words if "=" not in word]
    if wrong:
        raise UserError(f"{wrong[0]!r} is not an override (key=value)")
    flags = {
        f"{args.section}.steps": f"[{args.steps}]" if args.steps else None,
        "sampling.seed": args.seed,
        "sampling.guidance_scale": args.guidance,
        "sampling.labels": f"'{args.labels}'" if args.labels else None,
        "sampling.ema": args.ema,
        "sampling.batch_size": args.batch_size,
        "sampling.grid": args.grid,
        "sampling.sampler": args.sampler,
        "sampling.vae": getattr(args, "vae", None),
        f"{args.section}.num": args.num,
        "evaluation.repeats": getattr(args, "repeats", None),
    }
    return [f"{key}={value}" for key, value in flags.items() if value is not None] + args.words


def _sample(args: argparse.Namespace) -> int:
    from imm_scale import weights
    from imm_scale.data.codec import open_codec
    from imm_scale.sampling import run as sampling
    from imm_scale.training.checkpoint import Checkpoint

    from_file = weights.is_export(args.source)
    config = configs.load([], _overrides(args)).config if from_file else _run_config(args.source, args)
    step = None if from_file else Checkpoint.latest(args.source).meta.step
    out = args.out or ("samples" if from_file else storage.join(args.source, "samples", f"step-{step:08d}"))
    world = distributed.detect()
    distributed.init(world)
    spec, flow_map = weights.load_flow_map(args.source, config.sampling.ema, step)
    flow_map.to(distributed.device(world))
    s = config.sampling
    image_codec = open_codec(spec.codec, s.vae, str(distributed.device(world)))
    for steps in s.steps:
        plan = sampling.plan_of(s, spec, steps, s.num, s.seed)
        z = sampling.collect(flow_map, spec, plan, world, progress=f"{steps} steps")
        if world.is_main:
            print("\n".join(sampling.write(out, spec, plan, z, image_codec)))
    distributed.shutdown()
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from imm_scale.evaluation.run import evaluate

    world = distributed.detect()
    config = _run_config(args.source, args)
    distributed.init(world)
    evaluate(config, world, lambda line: print(line, flush=True))
    distributed.shutdown()
    return 0


def _export(args: argparse.Namespace) -> int:
    from imm_scale import weights

    weights.export(args.run, args.out, args.ema, format=args.format)
    print(args.out)
    return 0


def _import(args: argparse.Namespace) -> int:
    from imm_scale import weights
    from imm_scale.released import mapping

    weights.check_out(args.out, args.format)
    released = mapping.read(args.file, args.second_time, args.vae)
    weights.write(released.spec, released.weights, args.out, args.format)
    print("\n".join([*released.notes, args.out]))
    return 0


def _report(args: argparse.Namespace) -> int:
    from imm_scale.report import runs, sweeps

    if sweeps.check_single(args.runs):
        print("\n".join(sweeps.write_report(args.runs[0], args.out, args.figures)))
    else:
        runs.write_report(args.runs, args.out)
        print(runs.table(args.runs))
    print(f"\n{args.out}")
    return 0


def _explain(args: argparse.Namespace) -> int:
    files, overrides, keys = configs.split_words(args.words)
    loaded = configs.load(files, overrides)
    print("\n\n".join(configs.explain(key, loaded) for key in keys) if keys else configs.overview(loaded))
    return 0


_EXAMPLES = {
    "train": """examples:
  imm-scale train configs/demo.yaml
  imm-scale train configs/demo.yaml run.name=wide model.width=128 --dry-run
  torchrun --nproc-per-node 2 -m imm_scale train configs/demo.yaml zero.stage=2""",
    "plan": """examples:
  imm-scale plan configs/imagenet256_dit_xl2.yaml --nodes 64 --gpus-per-node 8 --gpu h100-80gb --link ib-ndr
  imm-scale plan configs/imagenet256_dit_xl2.yaml precision=bf16 --gpus-per-node 8 --gpu a100-40gb --compare
  imm-scale plan configs/demo.yaml data.latent_shape=[1,8,8] data.num_classes=10 --gpu l4-24gb --json

Memory, FLOPs and bytes on the wire follow from the code and are tested against real engines on CPU; times are a model.
No GPU is needed, and no data where data.latent_shape and data.num_classes are set. See docs/planning.md.""",
    "sample": """examples:
  imm-scale sample runs/demo/imm --steps 1,2,4,8 --num 64 --labels 0-9
  imm-scale sample digits.safetensors --steps 2 --guidance 1.5 --out pictures""",
    "evaluate": """examples:
  imm-scale evaluate runs/demo/imm --steps 1,2,4,8 --repeats 5""",
    "export": """examples:
  imm-scale export runs/demo/imm --out digits.safetensors --ema 0.995
  imm-scale export digits.safetensors --out digits --format diffusers""",
    "import": """examples:
  imm-scale import imagenet256_ts_a2.pkl --out ts_a2.safetensors --vae /models/sd-vae-ft-ema
  imm-scale import imagenet256_s_a1.pkl --out s_a1.safetensors --second-time s""",
    "report": """examples:
  imm-scale report runs/demo/imm runs/demo/flow_matching --out runs/demo/report.html
  imm-scale report sweeps/digits_scaling --out digits_scaling.html --figures docs/images/digits_scaling""",
    "explain": """examples:
  imm-scale explain objective.k
  imm-scale explain optimizer configs/demo.yaml
  imm-scale explain""",
}


def _add_sampling_flags(parser: argparse.ArgumentParser, section: str) -> None:
    parser.set_defaults(section=section)
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides of the run's config")
    parser.add_argument("--steps", help="step counts, as in 1,2,4,8")
    parser.add_argument("--num", type=int, help="samples per step count")
    parser.add_argument("--seed", type=int, help="seed of the starting noise")
    parser.add_argument("--guidance", type=float, help="guidance scale w; 1 is off")
    parser.add_argument("--labels", help="classes: all, 0-9 or 3,7")
    parser.add_argument("--grid", help="time grid: auto, uniform, edm, eta_1.4 or times as in 0.994,0.5,0")
    parser.add_argument("--sampler", help="pushforward, restart, pushforward_restart or heun")
    parser.add_argument("--ema", type=float, help="decay of the average to use; 0 for the raw weights")
    parser.add_argument("--batch-size", type=int, help="images run at once")


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        default="safetensors",
        help="safetensors: one file; diffusers: config.json and diffusion_pytorch_model.safetensors in a folder",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="imm-scale", description="Few-step image generators by IMM.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, action: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=_EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(action=action)
        return command

    train = add("train", _train, "Train a run, or go on with it, under nothing, torchrun, deepspeed or srun.")
    train.add_argument("words", nargs="*", metavar="CONFIG | key=value", help="YAML files, then dotted overrides")
    train.add_argument("--dry-run", action="store_true", help="print the resolved config and what it means, then stop")
    train.add_argument("--world-size", type=int, help="ranks to assume for --dry-run")

    plan = add(
        "plan", _plan, "Say what a run needs on given machines: memory, traffic, time, and what would make it fit."
    )
    plan.add_argument("words", nargs="*", metavar="CONFIG | key=value", help="YAML files, then dotted overrides")
    plan.add_argument("--nodes", type=int, default=1, help="default 1")
    plan.add_argument("--gpus-per-node", type=int, default=1, help="default 1")
    plan.add_argument("--gpu", required=True, help=f"one of {', '.join(hardware.GPUS)}")
    plan.add_argument(
        "--link", help=f"between nodes, one of {', '.join(hardware.LINKS)}; default {hardware.DEFAULT_LINK}"
    )
    plan.add_argument("--compare", action="store_true", help="add a table over ZeRO stages and micro-batches")
    plan.add_argument("--json", action="store_true", help="print the numbers alone, in bytes and seconds")

    sample = add("sample", _sample, "Draw images: PNG grids (a row a class, a column a sample) and .npz files.")
    sample.add_argument("source", metavar="RUN | FILE.safetensors | FOLDER")
    _add_sampling_flags(sample, "sampling")
    sample.add_argument("--vae", help="folder of the AutoencoderKL that decodes vae latents")
    sample.add_argument("--out", help="folder to write to; default RUN/samples/step-N")

    evaluate = add("evaluate", _evaluate, "Measure the Frechet distance of samples to the training images.")
    evaluate.add_argument("source", metavar="RUN")
    _add_sampling_flags(evaluate, "evaluation")
    evaluate.add_argument("--repeats", type=int, help="sampling seeds; their spread is the error bar")

    export = add("export", _export, "Write weights and model spec to one .safetensors file, or to a folder.")
    export.add_argument("run", metavar="RUN | FILE.safetensors | FOLDER")
    export.add_argument("--out", required=True, help="file to write, ending in .safetensors, or folder for diffusers")
    export.add_argument("--ema", type=float, help="decay of the average; default the first, 0 for the raw weights")
    _add_format(export)

    released = add("import", _import, "Read a checkpoint of the authors, without running anything in it.")
    released.add_argument("file", metavar="FILE.pkl")
    released.add_argument("--out", required=True, help="file to write, ending in .safetensors, or folder for diffusers")
    released.add_argument("--second-time", choices=("s", "t_minus_s"), help="in place of what the file records")
    released.add_argument("--vae", help="folder of the AutoencoderKL that decodes its latents")
    _add_format(released)

    report = add("report", _report, "Write one self-contained HTML page about runs, or about a sweep and its laws.")
    report.add_argument("runs", nargs="+", metavar="RUN | SWEEP", help="run folders, or one sweep's folder or file")
    report.add_argument("--out", default="report.html", help="page to write")
    report.add_argument("--figures", metavar="FOLDER", help="of a sweep: write its figures as files too")

    explain = add("explain", _explain, "Say what config keys mean, their type, default, and where a value came from.")
    explain.add_argument("words", nargs="*", metavar="KEY | CONFIG | key=value")
    return parser


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(words)
    # argparse takes positional words in one run only: those after a flag are left over.
    if rest and (any(word.startswith("-") for word in rest) or not hasattr(args, "words")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.words = [*args.words, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    # The deepspeed launcher inserts --local_rank=N; ranks come from the environment.
    words = [word for word in words if not re.fullmatch(r"--local[_-]rank=\d+", word)]
    args = _parse(words)
    try:
        return args.action(args)
    except UserError as error:
        rank = distributed.detect().rank if "RANK" in os.environ else 0
        print(f"imm-scale {args.command}: " + (f"[rank {rank}] " if rank else "") + str(error), file=sys.stderr)
        return EXIT_USER_ERROR
