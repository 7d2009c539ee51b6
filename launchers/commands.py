"""What `imm-scale submit`, `status`, `logs`, `cancel` and `sweep` are told, without importing what does the work."""

import argparse
from typing import Any

from imm_scale.commands.base import Command

# --- submit ---

_JOB_OPTIONS: dict[str, dict[str, Any]] = {
    "--cluster": {"help": "a site that comes along, or a YAML file of your own; default IMM_CLUSTER, else default"},
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


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "positionals",
        nargs="*",
        metavar="RECIPE | FILE.yaml | key=value",
        help="a run, as `imm-scale train` takes it; or encode -- OPTION...; or evaluate RUN key=value... -- OPTION...",
    )
    for flag, how in _JOB_OPTIONS.items():
        parser.add_argument(flag, **how)
    parser.add_argument("--dry-run", action="store_true", help="check, print the text for sbatch, and stop")
    parser.set_defaults(hint="; options of the program that the job runs go behind --, as in evaluate RUN -- --steps 4")


def _submit(args: argparse.Namespace) -> int:
    from launchers import submit

    return submit.run(args)


SUBMIT = Command(
    _add_submit,
    _submit,
    """\
examples:
  imm-scale submit imagenet256_dit_xl2 optimizer.lr=5e-4 --nodes 4
  imm-scale submit my_run.yaml --nodes 4-8 --time 2-00:00:00 --cluster my_site.yaml --dry-run
  imm-scale submit encode --array 0-63%16 -- --images s3://b/images --out s3://b/latents --codec vae --vae V
  imm-scale submit evaluate runs/my_run --dependency afterok:123 -- --steps 1,2,4,8

A train job goes on through time limits, preemption, dead nodes and dead ranks, from its last checkpoint and under the
same job id; docs/clusters.md says what happens when. Words after -- go to the program as they are.""",
    interrupted="squeue says whether the job is in the queue; if it is not, submit it again",
)

# --- status, logs, cancel ---


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of the run")


def _status(args: argparse.Namespace) -> int:
    from launchers import watch

    print(watch.status(args.run))
    return 0


STATUS = Command(_add_run, _status, "example:\n  imm-scale status runs/my_run", interrupted="the run is as it was")


def _add_logs(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--rank", type=int, help="messages of another rank")
    parser.add_argument("--follow", action="store_true", help="wait for more")


def _logs(args: argparse.Namespace) -> int:
    from launchers import watch

    for line in watch.lines(watch.log_file(args.run, args.rank), args.follow):
        print(line, end="", flush=True)
    return 0


LOGS = Command(
    _add_logs, _logs, "example:\n  imm-scale logs runs/my_run --rank 3 --follow", interrupted="the run is as it was"
)


def _add_cancel(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--now", action="store_true", help="without a checkpoint")


def _cancel(args: argparse.Namespace) -> int:
    from launchers import watch

    print(watch.cancel(args.run, args.now))
    return 0


CANCEL = Command(
    _add_cancel,
    _cancel,
    "example:\n  imm-scale cancel runs/my_run",
    interrupted="imm-scale status says whether the job ends",
)

# --- sweep ---

_PARTS = {
    "plan": "print the cells and what they cost; nothing is written",
    "submit": "start the cells that are missing or were interrupted; again and again, if you like",
    "status": "print the state of every cell",
    "retry": "start the cells that failed or were interrupted, and no others",
    "collect": "write results.parquet, with the cells that have no results listed",
}


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name, help in _PARTS.items():
        part = parts.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example:\n{_SWEEP_EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        part.add_argument("sweep", metavar="SWEEP", help="a name that comes along, a file, or the folder it went to")
        if name in ("submit", "retry"):
            _add_start(part)
        if name in ("plan", "submit", "retry"):
            _add_machine(part)
        if name == "status":
            part.add_argument("--watch", type=float, metavar="SECONDS", help="print it again and again until done")


_SBATCH = ("time", "partition", "account", "qos", "exclude")
# Options of `sweep submit` and `retry` that a queue needs, and what they are where nobody gives them.
_OF_A_QUEUE = {"at_once": 8, "cluster": "default", "nodes": "1", "gpus_per_node": None, "gpu": None, "link": None}
_OF_A_QUEUE |= dict.fromkeys(_SBATCH)


def _add_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--local", type=int, metavar="N", help="run N cells at a time here, without SLURM")
    most = _OF_A_QUEUE["at_once"]
    parser.add_argument("--at-once", type=int, default=most, metavar="N", help="most cells SLURM runs at a time")
    for option in _SBATCH:
        parser.add_argument(f"--{option}", help="for sbatch, in place of the site's")
    parser.set_defaults(of_a_queue=_OF_A_QUEUE)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    site, nodes = _OF_A_QUEUE["cluster"], _OF_A_QUEUE["nodes"]
    parser.add_argument("--cluster", default=site, help="a site that comes along, or a YAML file of your own")
    parser.add_argument("--nodes", default=nodes, help="of each cell, a number or a range as in 2-4")
    parser.add_argument("--gpus-per-node", type=int, help="of each cell, in place of the site's")
    parser.add_argument("--gpu", help="kind of GPU, as `imm-scale plan` knows it: checks memory, estimates GPU-hours")
    parser.add_argument("--link", help="network between nodes, as `imm-scale plan` knows it")


def _sweep(args: argparse.Namespace) -> int:
    from launchers import sweep

    return sweep.ACTIONS[args.part](args)


_SWEEP_EXAMPLES = {
    "plan": """\
  imm-scale sweep plan digits_scaling
  imm-scale sweep plan my_sweep.yaml --nodes 2 --gpu h100-80gb""",
    "submit": """\
  imm-scale sweep submit my_sweep.yaml --nodes 2 --at-once 8 --cluster my_site.yaml
  imm-scale sweep submit digits_scaling --local 2""",
    "status": "  imm-scale sweep status digits_scaling",
    "retry": "  imm-scale sweep retry digits_scaling --local 2",
    "collect": "  imm-scale sweep collect digits_scaling",
}
SWEEP = Command(
    _add_sweep,
    _sweep,
    description="A whole study: many runs of one sweep file, on SLURM or on this machine, and a table of results.",
    examples="\n".join(
        ["examples:", *_SWEEP_EXAMPLES.values(), "  imm-scale report sweeps/digits_scaling --out digits_scaling.html"]
    ),
    interrupted="the cells that ran have committed what they have, the same command goes on",
)
