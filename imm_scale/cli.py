"""`imm-scale`: train, plan, sample, evaluate, export, import, report, doctor, explain.

Exit codes: 0 done, 2 the user's mistake (a message, no traceback), 75 preempted and resumable, 1 anything else.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence

from imm_scale import config as configs
from imm_scale import precision, storage
from imm_scale.errors import RunError, UserError
from imm_scale.parallel import world as distributed
from imm_scale.planner import hardware

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75


def _train(args: argparse.Namespace) -> int:
    loaded = configs.load_words(args.words)
    from imm_scale import preflight
    from imm_scale.training import trainer

    if args.dry_run:
        print(preflight.describe(loaded.config, args.world_size or distributed.detect().size))
        return 0
    outcome = trainer.train(loaded.config)
    distributed.shutdown()
    return EXIT_PREEMPTED if outcome == "preempted" else 0


def _plan(args: argparse.Namespace) -> int:
    from imm_scale.planner import estimate as plan
    from imm_scale.planner import text as page

    config = configs.load_words(args.words).config
    found = plan.estimate(config, args.nodes, args.gpus_per_node, args.gpu, args.link)
    if args.json:
        print(json.dumps(plan.as_dict(found), indent=2))
        return 0
    print(page.render(config, found, [] if found.fits else plan.suggest(config, found)))
    if args.compare:
        print("\n" + page.compare(config, found))
    return 0


def _overrides(args: argparse.Namespace) -> list[str]:
    """What the flags and the key=value words of `sample` and `evaluate` set."""
    wrong = [word for word in args.words if not configs.is_override(word)]
    if wrong:
        raise UserError(f"{wrong[0]!r} is not an override (key=value)")
    flags = {
        f"{args.section}.steps": f"[{args.steps}]" if args.steps else None,
        "sampling.seed": args.seed,
        "sampling.labels": f"'{args.labels}'" if args.labels else None,
        "sampling.ema": args.ema,
        "sampling.batch_size": args.batch_size,
        "sampling.grid": args.grid,
        "sampling.sampler": args.sampler,
        "sampling.precision": args.precision,
        "sampling.compile": "true" if args.compile else None,
        "sampling.vae": getattr(args, "vae", None),
        f"{args.section}.num": args.num,
        "evaluation.repeats": getattr(args, "repeats", None),
        "evaluation.reference": getattr(args, "reference", None),
    }
    if args.num is not None and args.labels is not None and ":" in args.labels:
        raise UserError(f"--num {args.num} beside --labels {args.labels}: the counts say how many, leave --num out")
    return [f"{key}={value}" for key, value in flags.items() if value is not None] + args.words


def _sample(args: argparse.Namespace) -> int:
    from imm_scale.sampling import job, source

    found = source.find(args.source).at_newest()
    config = source.config_of(found, _overrides(args)).sampling
    out = args.out or (storage.join(found.run_dir, "samples", f"step-{found.step:08d}") if found.run_dir else "samples")
    guidance = _numbers(args.guidance, "--guidance") or (config.guidance_scale,)
    request = job.Request(out, tuple(args.format.split(",")), args.latents, guidance)
    world = distributed.detect()
    distributed.init(world)
    job.run(found, config, request, world, _print)
    distributed.shutdown()
    return 0


def _numbers(text: str | None, flag: str) -> tuple[float, ...]:
    """The numbers of "1,1.5,2"; none for None."""
    try:
        return tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError as error:
        raise UserError(f"{flag} {text}: give numbers, as in 1,1.5,2") from error


def _print(line: str) -> None:
    print(line, flush=True)


def _evaluate(args: argparse.Namespace) -> int:
    from imm_scale.evaluation import command

    # Flags with several words, and argparse where a flag stands first, take words that are meant for others.
    gallery = tuple(word for word in args.gallery or () if not configs.is_override(word))
    given = [args.source, *(args.search or ()), *(args.gallery or ()), *args.words]
    words = [word for word in given if word is not None]
    settings = [word for word in words if configs.is_override(word)]
    search = tuple(word for word in settings if args.search and word.partition("=")[0] in ("guidance", "steps"))
    bare = [word for word in words if word not in settings and word not in gallery]
    source = bare[0] if bare else None
    args.words = [word for word in settings if word not in search] + bare[1:]
    asked = command.Words(
        source=source,
        guidance=_numbers(args.guidance, "--guidance"),
        watch=args.watch,
        poll=args.poll,
        search=search,
        make_reference=args.make_reference,
        out=args.out,
        gallery=None if args.gallery is None else gallery,
    )
    command.run(asked, _overrides(args), distributed.detect(), _print)
    distributed.shutdown()
    return 0


def _export(args: argparse.Namespace) -> int:
    from imm_scale.checkpoint import export as weights

    weights.export(args.run, args.out, args.ema, format=args.format)
    print(args.out)
    return 0


def _import(args: argparse.Namespace) -> int:
    from imm_scale.checkpoint import export as weights
    from imm_scale.checkpoint.released import mapping

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


def _doctor(args: argparse.Namespace) -> int:
    from imm_scale import doctor

    world = distributed.detect()
    healthy = doctor.examine(args.dir, args.url, world)
    distributed.shutdown()
    return 0 if healthy else EXIT_FAILED


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
  imm-scale sample digits.safetensors --steps 2 --guidance 1,1.5 --out pictures
  torchrun --nproc-per-node 8 -m imm_scale sample RUN --num 50000 --steps 1,2,4 --format webdataset --out s3://b/run""",
    "evaluate": """examples:
  imm-scale evaluate runs/demo/imm --steps 1,2,4,8 --repeats 5
  imm-scale evaluate runs/demo/imm --watch
  imm-scale evaluate runs/demo/imm --search guidance=1.0:3.0 steps=1,2,4,8
  imm-scale evaluate --make-reference images/ --out ref.npz evaluation.extractor.kind=pixels
  imm-scale evaluate samples/steps-2.npz --reference ref.npz evaluation.extractor.kind=pixels""",
    "export": """examples:
  imm-scale export runs/demo/imm --out digits.safetensors --ema 0.995
  imm-scale export digits.safetensors --out digits --format diffusers""",
    "import": """examples:
  imm-scale import imagenet256_ts_a2.pkl --out ts_a2.safetensors --vae /models/sd-vae-ft-ema
  imm-scale import imagenet256_s_a1.pkl --out s_a1.safetensors --second-time s""",
    "report": """examples:
  imm-scale report runs/demo/imm runs/demo/flow_matching --out runs/demo/report.html
  imm-scale report sweeps/digits_scaling --out digits_scaling.html --figures docs/images/digits_scaling""",
    "doctor": """examples:
  imm-scale doctor --dir runs
  imm-scale doctor --dir /scratch/me/runs --url s3://bucket/latents
  srun --ntasks-per-node 8 imm-scale doctor --dir /scratch/me/runs""",
    "explain": """examples:
  imm-scale explain method.k
  imm-scale explain optimizer configs/demo.yaml
  imm-scale explain""",
}


