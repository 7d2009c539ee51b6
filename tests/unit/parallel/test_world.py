"""Where ranks come from."""

import pytest
import torch

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
