"""Takes a config to SLURM in one line, and tells how it goes: `python -m launchers.submit --help`."""

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from imm_scale import config as configs
from imm_scale import storage
from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from launchers import checks, slurm, snapshot, submissions, watch
from launchers import cluster as clusters
from launchers.cluster import CHECKOUT, Cluster
from launchers.script import Job, ranks_per_node, script

_EXAMPLES = """\
examples:
  python -m launchers.submit train configs/my_run.yaml optimizer.lr=5e-4 --nodes 4
  python -m launchers.submit train configs/my_run.yaml --nodes 4-8 --time 2-00:00:00 --cluster my_site --dry-run
  python -m launchers.submit encode --array 0-63%16 -- --images s3://b/images --out s3://b/latents --codec vae --vae V
  python -m launchers.submit evaluate runs/my_run --dependency afterok:123 -- --steps 1,2,4,8
  python -m launchers.submit status runs/my_run
  python -m launchers.submit logs runs/my_run --rank 3 --follow
  python -m launchers.submit cancel runs/my_run

A train job goes on through time limits, preemption, dead nodes and dead ranks, from its last checkpoint and under the
same job id; docs/clusters.md says what happens when. Words after -- go to the program as they are."""


def submit(job: Job, cluster: Cluster) -> int:
    """Queues a job as it is and returns its id (of the whole array, if it is one). Raises UserError."""
    folder = os.path.dirname(job.output.replace("%%", "%"))
    os.makedirs(folder, exist_ok=True)  # SLURM loses what is printed, and fails the job, where there is no folder
    return slurm.queue(script(job, cluster, CHECKOUT))


# --- the three kinds ---


def _train(args: argparse.Namespace, cluster: Cluster) -> int:
    if args.array is not None:
        raise UserError(f"--array {args.array}: a run is one job; python -m launchers.sweep submits arrays of runs")
    config = configs.load_words(args.words).config
    run_dir = config.run_dir
    output = _pattern(storage.join(storage.local_path(run_dir), "logs")) if storage.is_local(run_dir) else "logs"
    job = _job(args, config.run.name, os.path.join(os.path.abspath(output), "slurm-%j.out"))
    checks.check(job, cluster, ask=slurm.available())
    checks.check_shared(run_dir, cluster)
    _check_run(config, job, cluster)
    if _complete(config):
        print(f"{run_dir} is complete: step {config.train.max_steps} is committed; nothing to submit")
        return 0
    text = script(job, cluster, CHECKOUT)
    if args.dry_run:
        print(text, end="")
        return 0
    _refuse_second_job(run_dir)
    folder = submissions.new_folder(run_dir)
    snapshot.save(folder, snapshot.read(), configs.to_yaml(config), text)
    number = submit(job, cluster)
    submissions.record(folder, number)
    run = shlex.quote(run_dir)
    print(f"job {number}: {job.nodes} nodes x {ranks_per_node(job, cluster)} ranks, {run_dir}")
    print(f"  python -m launchers.submit status {run}\n  python -m launchers.submit logs {run} --follow")
    return 0


def _check_run(config: Config, job: Job, cluster: Cluster) -> None:
    """The manifest, and whether every rank gets a group, before hours in a queue."""
    from imm_scale import preflight

    preflight.plan(config, checks.node_range(job.nodes)[1] * ranks_per_node(job, cluster))


def _complete(config: Config) -> bool:
    from imm_scale.checkpoint.format import committed_steps

    return max(committed_steps(config.run_dir), default=0) >= config.train.max_steps


def _refuse_second_job(run_dir: str) -> None:
    job = submissions.last_job(run_dir)
    if job is not None and not submissions.is_over(submissions.state_of(job)):
        run = shlex.quote(run_dir)
        raise UserError(
            f"{run_dir} is in the queue already, as job {job}: two jobs would write over each other; "
            f"end that one first: python -m launchers.submit cancel {run}"
        )


def _pattern(path: str) -> str:
    """A path as SLURM's file name patterns spell it."""
    return path.replace("%", "%%")


def _encode(args: argparse.Namespace, cluster: Cluster) -> int:
    return _other(args, cluster, "encode")


def _evaluate(args: argparse.Namespace, cluster: Cluster) -> int:
    if not args.words:
        raise UserError("evaluate needs the folder of a run: python -m launchers.submit evaluate runs/my_run")
    return _other(args, cluster, "evaluate")


