"""What the first node of a job does when a step ends, with SLURM's commands played by a fake and the step by bash."""

import json
import shlex
import signal
import time
from pathlib import Path

import pytest

from imm_scale.errors import UserError
from launchers import slurm, supervise
from launchers.records.history import History

ENV = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "MAX_RESTARTS": "3"}
SRUN_SAYS = "echo 'srun: error: node2: tasks 2-3: Killed' >&2; echo 'srun: error: node1: task 0: Terminated' >&2"


class FakeSlurm:
    """One job, on node1 and node2."""

    def __init__(self):
        self.state, self.reason, self.excluded, self.lost = "RUNNING", "None", "(null)", []
        self.commands: list[str] = []
        self.refuses = 0

    def __call__(self, command, text=None):
        line = " ".join(command)
        if line.startswith("scontrol show hostnames"):
            return {"node[1-2]": "node1 node2"}.get(command[-1], command[-1].replace(",", " "))
        if command[0] == "squeue":
            return f"7|{self.state}|{self.reason}|node[1-2]|{self.excluded}"
        if command[0] == "sinfo":
            return "\n".join(f"{n}|{'down*' if n in self.lost else 'idle'}" for n in ("node1", "node2"))
        if self.refuses:
            self.refuses -= 1
            raise UserError("scontrol: Unable to contact slurm controller")
        self.commands.append(line)
        if line.startswith("scontrol requeue"):
            self.state = "PENDING"
        return ""


@pytest.fixture
def fake(monkeypatch):
    fake = FakeSlurm()
    monkeypatch.setattr(slurm, "_run", fake)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield fake
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _commit(run_dir: Path, step: int) -> str:
    folder = shlex.quote(f"{run_dir}/checkpoints/step-{step:08d}")
    return f"mkdir -p {folder} && touch {folder}/COMMITTED"


def _status(run_dir: Path, state: str, reason: str = "a reason") -> str:
    text = json.dumps({"state": state, "reason": reason, "time": time.time() + 60})
    return f"printf %s {shlex.quote(text)} > {shlex.quote(str(run_dir))}/status.json"


def _supervise(run_dir: Path, *commands: str) -> int:
    overrides = [f"run.dir={run_dir}", "train.max_steps=10"]
    return supervise.main([str(len(overrides)), *overrides, "bash", "-c", "; ".join(commands)])


def _last(run_dir: Path):
    return History.load(str(run_dir), "7").starts[-1]


def test_a_completed_run_is_over_whatever_srun_says(fake, tmp_path):
    assert _supervise(tmp_path, _commit(tmp_path, 10), _status(tmp_path, "completed"), SRUN_SAYS, "exit 137") == 0
    assert (_last(tmp_path).outcome, _last(tmp_path).end_step, fake.commands) == ("completed", 10, [])


def test_a_finished_run_is_not_started_again(fake, tmp_path):
    _supervise(tmp_path, _commit(tmp_path, 10), _status(tmp_path, "completed"))
    assert _supervise(tmp_path, f"touch {tmp_path}/started") == 0
    assert not (tmp_path / "started").exists()


def test_completed_by_an_earlier_smaller_goal_is_not_complete(fake, tmp_path):
    _supervise(tmp_path, _commit(tmp_path, 5), _status(tmp_path, "completed"), "exit 1")
    assert _last(tmp_path).outcome == "failed"


def test_a_preempted_run_is_put_back(fake, tmp_path):
    _supervise(tmp_path, _commit(tmp_path, 5), _status(tmp_path, "preempted"))
    assert _last(tmp_path).outcome == "preempted"
    assert fake.commands == ["scontrol requeue 7"]


def test_a_dead_rank_puts_the_run_back_and_blames_the_first_node_srun_names(fake, tmp_path):
    _supervise(tmp_path, _commit(tmp_path, 5), _status(tmp_path, "running"), SRUN_SAYS, "exit 137")
    last = _last(tmp_path)
    assert (last.outcome, last.failed_nodes, last.reason) == ("failed", ["node2"], "Killed on node2")
    assert fake.commands == ["scontrol requeue 7"]


def test_a_reason_in_the_status_is_passed_on(fake, tmp_path):
    _supervise(tmp_path, _status(tmp_path, "failed", "no step for 1800 s"), "exit 1")
    assert "no step for 1800 s" in _last(tmp_path).reason


def test_an_old_status_is_not_taken_for_this_start(fake, tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"state": "preempted", "reason": "long ago", "time": 1.0}))
    _supervise(tmp_path, "exit 1")
    assert _last(tmp_path).outcome == "failed"
    assert "long ago" not in _last(tmp_path).reason


