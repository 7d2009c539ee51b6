"""Where ranks come from."""

import os
from typing import Any

import pytest
import torch

from imm_scale import devices
from imm_scale.errors import UserError
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World, detect

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
BATCH_SCRIPT = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "17"}


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, World(0, 1, 0)),
        (TORCHRUN, World(5, 8, 1)),
        (SRUN, World(3, 4, 1)),
        ({**SRUN, **TORCHRUN}, World(5, 8, 1)),
        (BATCH_SCRIPT, World(0, 1, 0)),
        ({"LOCAL_RANK": "0"}, World(0, 1, 0)),
    ],
    ids=["nothing", "torchrun", "srun", "torchrun inside srun", "plain batch script", "local rank alone"],
)
def test_ranks_are_found(env, world):
    assert detect(env) == world


def test_nonsense_is_refused():
    with pytest.raises(UserError, match="must be numbers"):
        detect({"RANK": "first", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(8, 5, 5), (1, 5, 0), (1, 0, 0)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_it_sees(visible, local_rank, index, monkeypatch):
    """srun --gpus-per-task 1 shows each rank one GPU, torchrun shows it all of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    world = distributed.World(rank=local_rank, size=8, local_rank=local_rank)
    assert distributed.device(world) == torch.device("cuda", index)


def test_a_thread_gets_its_gpu_and_nothing_on_cpu(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    devices.use_device(torch.device("cpu"))
    devices.use_device(torch.device("cuda", 3))
    assert taken == [torch.device("cuda", 3)]


@pytest.fixture
def started(monkeypatch):
    """Calls of init_process_group, in an environment of their own."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda **options: calls.append(options))
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)  # whatever ran in this process before
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name in ("LOCAL_RANK", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return calls


MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("gpu", "size", "expected"), [(True, 16, torch.device("cuda", 3)), (True, 1, None), (False, 16, None)]
)
def test_nccl_is_told_its_gpu_where_there_are_peers(gpu, size, expected, started, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    distributed.init(World(11 if size > 1 else 0, size, 3 if size > 1 else 0), MASTER)
    assert started[0].get("device_id") == expected


@pytest.mark.parametrize("patience", [120.0, 3600.0, 20000.0])
def test_torchs_heartbeat_comes_after_its_timeout_of_a_collective(patience, started):
    distributed.init(World(1, 2, 1), MASTER, patience=patience)
    assert int(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > started[0]["timeout"].total_seconds() == patience


def test_a_heartbeat_that_the_site_has_set_stays(started):
    os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] = "77"
    distributed.init(World(1, 2, 1), MASTER)
    assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "77"
