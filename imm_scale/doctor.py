"""`imm-scale doctor`: whether this machine, or these ranks, can train, and what to do where they cannot."""

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from imm_scale import storage
from imm_scale.errors import UserError
from imm_scale.parallel import network
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World

Verdict = Literal["OK", "WARN", "FAIL"]

_PATIENCE = 120.0  # seconds for ranks to find each other
_SKEW_SECONDS = 2.0
_OPEN_FILES, _SHARED_MEMORY, _DISK_WARN, _DISK_FAIL = 4096, 1 << 30, 50 << 30, 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do where it is not as it should be."""

    verdict: Verdict
    name: str
    observation: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"\n      -> {self.remedy}" if self.remedy and self.verdict != "OK" else ""
        return f"{self.verdict:<5} {self.name:<14} {self.observation}{remedy}"


def _judge(good: bool, name: str, observation: str, remedy: str, otherwise: Verdict = "WARN") -> Finding:
    return Finding("OK" if good else otherwise, name, observation, remedy)


def check_software() -> list[Finding]:
    """torch, CUDA, NCCL, compiler, DeepSpeed."""
    has_gpus = os.path.exists("/dev/nvidiactl") or shutil.which("nvidia-smi") is not None
    cuda = torch.cuda.is_available()
    findings = [Finding("OK", "torch", f"{torch.__version__}, Python {platform.python_version()}")]
    if cuda:
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        devices = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}"
        findings.append(Finding("OK", "CUDA", devices))
        findings.append(Finding("OK", "NCCL", ".".join(map(str, torch.cuda.nccl.version()))))
    else:
        remedy = "install the CUDA build of torch for this driver, and check CUDA_VISIBLE_DEVICES"
        observation = "no GPU that torch can use: training runs on CPU, over gloo"
        findings.append(_judge(not has_gpus, "CUDA", observation, remedy, "FAIL"))
    compiler = shutil.which("c++") or shutil.which("g++")
    remedy = "train.compile=true on CPU needs a C++ compiler: install g++, or leave it off"
    findings.append(_judge(compiler is not None, "compiler", compiler or "no C++ compiler", remedy))
    return [*findings, _deepspeed(cuda)]


def _deepspeed(cuda: bool) -> Finding:
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return Finding("FAIL", "deepspeed", "not installed", "pip install -c constraints.txt -e .")
    nvcc = shutil.which("nvcc") or (os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc"))
    builds = not cuda or os.path.exists(nvcc)
    observation = f"{version}, " + (
        "no CUDA ops to build" if not cuda else nvcc if builds else "no nvcc to build its ops with"
    )
    remedy = "its fused ops are built at first use: load a CUDA module that sets CUDA_HOME and matches torch's CUDA"
    return _judge(builds, "deepspeed", observation, remedy)


def check_limits() -> list[Finding]:
    """What the system allows a process."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    remedy = f"ulimit -n {_OPEN_FILES} in the job script: a rank keeps shards, sockets and logs open"
    findings = [_judge(files >= _OPEN_FILES, "open files", str(files), remedy)]
    if os.path.isdir("/dev/shm"):
        space = shutil.disk_usage("/dev/shm").total
        remedy = "NCCL and torch talk through /dev/shm: give the container more (docker run --shm-size 8g)"
        findings.append(_judge(space >= _SHARED_MEMORY, "/dev/shm", f"{space / 2**30:.1f} GiB", remedy))
    threads = os.environ.get("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    remedy = "export OMP_NUM_THREADS=1 where several ranks share a node's cores"
    observation = f"{cores} cores for this rank, OMP_NUM_THREADS {threads or 'not set'}"
    findings.append(_judge(threads is not None or cores == 1, "threads", observation, remedy))
    return findings


def check_folder(folder: str, name: str) -> list[Finding]:
    """Writes, renames, reads and removes a file as a run does; and compares the clocks."""
    url = storage.join(folder, f".doctor-{uuid.uuid4().hex}")
    try:
        storage.make_folder(folder)
        began = time.perf_counter()
        now, text = time.time(), uuid.uuid4().hex
        storage.write_text(url, text)  # a temporary file and a rename, or one put
        same = storage.read_text(url) == text
        seconds = time.perf_counter() - began
        skew = abs(os.stat(storage.local_path(url)).st_mtime - now) if storage.is_local(url) else 0.0
        storage.remove(url)
    except (OSError, UserError) as error:
        remedy = "make it writable, name another, or check the credentials (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...)"
        return [Finding("FAIL", name, f"{storage.shown(folder)}: {error}", remedy)]
    shown = f"{storage.shown(folder)}: written, renamed and read in {seconds * 1000:.0f} ms"
    remedy = "it gives back something else than was written: do not train here"
    findings = [_judge(same, name, shown, remedy, "FAIL")]
    if storage.is_local(folder):
        remedy = "set the clocks (chronyd or ntpd): logs and the end of a job are told by them"
        observation = f"the file system's clock is {skew:.1f} s off this machine's"
        findings.append(_judge(skew < _SKEW_SECONDS, "clock", observation, remedy))
        findings.append(_disk(storage.local_path(folder)))
    return findings


def _disk(path: str) -> Finding:
    free = shutil.disk_usage(path).free
    remedy = "a checkpoint is 12 bytes x parameters and 4 more for each average, and train.keep_last are kept"
    verdict: Verdict = "FAIL" if free < _DISK_FAIL else "WARN" if free < _DISK_WARN else "OK"
    return Finding(verdict, "disk", f"{free / 2**30:.0f} GiB free in {path}", remedy)


def check_ranks(world: World, folder: str) -> list[Finding]:
    """An all-reduce, gloo, the clocks, and whether each rank sees in the folder what the others write. A collective."""
    try:
        distributed.init(world, patience=_PATIENCE)
        seconds = _all_reduce(distributed.device(world), world.size)
    except (RuntimeError, UserError) as error:
        remedy = f"check that the ranks' hosts reach each other (MASTER_ADDR, firewalls); {_naming_an_interface()}"
        return [Finding("FAIL", "all-reduce", f"{world.size} ranks: {error}", remedy)]
    findings = [Finding("OK", "all-reduce", f"{world.size} ranks in {seconds * 1000:.0f} ms"), _gloo(world)]
    distributed.barrier()
    clocks = distributed.gather_objects(time.time(), world)
    skew = max(clocks) - min(clocks)
    remedy = "set the clocks of the nodes (chronyd or ntpd)"
    findings.append(_judge(skew < _SKEW_SECONDS, "ranks' clocks", f"within {skew:.1f} s", remedy))
    if storage.is_local(folder):
        findings.append(_shared(world, folder))
    return findings


def _gloo(world: World) -> Finding:
    """The group over which ranks agree on checkpoints, beside NCCL's where there are GPUs. A collective."""
    began, problem = time.perf_counter(), ""
    try:
        group = distributed.group_beside(timedelta(seconds=_PATIENCE))
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        problem = str(error)
    seconds = time.perf_counter() - began
    problem = distributed.problems(problem, distributed.device(world))
    mine = os.environ.get(network.GLOO, "the address of this machine's name")
    over = ", ".join(sorted(set(distributed.gather_objects(mine, world))))
    observation = f"{world.size} ranks over {over}" + (f": {problem}" if problem else f" in {seconds * 1000:.0f} ms")
    return _judge(not problem, "gloo", observation, _naming_an_interface(), "FAIL")


def _naming_an_interface() -> str:
    return (
        f"name the interface that the nodes share, {network.GLOO}=NAME (and {network.NCCL}, for NCCL) under the site's "
        f"`environment`; here are {network.describe()}"
    )


def _all_reduce(device: torch.device, size: int) -> float:
    """Seconds it takes, once warm. Raises RuntimeError for a wrong sum."""
    for _ in range(2):
        began = time.perf_counter()
        total = distributed.all_sum(torch.ones(1 << 16, device=device))
        if float(total[-1]) != size:
            raise RuntimeError(f"the sum of {size} ones came out as {float(total[-1])}")
    return time.perf_counter() - began


def _shared(world: World, folder: str) -> Finding:
    name = f".doctor-{distributed.gather_objects(uuid.uuid4().hex, world)[0]}-"
    ours = storage.join(folder, f"{name}{world.rank}")
    problem = distributed.error_of(lambda: storage.write_text(ours, ""))
    distributed.barrier()  # outside of what may fail, so that no rank waits for one that could not write
    seen = sum(entry.startswith(name) for entry in storage.list_names(folder))
    distributed.barrier()
    problem = problem or distributed.error_of(lambda: storage.remove(ours))
    observation = problem or f"{seen} of {world.size} ranks' files seen"
    remedy = "the run folder must lie on a file system that all nodes share, or in an object store"
    return _judge(seen == world.size and not problem, "shared folder", observation, remedy, "FAIL")


def check_two_local_ranks(folder: str) -> list[Finding]:
    """The same on this machine alone, by two processes of this module; over gloo where there is one GPU for both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    if torch.cuda.device_count() == 1:  # NCCL refuses two ranks on it
        common["CUDA_VISIBLE_DEVICES"] = ""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "imm_scale.doctor", folder],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=2 * _PATIENCE) for rank in ranks]
    except subprocess.TimeoutExpired:
        outputs = [("", "no answer")]
    finally:
        for rank in ranks:
            rank.kill()
    if all(rank.returncode == 0 for rank in ranks):
        return [Finding("OK", *line.split("\t")) for line in outputs[0][0].splitlines() if "\t" in line]
    last = outputs[0][1].strip().splitlines()[-1:]
    observation = f"two processes on this machine do not reach each other: {(*last, outputs[0][0].strip())[0]}"
    return [Finding("FAIL", "all-reduce", observation, f"check MASTER_ADDR and firewalls; {_naming_an_interface()}")]


def examine(folder: str, url: str | None, world: World) -> bool:
    """Prints a line for everything looked at, rank 0's all and of the other ranks what is not OK.

    Args:
        folder: where run folders lie.
        url: a folder in an object store that runs read or write, or None.

    Returns:
        Whether nothing failed on any rank.
    """
    checks: Sequence[Callable[[], list[Finding]]] = (
        check_software,
        check_limits,
        lambda: check_folder(folder, "run folder"),
        lambda: check_folder(url, "object store") if url is not None else [],
    )
    findings = [finding for check in checks for finding in check()]
    if world.is_main:
        print("\n".join(map(str, findings)), flush=True)
    if world.size == 1:
        more = check_two_local_ranks(folder)
        print("".join(f"{finding}\n" for finding in more), end="", flush=True)
        return not _failed([*findings, *more])
    more = check_ranks(world, folder)
    if world.is_main:
        print("\n".join(map(str, more)), flush=True)
    if _failed(more):  # they may not reach each other: nothing is gathered
        return False
    everyone = distributed.gather_objects((distributed.hostname(), findings), world)
    if world.is_main:
        for rank, (host, theirs) in enumerate(everyone):
            bad = [finding for finding in theirs if finding.verdict != "OK" and rank > 0]
            print("".join(f"rank {rank} ({host}): {finding}\n" for finding in bad), end="", flush=True)
    return not any(_failed(theirs) for _, theirs in everyone)


def _failed(findings: Sequence[Finding]) -> bool:
    return any(finding.verdict == "FAIL" for finding in findings)


def _as_one_of_two(folder: str) -> int:
    """What `check_two_local_ranks` starts."""
    world = distributed.detect()
    findings = [finding for finding in check_ranks(world, folder) if finding.name in ("all-reduce", "gloo")]
    print("\n".join(f"{finding.name}\t{finding.observation}" for finding in findings))
    distributed.shutdown()
    return int(_failed(findings))


if __name__ == "__main__":
    sys.exit(_as_one_of_two(sys.argv[1]))
