"""Watching a run: every checkpoint once, in order, as it comes, to the end."""

import shutil
import threading
import time
from pathlib import Path

import pytest

from imm_scale import cli
from imm_scale.checkpoint import format as checkpoints
from imm_scale.checkpoint import run_folder
from imm_scale.config.schema import Config, RunConfig
from imm_scale.evaluation.records import read_evaluations
from imm_scale.evaluation.watch import watch
from imm_scale.parallel.world import World
from imm_scale.sampling.source import Source
from tests import ranks

ALONE = World()


def _commit(run_dir: Path, step: int) -> None:
    url = Path(checkpoints.folder(str(run_dir), step))
    url.mkdir(parents=True)
    (url / checkpoints.COMMITTED).write_text("{}")


def _watch(run_dir: Path, events, prepare=None) -> tuple[list[int], list[int], list[str]]:
    """Steps returned, steps in the order measured, and what was said; each pause lets the next event happen."""
    measured: list[int] = []
    messages: list[str] = []
    waiting = iter(events)

    def ready(source: Source):
        return lambda: measured.append(source.step)

    config = Config(run=RunConfig(dir=str(run_dir)))
    done = watch(config, ALONE, prepare or ready, messages.append, poll=0.1, pause=lambda _: next(waiting)())
    return done, measured, messages


def test_checkpoints_are_measured_as_they_come(tmp_path):
    def status(state: str):
        return lambda: run_folder.write_status(str(tmp_path), state, step=0)

    _commit(tmp_path, 10)
    _commit(tmp_path, 20)
    events = [
        status("running"),
        lambda: _commit(tmp_path, 30),
        status("preempted"),  # not the end
        lambda: (_commit(tmp_path, 40), status("completed")()),
    ]
    done, measured, messages = _watch(tmp_path, events)
    assert done == measured == [10, 20, 30, 40]
    assert messages[-1].endswith("is completed: 4 checkpoints measured")


def test_a_failed_run_ends_it_when_all_are_done(tmp_path):
    run_folder.write_status(str(tmp_path), "failed", step=10)
    _commit(tmp_path, 10)
    assert _watch(tmp_path, [])[0] == [10]


def test_a_checkpoint_removed_before_its_turn_is_passed_over(tmp_path):
    run_folder.write_status(str(tmp_path), "completed", step=20)
    _commit(tmp_path, 10)
    _commit(tmp_path, 20)

    def prepare(source: Source):
        if source.step == 10:
            shutil.rmtree(checkpoints.folder(str(tmp_path), 10))
            raise checkpoints.DamagedCheckpointError("gone")
        return lambda: None

    done, _, messages = _watch(tmp_path, [], prepare)
    assert done == [20]
    assert "step 10 was removed" in messages[0]


def test_a_damaged_one_that_is_still_there_is_an_error(tmp_path):
    run_folder.write_status(str(tmp_path), "completed", step=10)
    _commit(tmp_path, 10)

    def prepare(source: Source):
        raise checkpoints.DamagedCheckpointError("bits are wrong")

    with pytest.raises(checkpoints.DamagedCheckpointError, match="bits are wrong"):
        _watch(tmp_path, [], prepare)


def test_weights_that_nobody_will_train_on_are_not_waited_for(tmp_path, capsys):
    (tmp_path / "weights.safetensors").touch()
    assert cli.main(["evaluate", str(tmp_path / "weights.safetensors"), "--watch"]) == 2
    assert "holds weights; leave --watch out" in capsys.readouterr().err


def test_the_command_follows_a_live_run(tiny, tmp_path):
    """A watching job on 2 ranks starts before the run does, measures its three checkpoints, and ends with it."""
    run_dir = str(tmp_path / "run")
    argv = ["evaluate", run_dir, "--watch", "--poll", "0.1", "--steps", "1", "--repeats", "1", "--num", "64"]
    watching = ranks.start(ranks.command_and_output, 2, *argv)
    training = threading.Thread(
        target=ranks.train, args=(1, *tiny, "train.max_steps=6", "train.checkpoint_every=2", "train.keep_last=9")
    )
    time.sleep(0.5)
    training.start()
    (code, output), _ = ranks.join(watching)
    training.join()
    assert code == 0, output
    assert "waiting for" in output
    assert [evaluation["step"] for evaluation in read_evaluations(run_dir)] == [2, 4, 6]
    assert "is completed: 3 checkpoints measured" in output