def _other(args: argparse.Namespace, cluster: Cluster, kind: str) -> int:
    file = f"{kind}-%A_%a.out" if args.array else f"{kind}-%j.out"
    job = _job(args, kind, os.path.join(_pattern(CHECKOUT), "logs", file))
    checks.check(job, cluster, ask=slurm.available())
    if args.dry_run:
        print(script(job, cluster, CHECKOUT), end="")
        return 0
    number = submit(job, cluster)
    print(f"job {number}: {job.nodes} nodes x {ranks_per_node(job, cluster)} ranks; it prints to {job.output}")
    return 0


def _job(args: argparse.Namespace, name: str, output: str) -> Job:
    named = {field.name for field in dataclasses.fields(Job)} - {"kind", "tasks", "name", "output"}
    options = {key: value for key, value in vars(args).items() if key in named}
    return Job(kind=args.command, tasks=(tuple(args.words),), name=args.name or name, output=output, **options)


# --- the command line ---


def _watch(args: argparse.Namespace) -> int:
    if args.command == "status":
        print(watch.status(args.run))
    elif args.command == "cancel":
        print(watch.cancel(args.run, args.now))
    else:
        for line in watch.lines(watch.log_file(args.run, args.rank), args.follow):
            print(line, end="", flush=True)
    return 0


_JOB_OPTIONS: dict[str, dict[str, Any]] = {
    "--cluster": {"help": "configs/cluster/NAME.yaml, or a YAML file; default IMM_CLUSTER, else default"},
    "--name": {"help": "job name; default the run's"},
    "--nodes": {"help": "number of nodes, or least and most as in 4-8", "default": "1"},
    "--gpus-per-node": {"help": "default the cluster's", "type": int},
    "--ranks-per-node": {"help": "processes per node; default one per GPU", "type": int},
    "--cpus-per-task": {"help": "CPUs of each rank; default the cluster's", "type": int},
    "--time": {"help": "limit of one start, as in 12:00:00; the run goes on in the next"},
    "--partition": {"help": "default the cluster's, else SLURM's"},
    "--account": {"help": "whom the hours are charged to"},
    "--qos": {"help": "quality of service"},
    "--array": {"help": "indices and the most at a time, as in 0-63%%8"},
    "--dependency": {"help": "as sbatch takes it, as in afterok:123"},
    "--exclude": {"help": "nodes to keep off, as in node[3,7]"},
    "--launch": {"help": "who starts the ranks; default the cluster's", "choices": ("srun", "torchrun", "deepspeed")},
    "--grace-seconds": {"help": "time to commit in before the limit; default the cluster's", "type": int},
    "--max-restarts": {"help": "restarts after failures (default 10)", "type": int, "default": 10},
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "launchers.submit", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help)

    for name, words, help in (
        ("train", "CONFIG | key=value", "Train a run, or go on with it, through whatever happens to its nodes."),
        ("encode", "-- OPTION", "Encode images to latents; options of data_tools.encode stand after --."),
        ("evaluate", "RUN | key=value", "Measure a run; options of imm-scale evaluate stand after --."),
    ):
        command = add(name, help)
        command.add_argument("words", nargs="*", metavar=words)
        for flag, how in _JOB_OPTIONS.items():
            command.add_argument(flag, **how)
        command.add_argument("--dry-run", action="store_true", help="check, print the text for sbatch, and stop")
    status = add("status", "Say how a run is doing: its job, its last step, its starts and why they ended.")
    cancel = add("cancel", "End a run's job; its ranks commit a checkpoint first.")
    cancel.add_argument("--now", action="store_true", help="without a checkpoint")
    logs = add("logs", "Show what the launcher and rank 0 print.")
    logs.add_argument("--rank", type=int, help="messages of another rank")
    logs.add_argument("--follow", action="store_true", help="wait for more")
    for command in (status, cancel, logs):
        command.add_argument("run", metavar="RUN", help="folder of the run")
    return parser


def _parse(words: Sequence[str]) -> argparse.Namespace:
    words, own = list(words), []
    if "--" in words:
        words, own = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = _parser()
    args, rest = parser.parse_known_args(words)
    # argparse takes positional words in one run only: those after a flag are left over.
    if any(word.startswith("-") for word in rest) or ((rest or own) and not hasattr(args, "words")):
        parser.error(f"unrecognized arguments: {' '.join(rest or own)}")
    if hasattr(args, "words"):
        args.words = [*args.words, *rest, *own]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 the user's mistake."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    actions = {"train": _train, "encode": _encode, "evaluate": _evaluate}
    try:
        if args.command not in actions:
            return _watch(args)
        if os.path.realpath(os.getcwd()) != os.path.realpath(CHECKOUT):
            raise UserError(f"this runs from the checkout, as the job will: cd {CHECKOUT}")
        site = args.cluster or os.environ.get("IMM_CLUSTER", "default")
        return actions[args.command](args, clusters.load(site))
    except UserError as error:
        print(f"launchers.submit {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
