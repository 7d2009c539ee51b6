"""Ranks and the few things they say to each other."""

import os
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from imm_scale.errors import UserError

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """Where this process stands among its peers."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def detect(env: Mapping[str, str] = os.environ) -> World:
    """Rank and size as torchrun and deepspeed set them (RANK, ...), or srun (SLURM_PROCID, ...), or a world of one.

    SLURM_NTASKS is no sign of ranks: a plain batch script has it too. Raises UserError for half-set variables.
    """
    for names in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        values = [env.get(name) for name in names]
        if values[0] is None or values[1] is None:
            continue
        try:
            rank, size, local_rank = int(values[0]), int(values[1]), int(values[2] or 0)
        except ValueError as error:
            raise UserError(f"{', '.join(names)} must be numbers, got {values}") from error
        return World(rank, size, local_rank)
    return World()


def device(world: World) -> torch.device:
    return torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def _rendezvous(env: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of rank 0. Under srun they follow from the job; MASTER_ADDR and MASTER_PORT override them."""
    host, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if host is None and "SLURM_STEP_NODELIST" in env:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
        )
        host = listed.stdout.split()[0]
    if port is None and "SLURM_JOB_ID" in env:
        port = str(20000 + (int(env["SLURM_JOB_ID"]) * 64 + int(env.get("SLURM_STEP_ID", 0)) % 64) % 40000)
    if host is None or port is None:
        raise UserError("more than one rank needs MASTER_ADDR and MASTER_PORT: start with torchrun, deepspeed or srun")
    return host, int(port)


def init(world: World, env: Mapping[str, str] = os.environ) -> None:
    """Starts torch's process group: NCCL on GPUs, gloo on CPU; a world of one needs no network."""
    if dist.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # deepspeed insists on it
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_TIMEOUT)
        return
    host, port = _rendezvous(env)
    dist.init_process_group(
        backend, init_method=f"tcp://{host}:{port}", rank=world.rank, world_size=world.size, timeout=_TIMEOUT
    )


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def all_sum(values: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        if dist.get_backend() == "nccl" and values.device.type == "cpu":  # NCCL sums on GPUs only
            there = values.cuda()
            dist.all_reduce(there)
            values.copy_(there)
        else:
            dist.all_reduce(values)
    return values


def sum_counts(counts: dict[str, int], where: torch.device) -> dict[str, int]:
    """The counts of all ranks together; a collective with the same names on every rank."""
    total = all_sum(torch.tensor(list(counts.values()), dtype=torch.int64, device=where))
    return dict(zip(counts, total.tolist(), strict=True))


def all_agree(here: bool, where: torch.device) -> bool:
    """Whether it is true on every rank."""
    votes = torch.tensor(0 if here else 1, dtype=torch.int32, device=where)
    return int(all_sum(votes)) == 0


def together(action: Callable[[], None], where: torch.device, what: str, remedy: str) -> None:
    """Does something with files on every rank, and goes on only when it worked on all of them.

    Raises:
        UserError: on every rank, when it failed with an OSError on any.
    """
    problem = "it failed on another rank"
    worked = True
    try:
        action()
    except OSError as error:
        worked, problem = False, str(error)
    if not all_agree(worked, where):
        raise UserError(f"cannot {what}: {problem}; {remedy}")


def hostname() -> str:
    return socket.gethostname()
