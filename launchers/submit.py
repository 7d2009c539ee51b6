"""Takes a run, an encoding or an evaluation to SLURM: `imm-scale submit --help`."""

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence

from imm_scale import cli, storage
from imm_scale import config as configs
from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from launchers import checks, slurm
from launchers import cluster as clusters
from launchers.cluster import Cluster
from launchers.records import snapshot, submissions
from launchers.script import Job, Kind, ranks_per_node, script


def submit(job: Job, text: str) -> int:
    """Queues the text of a job and returns its id (of the whole array, if it is one). Raises UserError."""
    folder = os.path.dirname(job.output.replace("%%", "%"))
    os.makedirs(folder, exist_ok=True)  # SLURM loses what is printed, and fails the job, where there is no folder
    return slurm.queue(text)


# --- the three kinds ---


def _train(args: argparse.Namespace, cluster: Cluster) -> int:
    if args.array is not None:
        raise UserError(f"--array {args.array}: a run is one job; imm-scale sweep submits arrays of runs")
    config = configs.load_words(args.positionals).config
    run_dir = config.run_dir
    output = _pattern(storage.join(storage.local_path(run_dir), "logs")) if storage.is_local(run_dir) else "logs"
    job = _job(args, "train", config.run.name, os.path.join(os.path.abspath(output), "slurm-%j.out"))
    checks.check(job, cluster, ask=slurm.available())
    checks.check_shared(run_dir, cluster)
    _check_run(config, job, cluster)
    if _complete(config):
        print(f"{run_dir} is complete: step {config.train.max_steps} is committed; nothing to submit")
        return 0
    text = script(job, cluster, *snapshot.job_folders())
    if args.dry_run:
        print(text, end="")
        return 0
    _refuse_second_job(run_dir)
    folder = submissions.new_folder(run_dir)
    snapshot.save(folder, snapshot.read(), configs.to_yaml(config), text)
    number = submit(job, text)
    submissions.record(folder, number)
    run = shlex.quote(run_dir)
    print(f"job {number}: {job.nodes} nodes x {ranks_per_node(job, cluster)} ranks, {run_dir}")
    print(f"  imm-scale status {run}\n  imm-scale logs {run} --follow")
    return 0


def _check_run(config: Config, job: Job, cluster: Cluster) -> None:
    """The manifest, whether every rank gets a group, and what the run starts from, before hours in a queue."""
    from imm_scale import preflight
    from imm_scale.checkpoint import init_weights, resume
    from imm_scale.checkpoint.format import committed_steps
    from imm_scale.sampling import source

    source.check_start(config)
    prepared = preflight.prepare(config, checks.node_range(job.nodes)[1] * ranks_per_node(job, cluster))
    resume.check_run_folder(prepared)
    if not committed_steps(config.run_dir):  # else it goes on from there, and its source may be gone
        init_weights.check(prepared)


def _complete(config: Config) -> bool:
    from imm_scale.checkpoint.format import committed_steps

    return max(committed_steps(config.run_dir), default=0) >= config.train.max_steps


def _refuse_second_job(run_dir: str) -> None:
    from imm_scale.checkpoint import run_lock

    run_lock.check_free(run_dir)
    job = submissions.last_job(run_dir)
    if job is not None and not submissions.is_over(submissions.state_of(job)):
        run = shlex.quote(run_dir)
        raise UserError(
            f"{run_dir} is in the queue already, as job {job}: two jobs would write over each other; "
            f"end that one first: imm-scale cancel {run}"
        )


def _pattern(path: str) -> str:
    """A path as SLURM's file name patterns spell it."""
    return path.replace("%", "%%")


def _encode(args: argparse.Namespace, cluster: Cluster) -> int:
    return _other(args, cluster, "encode")


def _evaluate(args: argparse.Namespace, cluster: Cluster) -> int:
    if not args.positionals:
        raise UserError("evaluate needs the folder of a run: imm-scale submit evaluate runs/my_run")
    return _other(args, cluster, "evaluate")


def _other(args: argparse.Namespace, cluster: Cluster, kind: Kind) -> int:
    file = f"{kind}-%A_%a.out" if args.array else f"{kind}-%j.out"
    _check_arguments(args, kind)
    job = _job(args, kind, kind, os.path.join(_pattern(snapshot.job_folders()[0]), "logs", file))
    checks.check(job, cluster, ask=slurm.available())
    text = script(job, cluster, *snapshot.job_folders())
    if args.dry_run:
        print(text, end="")
        return 0
    number = submit(job, text)
    print(f"job {number}: {job.nodes} nodes x {ranks_per_node(job, cluster)} ranks; it prints to {job.output}")
    return 0


def _check_arguments(args: argparse.Namespace, kind: Kind) -> None:
    """What the job's program will be told, by its own parser and checks: now, and not after hours in a queue."""
    job_args = cli.parse([kind, *args.positionals])
    job_args.may_come = args.dependency is not None  # what the job before makes
    if job_args.check is not None:
        job_args.check(job_args)


def _job(args: argparse.Namespace, kind: Kind, name: str, output: str) -> Job:
    fields = {field.name for field in dataclasses.fields(Job)} - {"kind", "tasks", "name", "output"}
    options = {key: value for key, value in vars(args).items() if key in fields}
    return Job(kind=kind, tasks=(tuple(args.positionals),), name=args.name or name, output=output, **options)


def run(args: argparse.Namespace) -> int:
    """`imm-scale submit`: the first word says what, where it is not a run. Raises UserError."""
    given = args.positionals
    kind, *arguments = given if given[:1] and given[0] in _KINDS else ["train", *given]
    folder, code = snapshot.job_folders()
    if code is None and os.path.realpath(os.getcwd()) != os.path.realpath(folder):
        raise UserError(f"this runs from the checkout, as the job will: cd {folder}")
    args.positionals = arguments
    return _KINDS[kind](args, clusters.load(args.cluster or os.environ.get("IMM_CLUSTER", "default")))


_KINDS = {"train": _train, "encode": _encode, "evaluate": _evaluate}


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m launchers.submit`: also status, logs and cancel of what it submitted."""
    args = list(sys.argv[1:] if argv is None else argv)
    return cli.main(args if args[:1] and args[0] in ("status", "logs", "cancel") else ["submit", *args])


if __name__ == "__main__":
    sys.exit(main())
