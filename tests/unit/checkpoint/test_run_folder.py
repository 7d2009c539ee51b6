"""metrics.jsonl over kills and resumes, on a disk and in an object store; logs without wandb's or a terminal's help."""

import json
import logging
import resource
import signal
import threading
import uuid

import pytest

from imm_scale import storage
from imm_scale.checkpoint.run_folder import (
    MetricsLog,
    read_metrics,
    read_status,
    write_failure,
    write_progress,
    write_status,
)
from imm_scale.errors import UserError


def _steps(run_dir: str) -> list[int]:
    return [record["step"] for record in read_metrics(run_dir)]


@pytest.mark.parametrize("data", [b'{"sta', b"\xff\xfe", b"[]", b"\0" * 40])
def test_a_damaged_status_is_none(data, tmp_path, caplog):
    (tmp_path / "status.json").write_bytes(data)
    with caplog.at_level(logging.WARNING, "imm_scale"):
        assert read_status(str(tmp_path)) == {}
    assert "status.json is damaged" in caplog.text
    write_progress(str(tmp_path), step=3)
    assert read_status(str(tmp_path))["state"] == "running"


def test_records_past_the_commit_are_dropped_and_a_torn_line_is_tolerated(tmp_path):
    run_dir = str(tmp_path)
    log = MetricsLog(run_dir, 0)
    for step in (1, 2, 3):
        log.append({"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert _steps(run_dir) == [1, 2, 3]
    MetricsLog(run_dir, 2).append({"step": 3, "again": True})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "again": True},
    ]


def test_records_wait_while_the_disk_is_full(tmp_path, monkeypatch, caplog):
    """The kernel lets no file grow past 100 bytes for a while; half a record that it took is written over."""
    monkeypatch.setattr(logging.getLogger("imm_scale"), "propagate", True)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = MetricsLog(str(tmp_path), 0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        for step in range(10):
            log.append({"step": step, "loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert len(_steps(str(tmp_path))) < 10
    assert caplog.text.count("wait in memory") == 1
    log.append({"step": 10})
    assert _steps(str(tmp_path)) == list(range(11))


@pytest.mark.parametrize("line", ['{"st', "", "\0\0\0\0", "[2]", '{"loss": 1.0}', '{"step": 2}\ufffd'])
def test_a_broken_line_in_the_middle_is_not_hidden(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    for read in (read_metrics, lambda run_dir: MetricsLog(run_dir, 3)):
        with pytest.raises(UserError, match=r"metrics\.jsonl:2 is no record"):
            read(str(tmp_path))


def test_an_object_store_gets_a_segment_at_each_commit():
    run_dir = f"memory://{uuid.uuid4().hex}"
    log = MetricsLog(run_dir, 0)
    for step in (1, 2):
        log.append({"step": step})
    assert _steps(run_dir) == []
    log.commit(2)
    log.append({"step": 3})
    log.commit(3)
    assert _steps(run_dir) == [1, 2, 3]
    assert storage.list_names(f"{run_dir}/metrics") == ["00000002.jsonl", "00000003.jsonl"]
    MetricsLog(run_dir, 2)
    assert _steps(run_dir) == [1, 2]


def test_status_is_read_as_written(tmp_path):
    assert read_status(str(tmp_path)) == {}
    write_status(str(tmp_path), "preempted", step=7, reason="signal")
    status = read_status(str(tmp_path))
    assert (status["state"], status["step"], status["reason"]) == ("preempted", 7, "signal")
    assert status["host"]


def test_a_commit_does_not_hide_that_another_rank_has_failed(tmp_path):
    write_status(str(tmp_path), "running", step=0)
    write_progress(str(tmp_path), step=5)
    assert read_status(str(tmp_path))["step"] == 5
    write_failure(str(tmp_path), "rank 1 died", rank=1)
    write_progress(str(tmp_path), step=10)
    status = read_status(str(tmp_path))
    assert (status["state"], status["reason"]) == ("failed", "rank 1 died")


@pytest.mark.parametrize("root", ["disk", "memory"])
def test_readers_and_a_writer_at_once(root, tmp_path):
    """Status and records are read as they were at some moment, also while a run goes back to its commit."""
    run_dir = str(tmp_path) if root == "disk" else f"memory://{uuid.uuid4().hex}"
    ended, problems = threading.Event(), []

    def read() -> None:
        while not ended.is_set():
            try:
                steps = _steps(run_dir)
                assert steps == list(range(1, len(steps) + 1))
                assert read_status(run_dir).get("state", "running") == "running"
            except Exception as error:  # noqa: BLE001 - whatever it is, a reader must not meet it
                problems.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for start in range(0, 40, 2):
        log = MetricsLog(run_dir, start)
        for step in range(start + 1, start + 5):
            log.append({"step": step, "filling": "x" * 5000})
            log.commit(step)
            write_status(run_dir, "running", step=step)
    ended.set()
    for reader in readers:
        reader.join()
    assert problems == []