def _add_sampling_flags(parser: argparse.ArgumentParser, section: str) -> None:
    parser.set_defaults(section=section)
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides of the run's config")
    parser.add_argument("--steps", help="step counts, as in 1,2,4,8")
    parser.add_argument("--num", type=int, help="samples per step count")
    parser.add_argument("--seed", type=int, help="seed of the starting noise")
    parser.add_argument("--guidance", metavar="W[,W...]", help="guidance scales w, as in 1,1.5,2; 1 is off")
    parser.add_argument("--labels", help="classes in turn: all, 0-9 or 3,7; or counts of each: 0:500,3-4:100")
    parser.add_argument("--grid", help="time grid: auto, uniform, edm, eta_1.4 or times as in 0.994,0.5,0")
    parser.add_argument("--sampler", help="pushforward, restart, pushforward_restart or heun")
    parser.add_argument("--ema", type=float, help="decay of the average to use; 0 for the raw weights")
    parser.add_argument("--batch-size", type=int, help="images held at once; sample i is the same whatever it is")
    parser.add_argument("--precision", help="of the network: fp32 (default), tf32, bf16 or fp16")
    parser.add_argument("--compile", action="store_true", help="compile the network first: worth it for many images")


def _add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vae", help="folder of the AutoencoderKL that decodes vae latents")
    parser.add_argument("--repeats", type=int, help="sampling seeds; their spread is the error bar")
    parser.add_argument("--reference", help=".npz to compare with; default the training data")
    parser.add_argument("--watch", action="store_true", help="measure checkpoints as they come, until the run ends")
    parser.add_argument("--poll", type=float, default=30.0, metavar="SECONDS", help="how often --watch looks")
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

    sample = add(
        "sample", _sample, "Draw images, under nothing or any launcher; the same command goes on when stopped."
    )
    sample.add_argument("source", metavar="RUN | CHECKPOINT | FILE.safetensors | FOLDER")
    _add_sampling_flags(sample, "sampling")
    sample.add_argument("--vae", help="folder of the AutoencoderKL that decodes vae latents")
    sample.add_argument("--out", help="folder to write to, any fsspec URL; default RUN/samples/step-N")
    sample.add_argument(
        "--format",
        default="grid,npz",
        help="one or more of grid (a PNG, a row a class), folder (PNG files), npz (as ADM reads it), webdataset (tars)",
    )
    sample.add_argument("--latents", action="store_true", help="keep the latents too, in npz and webdataset")

    evaluate = add("evaluate", _evaluate, "Measure samples, or a set of images, against a reference.")
    evaluate.add_argument("source", nargs="?", metavar="RUN | CHECKPOINT | FILE.safetensors | IMAGES")
    _add_sampling_flags(evaluate, "evaluation")
    _add_evaluation_flags(evaluate)

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

    doctor = add("doctor", _doctor, "Check what training needs, on this machine or these ranks; exit 1 if it cannot.")
    doctor.add_argument("--dir", default="runs", help="folder that run folders lie in")
    doctor.add_argument("--url", help="folder in an object store that a run reads or writes")

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
    precision.set_tf32(False)  # training and sampling allow it where their keys say so
    try:
        return args.action(args)
    except (UserError, RunError) as error:
        rank = distributed.detect().rank if "RANK" in os.environ else 0
        print(f"imm-scale {args.command}: " + (f"[rank {rank}] " if rank else "") + str(error), file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED
