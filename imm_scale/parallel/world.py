"""Ranks and the few things they say to each other."""

import os
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from imm_scale import devices
from imm_scale.errors import UserError
from imm_scale.parallel import network

Result = TypeVar("Result")
PATIENCE_SECONDS = 1800.0  # of a collective outside of training
SAVER_GROUP = "saver"  # description of the process group over which ranks agree on checkpoints, beside training
_FLIGHT_RECORDER = "TORCH_FR_BUFFER_SIZE"  # collectives torch remembers, for the watchdog to name the last one
_HEARTBEAT = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"  # after which torch ends a process whose NCCL thread is stuck
_HEARTBEAT_MARGIN = 600.0  # it comes last, for it says least; torch's own 480 s would come first


@dataclass(frozen=True)
class World:
    """Where this process stands among its peers."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and speaks for all."""
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
    """This rank's GPU, the only one it sees or the one of its number on the node; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0 if torch.cuda.device_count() == 1 else world.local_rank)


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


def init(world: World, env: Mapping[str, str] = os.environ, patience: float = PATIENCE_SECONDS) -> None:
    """Starts torch's process group: NCCL on GPUs, gloo on CPU; a world of one needs no network.

    Args:
        patience: seconds after which a collective, or meeting the other ranks, is given up.
    """
    if dist.is_initialized():
        return
    os.environ.setdefault(_FLIGHT_RECORDER, "2000")
    os.environ.setdefault(_HEARTBEAT, f"{patience + _HEARTBEAT_MARGIN:.0f}")
    options: dict[str, Any] = {"backend": "gloo", "timeout": timedelta(seconds=patience)}
    if torch.cuda.is_available():
        here = device(world)
        devices.use_device(here)
        os.environ["LOCAL_RANK"] = str(here.index)  # deepspeed takes its GPU from there
        # Without it torch guesses the GPU, and meets an NCCL that cannot start in the first collective only.
        options |= {"backend": "nccl"} | ({"device_id": here} if world.size > 1 else {})
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # and insists on it everywhere
    if world.size == 1:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, **options)
        return
    host, port = _rendezvous(env)
    # By each rank for itself: names differ from node to node, and a container need not have `ip` to ask.
    interface = network.gloo_interface([host, *env.get("HOSTS", "").split()], env)
    if interface is not None:
        os.environ[network.GLOO] = interface
    dist.init_process_group(init_method=f"tcp://{host}:{port}", rank=world.rank, world_size=world.size, **options)


def group_beside(patience: timedelta) -> dist.ProcessGroup:
    """All ranks over gloo, for what a thread of each has to agree on while training goes on; all ranks call it."""
    return dist.new_group(backend="gloo", timeout=patience, group_desc=SAVER_GROUP)


def shutdown() -> None:
    """Ends torch's process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Waits for all ranks; nothing in a world of one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def all_sum(values: Tensor) -> Tensor:
    """The sum over ranks, in place, of a tensor that has one shape on all of them."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        if dist.get_backend() == "nccl" and values.device.type == "cpu":  # NCCL sums on GPUs only
            there = values.cuda()
            dist.all_reduce(there)
            values.copy_(there)
        else:
            dist.all_reduce(values)
    return values


def gather_objects(mine: Any, world: World) -> list[Any]:
    """What every rank gives, rank by rank: small Python values, exchanged once at start."""
    everyone: list[Any] = [mine] * world.size
    if world.size > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


def from_main(action: Callable[[], Result], world: World) -> Result:
    """What an action of rank 0 returns, on every rank: a small Python value. The other ranks do not act.

    Raises:
        UserError: on every rank, where rank 0's action raised it or an OSError.
    """
    answer: list[Result] = []
    problem = error_of(lambda: answer.append(action())) if world.is_main else ""
    answer, problem = gather_objects((answer, problem), world)[0]
    if problem:
        raise UserError(problem)
    return answer[0]


def all_agree(here: bool, where: torch.device) -> bool:
    """Whether it is true on every rank."""
    votes = torch.tensor(0 if here else 1, dtype=torch.int32, device=where)
    return int(all_sum(votes)) == 0


def problems(here: str, where: torch.device, group: dist.ProcessGroup | None = None) -> str:
    """What went wrong on which ranks, "" where all of them say ""; the same on every rank.

    Args:
        here: this rank's word.
        group: the ranks to ask, in place of all.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        return here
    votes = torch.tensor(int(bool(here)), dtype=torch.int32, device=where)
    dist.all_reduce(votes, group=group)
    if not votes.item():
        return ""
    messages: list[str] = [""] * size
    dist.all_gather_object(messages, here, group=group)
    return "; ".join(f"{message} (rank {rank})" for rank, message in enumerate(messages) if message)


def error_of(action: Callable[[], None]) -> str:
    """Does something with files; what kept it from working, or ""."""
    try:
        action()
    except (OSError, UserError) as error:
        return str(error) or type(error).__name__
    return ""


def all_ranks_or_raise(action: Callable[[], None], where: torch.device, what: str, remedy: str) -> None:
    """Does something with files on every rank, and goes on only when it worked on all of them.

    Raises:
        UserError: on every rank, when it failed on any.
    """
    problem = problems(error_of(action), where)
    if problem:
        raise UserError(f"cannot {what}: {problem}; {remedy}")


def hostname() -> str:
    """Name of this node."""
    return socket.gethostname()
