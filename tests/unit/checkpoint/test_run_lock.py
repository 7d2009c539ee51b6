"""One run folder, one run: who is refused, who takes over and when, and how an owner learns that it has lost."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator

import pytest

from imm_scale import storage
from imm_scale.checkpoint import lock_owner, run_lock
from imm_scale.checkpoint.lock_owner import Process
from imm_scale.checkpoint.run_lock import LostLockError, Owner
from imm_scale.errors import UserError
from imm_scale.parallel.world import World

STALE = 0.5  # seconds in place of minutes


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(run_lock, "STALE_SECONDS", STALE)
    monkeypatch.setattr(run_lock, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.05)


@pytest.fixture
def other() -> Iterator[subprocess.Popen]:
    """A process that lives until it is killed, and stays a zombie until it is waited for."""
    started = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield started
    started.kill()
    started.wait()


def _process(number: int) -> Process:
    return Process(lock_owner.this_process().machine, number, lock_owner._stat(number)[1])


def _write(run_dir: str, number: int = 1, **fields) -> Owner:
    """A lock of somebody else's; by default of a process of another machine."""
    elsewhere = Process("another boot/1", 4242, 17)
    owner = dataclasses.replace(Owner.here(run_dir, {}), host="node7", **{"process": elsewhere, **fields})
    storage.write_bytes(run_lock._url(run_dir, number), owner.to_json())
    return owner


def _take(run_dir: str) -> tuple[float, list[str]]:
    """Takes the lock and returns after how many seconds, and what was said."""
    said: list[str] = []
    began = time.monotonic()
    run_lock.take(run_dir, said.append)
    return time.monotonic() - began, said


def test_a_process_that_lives_is_named_at_once(tmp_path, other):
    _write(str(tmp_path), process=_process(other.pid), job="77")
    began = time.monotonic()
    with pytest.raises(UserError, match=f"in use by process {other.pid} on node7"):
        run_lock.check_free(str(tmp_path))
    with pytest.raises(UserError) as error:
        run_lock.take(str(tmp_path), pytest.fail)
    assert time.monotonic() - began < STALE / 2
    assert f"process {other.pid} on node7 (SLURM job 77)" in str(error.value)
    assert "run.dir" in str(error.value) and "scancel 77" in str(error.value)


@pytest.mark.parametrize("reaped", [False, True])
def test_a_killed_process_is_followed_at_once(tmp_path, other, reaped):
    _write(str(tmp_path), process=_process(other.pid))
    os.kill(other.pid, signal.SIGKILL)
    if reaped:
        other.wait()
    else:
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    seconds, said = _take(str(tmp_path))
    assert seconds < STALE / 2 and said == []
    assert storage.list_names(f"{tmp_path}/lock") == ["00000002.json"]


def test_a_number_used_again_is_another_process(tmp_path, other):
    lives = _process(other.pid)
    assert lives.state() == "alive" and lock_owner.this_process().state() == "alive"
    assert dataclasses.replace(lives, started=lives.started - 1).state() == "dead"
    assert dataclasses.replace(lives, machine="another boot/1").state() == "unknown"
    assert dataclasses.replace(lives, machine="").state() == "unknown"


@pytest.mark.parametrize("data", ["", "{", '{"host": "a"}', "[1, 2]"])
def test_a_lock_that_says_nothing_is_waited_for(tmp_path, data):
    storage.write_text(run_lock._url(str(tmp_path), 3), data)
    seconds, _ = _take(str(tmp_path))
    assert seconds >= STALE
    assert storage.list_names(f"{tmp_path}/lock") == ["00000004.json"]


@pytest.mark.parametrize("root", ["disk", "memory"])
def test_a_silent_owner_elsewhere_is_followed_when_the_time_is_up_and_learns_of_it(root, tmp_path):
    run_dir = str(tmp_path) if root == "disk" else f"memory://{uuid.uuid4().hex}"
    first = run_lock.take(run_dir, pytest.fail)
    # As another machine sees it; neither its clock nor ours is asked.
    _write(run_dir, token=first._me.token, since="2999-01-01 00:00:00 +0000")
    assert not first.is_lost()
    seconds, said = _take(run_dir)
    assert STALE <= seconds < 10 * STALE
    assert len(said) == 1 and "process 4242 on node7, since 2999" in said[0]
    with pytest.raises(LostLockError, match="taken over by process"):
        first.verify()
    first.release()
    assert run_lock.owner_of(run_dir) is not None, "what is lost cannot be released"