def test_the_users_mistake_is_not_tried_again(fake, tmp_path):
    assert _supervise(tmp_path, "exit 2") == 1
    assert (_last(tmp_path).outcome, fake.commands) == ("refused", [])
    assert "mistake" in History.load(str(tmp_path), "7").stopped


def test_two_failures_of_a_node_exclude_it_beside_those_the_user_excluded(fake, tmp_path, capfd):
    for step in (3, 6):
        fake.state, fake.excluded = "RUNNING", "node9"
        _supervise(tmp_path, _commit(tmp_path, step), SRUN_SAYS, "exit 137")
    assert fake.commands[-2:] == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=node2,node9"]
    assert "from now on without node2" in capfd.readouterr().err


def test_an_excluded_node_in_the_allocation_is_given_back_unused(fake, tmp_path, monkeypatch):
    for step in (3, 6):
        fake.state = "RUNNING"
        _supervise(tmp_path, _commit(tmp_path, step), SRUN_SAYS, "exit 137")
    fake.state, fake.commands = "RUNNING", []

    def killed(seconds):
        raise SystemExit(1)

    monkeypatch.setattr(time, "sleep", killed)
    with pytest.raises(SystemExit):
        _supervise(tmp_path, f"touch {tmp_path}/started")
    assert fake.commands[0] == "scontrol requeue 7"
    assert not (tmp_path / "started").exists()


def test_no_progress_stops(fake, tmp_path, capfd):
    for _ in range(2):
        fake.state = "RUNNING"
        code = _supervise(tmp_path, _commit(tmp_path, 5), "exit 1")
    # The first start made step 5; this one and the next add nothing.
    fake.state = "RUNNING"
    code = _supervise(tmp_path, "exit 1")
    assert code == 1
    assert fake.commands == ["scontrol requeue 7"] * 2
    assert "stopped: no progress past step 5 in 2 starts" in capfd.readouterr().err


def test_a_job_slurm_has_taken_is_left_to_it(fake, tmp_path):
    fake.state = "COMPLETING"
    assert _supervise(tmp_path, _commit(tmp_path, 5), "exit 143") == 1
    assert (_last(tmp_path).outcome, fake.commands) == ("interrupted", [])


def test_a_job_out_of_time_is_put_back(fake, tmp_path):
    fake.state, fake.reason = "COMPLETING", "TimeLimit"
    _supervise(tmp_path, _commit(tmp_path, 5), "exit 143")
    assert fake.commands == ["scontrol requeue 7"]


def test_a_start_nobody_ended_blames_the_nodes_that_are_gone(fake, tmp_path):
    overrides = [f"run.dir={tmp_path}", "train.max_steps=10"]
    run, task = supervise.Run.of(overrides), supervise.Task.of(ENV)
    supervise._open(History("7"), run, task)  # and then the node is gone
    fake.lost = ["node1"]
    _supervise(tmp_path, _commit(tmp_path, 10), _status(tmp_path, "completed"))
    first, second = History.load(str(tmp_path), "7").starts
    assert (first.outcome, first.failed_nodes, first.reason) == ("interrupted", ["node1"], "lost node1")
    assert second.outcome == "completed"


def test_a_cancelled_job_is_not_put_back(fake, tmp_path):
    (tmp_path / "cancel").write_text("7")
    assert _supervise(tmp_path, _commit(tmp_path, 5), _status(tmp_path, "preempted")) == 1
    assert (_last(tmp_path).outcome, fake.commands) == ("cancelled", [])


def test_a_controller_that_does_not_answer_is_asked_again(fake, tmp_path):
    fake.refuses = 3
    _supervise(tmp_path, _commit(tmp_path, 5), _status(tmp_path, "preempted"))
    assert fake.commands == ["scontrol requeue 7"]


@pytest.mark.parametrize(
    ("how", "description"),
    [
        ("Exited with exit code 137", "killed by SIGKILL"),
        ("Exited with exit code 139", "killed by SIGSEGV"),
        ("Exited with exit code 1", "Exited with exit code 1"),
        ("Exited with exit code 255", "Exited with exit code 255"),
        ("Killed", "Killed"),
    ],
)
def test_srun_in_words(how, description):
    assert supervise._in_words(how) == description


@pytest.mark.parametrize(
    ("code", "restart", "requeues"), [(0, 0, 0), (2, 0, 0), (1, 0, 1), (137, 2, 1), (137, 3, 0)],
)  # fmt: skip
def test_other_commands_go_by_their_exit_code(code, restart, requeues, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    assert supervise.main(["0", "bash", "-c", f"exit {code}"]) == (code if code in (0, 2) else 1)
    assert len(fake.commands) == requeues


def test_a_task_of_an_array_is_put_back_alone(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    supervise.main(["0", "false"])
    assert fake.commands == ["scontrol requeue 5_2"]
