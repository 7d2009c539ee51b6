"""What no one GPU can show, on a node of several: gpu_node.sbatch runs this, each check with what is expected of it.

    python -m benchmarks.gpu_node prepare --out DIR     data and DIR/run.yaml, once
    python -m benchmarks.gpu_node checks --out DIR      on every rank (srun, torchrun)
    python -m benchmarks.gpu_node break --out DIR       beside a run of DIR/run.yaml: ends or stops one of its ranks
    python -m benchmarks.gpu_node verdict --out DIR     after that run has come to its end

`--size small` runs the same code on whatever there is, with a net of two blocks; times are not judged then.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import traffic
from data_tools import encode, pack
from imm_scale import build, doctor
from imm_scale import config as configs
from imm_scale.checkpoint.run_folder import read_metrics, read_status
from imm_scale.data.loader import Batch
from imm_scale.data.manifest import unseen
from imm_scale.parallel import world as distributed
from imm_scale.parallel.deepspeed_engine import Engine
from imm_scale.parallel.world import World
from imm_scale.preflight import prepare
from imm_scale.training.trainer import train
from launchers.records.history import History

SMALL_NET = ("model.width=32", "model.depth=2", "model.heads=2")
SAMPLES = {True: 16, False: 32}  # of a micro-batch, by `small`
# Seconds from the signal to the end of the step: srun sees a dead rank at once, the watchdog a stopped one after
# train.step_timeout and its liveness check.
STEP_TIMEOUT = 60
BOUNDS = {"KILL": 60.0, "STOP": STEP_TIMEOUT + 90.0}
BREAK_AT = 25


@dataclass(frozen=True)
class Check:
    """One line of the table; `passed` None where this machine cannot show it."""

    name: str
    expected: str
    observed: str
    passed: bool | None

    def __str__(self) -> str:
        status = {True: "PASS", False: "FAIL", None: "SKIP"}[self.passed]
        return f"{status}  {self.name:<26} {self.observed}  (expected: {self.expected})"


@dataclass(frozen=True)
class Bench:
    """What the checks run on. `counts`: bytes of collectives since it was last cleared."""

    world: World
    out: Path
    small: bool
    counts: Counter[str]

    @property
    def device(self) -> torch.device:
        return distributed.device(self.world)

    def overrides(self, *more: str) -> list[str]:
        samples = SAMPLES[self.small]
        base = [f"data.manifest={self.out}/latents/manifest.json", "wandb.mode=disabled", "ema.decays=[0.999]"]
        base += [f"train.global_batch_size={samples * self.world.size}", f"train.micro_batch_size={samples}"]
        return [*base, *(SMALL_NET if self.small else ("model.size=DiT-XL/2",)), *more]


def make_data(out: Path) -> None:
    """The 1,797 digits of scikit-learn as latent shards."""
    if not (out / "latents" / "manifest.json").exists():
        assert pack.main(["--source", "digits", "--out", f"{out}/images"]) == 0
        assert encode.main(["--images", f"{out}/images", "--out", f"{out}/latents", "--codec", "pixels"]) == 0


@contextmanager
def opened(bench: Bench, *overrides: str) -> Iterator[Callable[[], float]]:
    """A step on random latents of an engine, which gives this rank's share of the loss."""
    config = configs.load([], bench.overrides(*overrides)).config
    prepared = prepare(config, bench.world.size)
    layout, shape = prepared.layout, (1, 8, 8) if bench.small else (4, 32, 32)
    spec = build.model_spec(config, unseen(shape, 10 if bench.small else 1000))
    samples = layout.samples_per_micro_batch
    objective = build.method(spec)
    engine = Engine(config, build.net(spec, config.seed), objective, layout)
    generator = torch.Generator().manual_seed(bench.world.rank)
    x = 0.5 * torch.randn(samples, *shape, generator=generator)
    label, ordinal = torch.arange(samples) % 10, torch.arange(samples) + samples * bench.world.rank
    tensors = [tensor.to(bench.device) for tensor in (x, label, ordinal, torch.ones(samples // layout.particles))]
    try:
        yield lambda: float(engine.step([Batch(0, *tensors)], 1e-4).loss)
    finally:
        engine.close()


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    distributed.barrier()
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


# --- checks, all of them collective ---


def gloo(bench: Bench) -> Iterator[Check]:
    """The group over which ranks agree on checkpoints, and the others of the doctor's findings among ranks."""
    for finding in doctor.check_ranks(bench.world, str(bench.out)):
        yield Check(f"doctor: {finding.name}", "OK", finding.observation, finding.verdict == "OK")


def contexts(bench: Bench) -> Iterator[Check]:
    """A process on each GPU, after steps and saves with all their threads: no rank has a context on GPU 0 besides."""
    overrides = bench.overrides(f"run.dir={bench.out}/contexts", "train.max_steps=4", "train.checkpoint_every=2")
    assert train(configs.load([], [*overrides, *SMALL_NET]).config, bench.world) == "completed"
    processes = _processes() if bench.world.local_rank == 0 else None
    distributed.barrier()  # nobody leaves, and makes no context, while it is counted
    nodes = [counts for counts in distributed.gather_objects(processes, bench.world) if counts is not None]
    observed = "; ".join(", ".join(f"{n} on GPU {gpu}" for gpu, n in sorted(counts.items())) for counts in nodes)
    visible = all(nodes) and torch.cuda.is_available()
    passed = all(n == 1 for counts in nodes for n in counts.values()) if visible else None
    yield Check("contexts", "1 process on each GPU", observed if visible else "nvidia-smi shows none here", passed)


def _processes() -> dict[str, int]:
    """{GPU: processes on it} of this node; {} where that cannot be seen, as in some containers."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-compute-apps=gpu_bus_id,pid", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(Counter(line.split(",")[0].strip() for line in lines if line.strip()))


def reduction(bench: Bench) -> Iterator[Check]:
    """What 16 bits cost a sum of gradients over ranks, and what they save."""
    numel = 1 << (16 if bench.small else 27)
    generator = torch.Generator(bench.device).manual_seed(bench.world.rank)
    gradient = torch.randn(numel, device=bench.device, generator=generator)
    exact = gradient.double()
    dist.all_reduce(exact)
    errors, times = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        dist.all_reduce(gradient.to(dtype, copy=True))  # the first one sets up
        total = gradient.to(dtype, copy=True)
        times[dtype] = _seconds(lambda total=total: dist.all_reduce(total), bench.device)  # type: ignore[misc]
        errors[dtype] = float((total.double() - exact).norm() / exact.norm())
    low, high = errors[torch.bfloat16], errors[torch.float32]
    yield Check("reduction in fp32", "relative error <= 1e-6", f"{high:.1e}", high <= 1e-6)
    yield Check("reduction in bf16", "relative error 1e-4 to 2e-2", f"{low:.1e}", 1e-4 <= low <= 2e-2)
    ratio = times[torch.bfloat16] / times[torch.float32]
    yield Check("bf16 over fp32, time", "<= 0.7", f"{ratio:.2f}", None if bench.small else ratio <= 0.7)


def overlap(bench: Bench) -> Iterator[Check]:
    """Reducing beside the backward pass: not slower, and the same training."""
    precision = "fp32" if bench.small else "bf16"
    for stage in (1, 2):
        seconds: dict[bool, float] = {}
        losses: dict[bool, list[float]] = {}
        for on in (False, True):
            extra = f"zero.extra={{zero_optimization: {{overlap_comm: {str(on).lower()}}}}}"
            with opened(bench, f"zero.stage={stage}", f"precision={precision}", extra) as step:
                losses[on] = [step() for _ in range(3)]
                steps = 2 if bench.small else 10
                seconds[on] = _seconds(lambda step=step, n=steps: [step() for _ in range(n)], bench.device)  # type: ignore[misc]
        ratio, a, b = seconds[True] / seconds[False], torch.tensor(losses[True]), torch.tensor(losses[False])
        passed = None if bench.small else ratio <= 1.02
        yield Check(f"overlap, stage {stage}, time", "on over off <= 1.02", f"{ratio:.3f}", passed)
        # The same sums in another order, after two updates; under bf16 a rounding may fall the other way.
        bound, apart = (1e-5 if bench.small else 5e-3), float(((a - b) / b).abs().max())
        yield Check(f"overlap, stage {stage}, loss", f"apart by <= {bound:g}", f"{apart:.1e}", apart <= bound)


def stage3(bench: Bench) -> Iterator[Check]:
    """Two gathers of the weights and one reduce-scatter a step, both branches block by block."""
    with opened(bench, "zero.stage=3", "precision=fp32", "model.depth=8") as step:
        for _ in range(3):  # DeepSpeed learns the order of modules in the first steps
            step()
        bench.counts.clear()
        alone = _seconds(step, bench.device)
        sent = dict(bench.counts)
    net = configs.load([], bench.overrides("model.depth=8")).config
    weights = 4 * _parameters(net, bench.small)
    gathered, scattered = sent.get("gather", 0) / weights, sent.get("scatter", 0) / weights
    yield Check("stage 3, gathered", "<= 2.05 x the weights", f"{gathered:.2f}", 1.0 < gathered <= 2.05)
    yield Check("stage 3, scattered", "0.95 to 1.05 x the weights", f"{scattered:.2f}", 0.95 <= scattered <= 1.05)
    rate = (sent.get("gather", 0) + sent.get("scatter", 0)) / alone / 1e9
    yield Check("stage 3, GB/s a rank", "a figure", f"{rate:.1f}", None)


def _parameters(config: configs.Config, small: bool) -> int:
    from imm_scale.planner import flops

    shape, classes = ((1, 8, 8), 10) if small else ((4, 32, 32), 1000)
    return flops.parameters(build.model_spec(config, unseen(shape, classes)).net).total


CHECKS: Sequence[Callable[[Bench], Iterator[Check]]] = (gloo, contexts, reduction, overlap, stage3)


def run_checks(out: Path, small: bool) -> list[Check]:
    """All of them, after `prepare`, printed by rank 0 as they come."""
    counts = traffic.listen()
    world = distributed.detect()
    distributed.init(world)
    bench, checks = Bench(world, out, small, counts), []
    for check in CHECKS:
        for line in check(bench):
            checks.append(line)
            if world.is_main:
                print(line, flush=True)
    distributed.shutdown()
    return checks


# --- a rank that dies or hangs ---


def write_run(out: Path, small: bool) -> None:
    """DIR/run.yaml: a run long enough to be broken, on any number of ranks up to 16."""
    net = SMALL_NET if small else ("model.width=384", "model.depth=8", "model.heads=6")
    steps = ["train.max_steps=120", "train.checkpoint_every=10"] if small else ["train.max_steps=3000"]
    overrides = [f"data.manifest={out}/latents/manifest.json", f"run.dir={out}/run", "train.global_batch_size=64"]
    overrides += ["train.checkpoint_every=20", "train.log_every=1", f"train.step_timeout={STEP_TIMEOUT}"]
    overrides += ["wandb.mode=disabled", "train.keep_last=3"]
    make_data(out)
    (out / "run.yaml").write_text(configs.to_yaml(configs.load([], [*overrides, *net, *steps]).config))


def _pid_of(job: str, rank: int) -> int:
    """The process of a rank of this job, as its environment tells."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            argv = (folder / "cmdline").read_bytes().split(b"\0")
            env = dict(pair.split(b"=", 1) for pair in (folder / "environ").read_bytes().split(b"\0") if b"=" in pair)
        except OSError:
            continue  # it has ended, or is another's
        ids = (env.get(b"SLURM_JOB_ID", b"").decode(), env.get(b"SLURM_PROCID", b"").decode())
        if ids == (job, str(rank)) and b"imm_scale" in argv and b"python" in argv[0]:
            return int(folder.name)
    raise RuntimeError(f"rank {rank} of job {job} is not on this node")


def break_a_rank(out: Path, name: str) -> None:
    """Sends rank 1 SIGKILL or SIGSTOP once the run is at step 25, and notes how long the step of the job lasts then."""
    run_dir, job = str(out / "run"), os.environ["SLURM_JOB_ID"]
    while len(read_metrics(run_dir)) < BREAK_AT:
        time.sleep(0.5)
    os.kill(_pid_of(job, 1), signal.Signals[f"SIG{name}"])
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of the requeue that follows: there is a line to write yet
    while not History.load(run_dir, job).ended:
        time.sleep(0.1)
    (out / "broken.json").write_text(json.dumps({"signal": name, "seconds": time.monotonic() - began}))


def verdict(out: Path) -> list[Check]:
    """Of a broken run that has come to its end."""
    run_dir, broken = str(out / "run"), json.loads((out / "broken.json").read_text())
    starts = History.load(run_dir, os.environ["SLURM_JOB_ID"]).of_this_job
    outcomes = [str(start.outcome) for start in starts]
    steps = [record["step"] for record in read_metrics(run_dir)]
    bound, state = BOUNDS[broken["signal"]], read_status(run_dir).get("state")
    seconds, once = broken["seconds"], steps == list(range(1, len(steps) + 1))
    return [
        Check(f"SIG{broken['signal']}: the step ends", f"in {bound:.0f} s", f"{seconds:.1f} s", seconds <= bound),
        Check("the job is put back", "failed, completed", ", ".join(outcomes), outcomes == ["failed", "completed"]),
        Check("it went on from a commit", "step > 0", f"step {starts[-1].step}", starts[-1].step > 0),
        Check("every step is there once", "1 to the last", f"{len(steps)} records", once),
        Check("the run", "completed", str(state), state == "completed"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("checks", "prepare", "break", "verdict"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=("small", "full"), default="full")
    parser.add_argument("--signal", choices=tuple(BOUNDS), default="KILL")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.command == "checks":
        checks = run_checks(args.out, args.size == "small")
    elif args.command == "verdict":
        checks = verdict(args.out)
        print("\n".join(map(str, checks)), flush=True)
    else:
        checks = []
        write_run(args.out, args.size == "small") if args.command == "prepare" else break_a_rank(args.out, args.signal)
    return int(any(check.passed is False for check in checks))


if __name__ == "__main__":
    sys.exit(main())