def test_an_owner_elsewhere_that_gives_a_sign_is_left_alone(tmp_path):
    owner = _write(str(tmp_path))
    timer = threading.Timer(STALE / 3, _write, (str(tmp_path),), {"token": owner.token, "beat": 1})
    timer.start()
    with pytest.raises(UserError, match="process 4242 on node7"):
        run_lock.take(str(tmp_path), lambda line: None)
    timer.join()


def test_an_owner_elsewhere_that_leaves_meanwhile_is_followed(tmp_path):
    timer = threading.Timer(
        STALE / 3, _write, (str(tmp_path),), {"token": _write(str(tmp_path)).token, "released": True}
    )
    timer.start()
    assert _take(str(tmp_path))[0] < STALE
    timer.join()


@pytest.mark.parametrize(("job", "restart", "waits"), [("5", 1, False), ("5", 0, True), ("6", 1, True)])
def test_a_job_that_was_put_back_follows_itself_without_waiting(job, restart, waits, tmp_path, monkeypatch):
    _write(str(tmp_path), job="5", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    seconds, _ = _take(str(tmp_path))
    assert (seconds >= STALE) == waits


def test_heartbeats_keep_a_lock_for_as_long_as_it_is_held(tmp_path):
    lock = run_lock.take(str(tmp_path), pytest.fail)
    lock.keep()
    before = run_lock._newest(str(tmp_path)).owner.beat
    time.sleep(STALE)
    assert run_lock._newest(str(tmp_path)).owner.beat > before
    lock.release()
    assert run_lock.owner_of(str(tmp_path)) is None
    assert _take(str(tmp_path)) == (pytest.approx(0, abs=STALE / 2), [])


def test_a_copy_of_a_run_folder_is_not_its_owners(tmp_path, other):
    """The copied lock names a process that lives, but trains elsewhere: nothing ever changes here."""
    _write(str(tmp_path / "run"), process=_process(other.pid))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert _take(str(tmp_path / "copy"))[0] >= STALE
    with pytest.raises(UserError):
        run_lock.take(str(tmp_path / "run"), pytest.fail)


@pytest.mark.parametrize("root", ["disk", "memory"])
def test_of_many_that_come_at_once_one_gets_it(root, tmp_path):
    run_dir = str(tmp_path) if root == "disk" else f"memory://{uuid.uuid4().hex}"
    _write(run_dir, released=True)
    came, got = threading.Barrier(8), []

    def come() -> None:
        came.wait()
        try:
            got.append(run_lock.take(run_dir, pytest.fail))
        except UserError as error:
            assert f"process {os.getpid()} on" in str(error)

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and not got[0].is_lost()


def test_where_a_store_overwrites_what_it_should_refuse_the_first_one_finds_out(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "create_bytes", lambda url, data: storage.write_bytes(url, data) or True)
    first = run_lock.take(str(tmp_path), pytest.fail)
    second = run_lock._create(str(tmp_path), 1, Owner.here(str(tmp_path), {}))
    assert second is not None and not second.is_lost()
    first.keep()
    deadline = time.monotonic() + 10
    while not first.is_lost():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second.verify()


def test_a_store_without_conditional_writes_is_written_to_all_the_same(tmp_path, monkeypatch):
    def refuse(url: str, data: bytes) -> bool:
        error = OSError("A header you provided implies functionality that is not implemented")
        error.response = {"Error": {"Code": "NotImplemented"}}
        raise error

    monkeypatch.setattr(storage, "create_bytes", refuse)
    lock = run_lock.take(str(tmp_path), pytest.fail)
    lock.verify()
    with pytest.raises(UserError, match="in use by process"):
        run_lock.take(str(tmp_path), pytest.fail)


def test_a_folder_that_cannot_be_written_to_is_said_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    expected = r"cannot write to run\.dir=.*make it writable or choose another run\.dir"
    with pytest.raises(UserError, match=expected), run_lock.held(f"{tmp_path}/file/run", World(), pytest.fail):
        pytest.fail("there is no folder to be had")


@pytest.mark.parametrize("how", [None, RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_lock_is_released_however_a_run_ends(how, tmp_path):
    with contextlib.suppress(how or RuntimeError), run_lock.held(str(tmp_path), World(), pytest.fail):
        assert run_lock.owner_of(str(tmp_path)) is not None
        if how is not None:
            raise how
    assert run_lock.owner_of(str(tmp_path)) is None
