"""Two starts of one run: the second is refused while the first lives, and a first that has lost the folder stops."""

import os
import signal
import time
from pathlib import Path

from imm_scale.checkpoint import run_lock
from imm_scale.checkpoint.format import committed_steps
from imm_scale.checkpoint.run_folder import read_metrics, read_status
from tests import ranks
from tests.conftest import TINY
from tests.resume.test_resume import _wait_for_step
from tests.unit.checkpoint.test_run_lock import _write


def _settings(digits: str, run_dir: Path, *more: str) -> list[str]:
    steps = ["train.max_steps=100000", "train.checkpoint_every=5", "zero.stage=1"]
    return ["train", *TINY, f"data.manifest={digits}", f"run.dir={run_dir}", *steps, *more]


def test_the_second_start_is_refused_on_all_ranks_and_the_next_after_a_kill_goes_on(digits, tmp_path):
    run_dir = tmp_path / "run"
    first = ranks.start(ranks.command, 2, *_settings(digits, run_dir))
    try:
        _wait_for_step(run_dir, 6)
        for code, output in ranks.run(ranks.command_and_output, 2, *_settings(digits, run_dir)):
            assert code == 2 and "Traceback" not in output
            assert f"{run_dir} is in use by process {first[0][0].pid} on " in output
            assert "choose another run.dir" in output
        assert "in use" not in (run_dir / "logs" / "rank-00000.log").read_text(), "the second wrote nothing"
        assert read_status(str(run_dir))["state"] == "running"
    finally:
        for process, _ in first:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    step, began = committed_steps(str(run_dir))[-1], time.monotonic()
    ranks.train(2, *_settings(digits, run_dir, f"train.max_steps={step + 3}")[1:])
    assert time.monotonic() - began < 100, "not the minutes a silent owner is waited for"
    assert [record["step"] for record in read_metrics(str(run_dir))] == list(range(1, step + 4))


def _with_quick_heartbeats(*argv: str) -> tuple[int, str]:
    from imm_scale.checkpoint import run_lock

    run_lock.HEARTBEAT_SECONDS = 0.2
    return ranks.command_and_output(*argv)


def test_a_run_that_has_lost_its_folder_stops_and_writes_nothing_more(digits, tmp_path):
    run_dir = tmp_path / "run"
    started = ranks.start(_with_quick_heartbeats, 2, *_settings(digits, run_dir))
    _wait_for_step(run_dir, 6)
    other = _write(str(run_dir), number=2)  # as a start elsewhere would, that waited in vain for a sign of life
    for code, output in ranks.join(started):
        assert code == 1 and "Traceback" not in output
        assert "was taken over by process 4242 on node7" in output
    assert read_status(str(run_dir))["state"] == "running", "what the other start says stays"
    assert run_lock.owner_of(str(run_dir)) == other
