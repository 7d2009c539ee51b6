"""Which shards a process encodes: alone, as a rank of torchrun or srun, or as a task of a SLURM array."""

from collections.abc import Mapping
from dataclasses import dataclass

from data_tools.common import read_json
from imm_scale import storage
from imm_scale.errors import UserError
from imm_scale.parallel import world as distributed

TASKS_NAME = "tasks.json"


@dataclass(frozen=True)
class Tasks:
    """This process is number `index` of `count`; shard i belongs to number i mod count."""

    index: int = 0
    count: int = 1

    def owns(self, shard: int) -> bool:
        """Whether this task encodes the shard."""
        return shard % self.count == self.index


def check(task_index: int | None, num_tasks: int | None) -> None:
    """Raises UserError for one without the other, or a task outside."""
    if (task_index is None) != (num_tasks is None):
        raise UserError("--task-index and --num-tasks belong together: give both or neither")
    if task_index is not None and num_tasks is not None and not 0 <= task_index < num_tasks:
        raise UserError(f"--task-index {task_index} is outside --num-tasks {num_tasks}: 0 to {num_tasks - 1}")


def find(out: str, task_index: int | None, num_tasks: int | None, env: Mapping[str, str]) -> Tasks:
    """The tasks of the command line, else of a SLURM array, else one; each may be torchrun or srun of several ranks.

    The first task of an array writes the number of tasks to OUT/tasks.json, and it holds for all that follow: an array
    of only those that failed has another SLURM_ARRAY_TASK_COUNT, but its indices still mean the shards they meant.

    Raises:
        UserError: a number of tasks that contradicts the recorded one, or indices outside it.
    """
    check(task_index, num_tasks)
    if task_index is not None and num_tasks is not None:
        array = _agree_on_arguments(out, Tasks(task_index, num_tasks))
    elif "SLURM_ARRAY_TASK_ID" in env:
        array = _agree_on_array(out, env)
    else:
        array = Tasks()
    world = distributed.detect(env)
    return Tasks(array.index * world.size + world.rank, array.count * world.size)


def _agree_on_arguments(out: str, tasks: Tasks) -> Tasks:
    first, count = _recorded(out, 0, tasks.count)
    if (first, count) != (0, tasks.count):
        raise UserError(
            f"--num-tasks {tasks.count}, but {storage.join(out, TASKS_NAME)} says that {out} is shared by {count} "
            f"tasks numbered from {first}: give the same number, leave both options out to do all that is missing, or "
            "remove that file to share it anew"
        )
    return tasks


def _agree_on_array(out: str, env: Mapping[str, str]) -> Tasks:
    try:
        number, count = int(env["SLURM_ARRAY_TASK_ID"]), int(env["SLURM_ARRAY_TASK_COUNT"])
        least, most = int(env.get("SLURM_ARRAY_TASK_MIN", 0)), int(env.get("SLURM_ARRAY_TASK_MAX", count - 1))
    except (KeyError, ValueError) as error:
        raise UserError(f"SLURM_ARRAY_TASK_ID and _COUNT must be numbers ({error}): give --task-index") from error
    if not storage.exists(storage.join(out, TASKS_NAME)) and most - least + 1 != count:
        raise UserError(
            f"the first array on {out} has the tasks {least} to {most} with gaps (SLURM_ARRAY_TASK_COUNT {count}): "
            "submit a whole one (--array=0-63), or give --task-index and --num-tasks"
        )
    first, total = _recorded(out, least, count)
    if not first <= number < first + total:
        raise UserError(
            f"SLURM_ARRAY_TASK_ID {number} is none of the tasks {first} to {first + total - 1} that share {out}, as "
            f"{storage.join(out, TASKS_NAME)} says: submit those, or remove that file to share it anew"
        )
    if (first, total) != (least, count):
        print(f"task {number - first} of the {total} that share {out}; this array has {count} of them")
    return Tasks(number - first, total)


def _recorded(out: str, first: int, count: int) -> tuple[int, int]:
    """First index and number of tasks as recorded in the output; these are recorded where nothing is."""
    url = storage.join(out, TASKS_NAME)
    storage.create_bytes(url, f'{{"count": {count}, "first": {first}}}\n'.encode())
    document = read_json(url)
    try:
        return int(document["first"]), int(document["count"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{url} lacks first or count ({error}): remove it") from error
