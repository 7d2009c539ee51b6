"""A run that is killed again and again, at any moment, ends as if it had been left alone."""

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from imm_scale.checkpoint import format as checkpoints
from imm_scale.checkpoint.format import Checkpoint
from imm_scale.checkpoint.run_folder import read_metrics, read_status
from tests import ranks
from tests.conftest import TINY

SOAK = int(os.environ.get("IMM_SOAK", "1"))  # as `make soak` sets it
KILLS, TERMS = 10 * SOAK, 4 * SOAK
STEPS_PER_LIFE = 6
BOUND = 120.0  # seconds in which a process must come to where it is waited for, on a machine that does more


def _settings(digits: str, run_dir: Path, steps: int) -> list[str]:
    steps_and_saves = [f"train.max_steps={steps}", "train.checkpoint_every=3", "zero.stage=1", "train.log_every=1"]
    return ["train", *TINY, f"data.manifest={digits}", f"run.dir={run_dir}", *steps_and_saves]


class _Life:
    """One start of the run on two ranks, from its last commit to its end."""

    def __init__(self, run_dir: Path, settings: list[str]):
        self._metrics = run_dir / "metrics.jsonl"
        self._run_dir = run_dir
        self._file_before = self._metrics.stat().st_ino if self._metrics.exists() else None
        self._from = (checkpoints.committed_steps(str(run_dir)) or [0])[-1]
        self._started = ranks.start(ranks.command, 2, *settings)
        self.processes: list[BaseProcess] = [process for process, _ in self._started]

    def steps(self) -> int:
        """Steps this life has logged: it makes the file anew, cut back to the commit."""
        if not self._metrics.exists() or self._metrics.stat().st_ino == self._file_before:
            return 0
        records = read_metrics(str(self._run_dir))
        return records[-1]["step"] - self._from if records else 0

    def wait_for(self, steps: int) -> None:
        deadline = time.monotonic() + BOUND
        while self.steps() < steps and all(process.is_alive() for process in self.processes):
            assert time.monotonic() < deadline, f"{steps} steps were not reached"
            time.sleep(0.01)

    def wait_for_a_save(self) -> None:
        """Until a checkpoint is being written."""
        deadline = time.monotonic() + BOUND
        while not checkpoints.uncommitted_steps(str(self._run_dir)) or self.steps() == 0:
            assert time.monotonic() < deadline and all(process.is_alive() for process in self.processes)
            time.sleep(0.001)

    def send(self, number: signal.Signals, targets: list[int]) -> None:
        for rank in targets:
            os.kill(self.processes[rank].pid, number)

    def end(self) -> list[int | None]:
        """Exit codes, once both have ended by themselves."""
        for process in self.processes:
            process.join(BOUND)
            assert not process.is_alive(), "a rank goes on though the other is gone"
        return [process.exitcode for process in self.processes]

    def results(self) -> list:
        return ranks.join(self._started)


def _assert_as_if_undisturbed(digits: str, run_dir: Path, reference: Path, steps: int) -> None:
    ranks.train(2, *_settings(digits, run_dir, steps)[1:])
    ranks.train(2, *_settings(digits, reference, steps)[1:])
    curves = [[(r["step"], r["images_seen"], r["loss"]) for r in read_metrics(str(d))] for d in (run_dir, reference)]
    assert [step for step, _, _ in curves[0]] == list(range(1, steps + 1)), "no batch left out, none twice"
    assert curves[0] == curves[1]
    a, b = Checkpoint.latest(str(run_dir)), Checkpoint.latest(str(reference))
    assert a.meta.step == b.meta.step == a.meta.optimizer_steps == steps
    assert a.states == b.states == ["ema-0.99", "exp_avg", "exp_avg_sq", "weight"]
    for state in a.states:
        for name, tensor in a.weights(state).items():
            assert torch.equal(tensor, b.weights(state)[name]), f"{state} of {name} differs"


def test_a_storm_of_sigkills(digits, tmp_path):
    run_dir, steps = tmp_path / "run", STEPS_PER_LIFE * KILLS
    settings = _settings(digits, run_dir, steps)
    chance = random.Random(1)
    inside = in_a_save = alone = 0
    for kill in range(1, KILLS + 1):
        life = _Life(run_dir, settings)
        moment = chance.random()
        if moment < 0.1:
            time.sleep(chance.uniform(0.0, 1.0))  # somewhere in the start
        elif moment < 0.4:
            life.wait_for_a_save()
        else:
            life.wait_for(chance.randint(1, 5))
            time.sleep(chance.uniform(0.0, 0.1))
        targets = chance.choice([[0, 1], [0, 1], [0], [1]])
        life.send(signal.SIGKILL, targets)
        steps_done = life.steps()
        inside += steps_done > 0
        alone += len(targets) == 1
        if steps_done > 0:
            life.end()  # a rank that is left alone ends too
        else:
            life.send(signal.SIGKILL, [0, 1])
            life.end()
        in_a_save += bool(checkpoints.uncommitted_steps(str(run_dir)))
        tally = f"{inside} inside training, {in_a_save} with a save under way, {alone} of one rank only"
        print(f"{kill} kills: {tally}", flush=True)
    assert inside >= 0.6 * KILLS, "most kills must fall inside training to prove anything"
    assert in_a_save > 0, "some must fall into a save"
    _assert_as_if_undisturbed(digits, run_dir, tmp_path / "reference", steps)


def test_a_storm_of_sigterms(digits, tmp_path):
    run_dir, steps = tmp_path / "run", STEPS_PER_LIFE * TERMS
    settings = _settings(digits, run_dir, steps)
    chance = random.Random(2)
    for _ in range(TERMS):
        life = _Life(run_dir, settings)
        life.wait_for(chance.randint(1, 4))
        number = chance.choice([signal.SIGTERM, signal.SIGUSR1])
        life.send(number, chance.choice([[0, 1], [0], [1]]))
        if chance.random() < 0.5:  # and once more, while it saves or leaves
            time.sleep(chance.uniform(0.0, 0.3))
            for process in life.processes:
                if process.is_alive():
                    os.kill(process.pid, number)
        assert life.results() == [75, 75]
        status = read_status(str(run_dir))
        assert status["state"] == "preempted"
        assert checkpoints.committed_steps(str(run_dir))[-1] == status["step"]
        assert "asked the run to stop" in status["reason"]
    _assert_as_if_undisturbed(digits, run_dir, tmp_path / "reference", steps)


@pytest.fixture(autouse=True)
def _no_process_is_left(request):
    yield
    import multiprocessing

    for process in multiprocessing.active_children():
        process.kill()
