import json
from pathlib import Path

import pytest

from data_tools import tasks
from data_tools.tasks import Tasks
from imm_scale.errors import UserError


def _array(number: int, count: int, least: int = 0, most: int | None = None) -> dict[str, str]:
    values = {"ID": number, "COUNT": count, "MIN": least, "MAX": least + count - 1 if most is None else most}
    return {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in values.items()}


def _find(out: Path, env: dict[str, str] | None = None, index: int | None = None, count: int | None = None) -> Tasks:
    return tasks.find(str(out), index, count, env or {})


def test_alone_and_under_torchrun_nothing_is_recorded(tmp_path: Path) -> None:
    assert _find(tmp_path) == Tasks(0, 1)
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert _find(tmp_path, env) == Tasks(3, 4)
    assert not list(tmp_path.iterdir())


def test_an_array_is_recorded_and_its_failed_tasks_keep_their_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _find(tmp_path, _array(5, 64)) == Tasks(5, 64)
    assert json.loads((tmp_path / "tasks.json").read_text()) == {"count": 64, "first": 0}
    again = _array(17, 2, least=7, most=17)  # sbatch --array=7,17
    assert _find(tmp_path, again) == Tasks(17, 64)
    assert "task 17 of the 64 that share" in capsys.readouterr().out
    with pytest.raises(UserError, match="SLURM_ARRAY_TASK_ID 64 is none of the tasks 0 to 63"):
        _find(tmp_path, _array(64, 128))
    with pytest.raises(UserError, match=r"--num-tasks 2, but .*tasks\.json says .* shared by 64"):
        _find(tmp_path, {}, 0, 2)
    assert _find(tmp_path) == Tasks(0, 1), "alone it does all that is missing"


def test_an_array_may_begin_at_one(tmp_path: Path) -> None:
    assert _find(tmp_path, _array(1, 8, least=1)) == Tasks(0, 8)
    assert _find(tmp_path, _array(8, 1, least=8)) == Tasks(7, 8)


def test_a_first_array_with_gaps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="with gaps"):
        _find(tmp_path, _array(7, 2, least=7, most=17))
    assert not list(tmp_path.iterdir())


def test_an_array_of_torchruns_divides_further(tmp_path: Path) -> None:
    env = {**_array(2, 4), "RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert _find(tmp_path, env) == Tasks(17, 32)


@pytest.mark.parametrize("number", [0, 3])
def test_every_shard_has_one_owner(number: int) -> None:
    for count in (1, 3, 64, 100):
        owners = [sum(Tasks(i, count).owns(shard) for i in range(count)) for shard in range(70 + number)]
        assert owners == [1] * (70 + number)
