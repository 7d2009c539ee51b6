"""Where ranks come from."""

import pytest

from imm_scale.distributed import World, detect
from imm_scale.errors import UserError

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
