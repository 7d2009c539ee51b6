"""Signals that are only noted, and the end of a SLURM job."""

import ctypes
import os
import re
import signal
import time

import pytest

from imm_scale import config as configs
from imm_scale.errors import UserError
from imm_scale.training import stop_signals
from imm_scale.training.stop_signals import Deadline, StopSignals, job_end, seconds_left


@pytest.fixture(autouse=True)
def _handlers():
    """The handlers as they were: after a signal, StopSignals leaves the process deaf on purpose."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_is_noted_and_a_second_changes_nothing_to_the_end():
    with StopSignals(["SIGUSR1", "SIGUSR2"]) as signals:
        assert signals.heard is None
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.heard == "SIGUSR2"
    os.kill(os.getpid(), signal.SIGUSR1)  # would end the process, were it handled as before


def test_handlers_that_a_library_replaced_behind_pythons_back_are_put_back():
    with StopSignals(["SIGUSR1"]) as signals:
        # As LLVM does once Triton has compiled a kernel; Python's getsignal sees nothing of it.
        ctypes.CDLL(None).signal(int(signal.SIGUSR1), ctypes.c_void_p(1))  # 1: SIG_IGN
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.heard is None
        signals.renew()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.heard == "SIGUSR1"


def test_an_interruption_stays_pythons():
    with StopSignals(["SIGUSR1"]) as signals:
        ctypes.CDLL(None).signal(int(signal.SIGINT), ctypes.c_void_p(1))
        signals.renew()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signals.heard is None


def test_without_a_signal_the_handlers_go_back():
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals(["SIGUSR1"]):
        assert signal.getsignal(signal.SIGUSR1) != before
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("59", 59), ("1:02", 62), ("2:03:04", 7384), ("1-00:00:01", 86401), ("UNLIMITED", None), ("", None), ("?", None)],
)  # fmt: skip
def test_squeues_time_left(text, seconds):
    assert seconds_left(text) == seconds


def test_the_end_of_a_job_from_its_environment_or_from_squeue(tmp_path, monkeypatch):
    assert job_end({}) is None
    assert job_end({"SLURM_JOB_END_TIME": "1700000000", "SLURM_JOB_ID": "7"}) == 1.7e9
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$*" = "--noheader --jobs 7 --format %L" ] && echo 1:00:00\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    before = time.time()
    end = job_end({"SLURM_JOB_ID": "7"})
    assert before + 3600 <= end <= time.time() + 3600
    squeue.write_text("#!/bin/sh\nexit 1\n")
    assert job_end({"SLURM_JOB_ID": "7"}) is None


def test_two_steps_and_a_checkpoint_must_fit_before_the_margin():
    deadline = Deadline(end=1000.0, margin=60.0)
    for seconds in (9.0, 10.0, 8.0):
        deadline.stepped(seconds)
    # 2 x 10 s of steps, 30 s of saving and 60 s of margin: from 890 on.
    assert [deadline.is_near(30.0, now) for now in (889.9, 890.0, 950.0)] == [False, True, True]
    assert not Deadline(None, 60.0).is_near(30.0, 1e12)


def test_without_a_job_it_says_so(caplog, monkeypatch):
    monkeypatch.setattr(stop_signals.log, "propagate", True)
    assert stop_signals.deadline(60.0, {}).end is None
    assert "train.stop_before=60 does nothing" in caplog.text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stop_signals=[SIGKILL]", "SIGKILL is no signal that can be caught"),
        ("train.stop_signals=[TERM]", "TERM is no signal"),
        ("train.stop_before=-1", "[0, inf)"),
        ("train.spike_factor=1", "(1, inf)"),
        ("train.max_rewinds=-1", "[0, inf)"),
        ("train.profile_steps=[3]", "first and the last step"),
        ("train.step_timeout=0", "(0, inf)"),
        ("data.holdout=-0.1", "[0, inf)"),
        ("data.holdout=1.5", "whole number"),
    ],
)
def test_settings_that_cannot_be(override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        configs.load([], [override])
