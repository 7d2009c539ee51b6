"""A save that fails costs nothing but itself; one that is under way costs the steps beside it nothing."""

import json
import os
import resource
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imm_scale import config as configs
from imm_scale.checkpoint import format as checkpoints
from imm_scale.checkpoint.async_saver import Saver
from imm_scale.checkpoint.format import Checkpoint, committed_steps
from imm_scale.training.trainer import train
from tests import ranks
from tests.conftest import TINY

EVERY, LAST = 2, 8
Hook = Callable[[int, Path], None]


def _argv(digits: str, run_dir: Path) -> list[str]:
    steps = [f"train.max_steps={LAST}", f"train.checkpoint_every={EVERY}", "train.keep_last=9", "zero.stage=2"]
    return [*TINY, f"data.manifest={digits}", f"run.dir={run_dir}", *steps]


def _records(run_dir: Path) -> dict[int, dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """run/checkpoints as a file system of its own that can be filled and made read-only."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def _fill(step: int, folder: Path) -> None:
    """Before the save of step 4 the disk is full, before that of step 6 there is room again."""
    filler = folder / "filler"
    if step == 4 and os.environ["RANK"] == "0":
        with open(filler, "wb") as file, pytest.raises(OSError):
            while True:
                file.write(b"0" * (1 << 16))
                file.flush()
    if step == 6 and os.environ["RANK"] == "0":
        filler.unlink()


def _lock(step: int, folder: Path) -> None:
    if step in (4, 6) and os.environ["RANK"] == "0":
        mode = "ro" if step == 4 else "rw"
        subprocess.run(["mount", "-o", f"remount,{mode}", folder], check=True)


def _train_with_hook(hook: Hook, folder: Path, argv: list[str]) -> list[int]:
    """Calls `hook` on every rank before each save, when none is under way. Returns the failures counted then."""
    import torch.distributed as dist

    failed: list[int] = []
    save = Saver.save

    def hooked(self: Saver, step: int, *args: Any) -> None:
        self.wait()
        failed.append(self.failed_checkpoints)
        hook(step, folder)
        dist.barrier()
        save(self, step, *args)

    Saver.save = hooked  # type: ignore[method-assign]
    assert train(configs.load([], argv).config) == "completed"
    return failed


@pytest.mark.parametrize(("hook", "cause"), [(_fill, "No space left on device"), (_lock, "Read-only file system")])
def test_training_goes_on_after_a_save_that_failed(hook, cause, small_disk, digits, tmp_path):
    run_dir = tmp_path / "run"
    results = ranks.run(_train_with_hook, 2, hook, small_disk, _argv(digits, run_dir))
    assert results == [[0, 0, 1, 1]] * 2  # before the saves of steps 2, 4, 6, 8
    assert committed_steps(str(run_dir)) == [2, 6, 8]
    assert {path.name for path in small_disk.iterdir()} == {f"step-0000000{step}" for step in (2, 6, 8)}
    for step in (2, 6, 8):
        assert Checkpoint.of_step(str(run_dir), step).damaged_files() == []
    records = _records(run_dir)
    assert list(records) == list(range(1, LAST + 1))
    assert [records[step]["failed_checkpoints"] for step in (3, 7, 8)] == [0, 1, 1]
    log = (run_dir / "logs" / "rank-00000.log").read_text()
    assert f"cannot write checkpoint {checkpoints.folder(str(run_dir), 4)}" in log and cause in log


def _only_rank_1_fails(step: int, folder: Path) -> None:
    if os.environ["RANK"] == "1":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = 10_000 if step == 4 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def test_one_rank_that_cannot_write_keeps_all_from_committing(digits, tmp_path):
    run_dir = tmp_path / "run"
    results = ranks.run(_train_with_hook, 2, _only_rank_1_fails, tmp_path, _argv(digits, run_dir))
    assert results == [[0, 0, 1, 1]] * 2 and committed_steps(str(run_dir)) == [2, 6, 8]
    assert "File too large" in (run_dir / "logs" / "rank-00000.log").read_text(), "rank 0 says what rank 1 met"


def _break(what: str, step: int) -> None:
    """Rank 1's thread meets at this step, in a stage of the save, what no one foresaw."""
    from imm_scale.checkpoint import host_copy

    if os.environ["RANK"] != "1":
        return
    if what == "the copy":
        plain = host_copy.HostCopy._copy

        def copy(self: host_copy.HostCopy) -> None:
            host_copy.HostCopy._copy = plain  # type: ignore[method-assign]
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        host_copy.HostCopy._copy = copy  # type: ignore[method-assign]
    else:
        write = checkpoints.write_rank

        def failing(*args: Any) -> None:
            checkpoints.write_rank = write
            raise KeyError("a bug")

        checkpoints.write_rank = failing


def _break_the_copy(step: int, folder: Path) -> None:
    if step == 4:
        _break("the copy", step)


def _break_the_writing(step: int, folder: Path) -> None:
    if step == 4:
        _break("the writing", step)


@pytest.mark.parametrize(
    ("hook", "cause"),
    [(_break_the_copy, "RuntimeError: CUDA error: an illegal memory"), (_break_the_writing, "KeyError: 'a bug'")],
)
def test_whatever_ends_one_ranks_part_is_told_to_the_others_that_wait_for_it(hook, cause, digits, tmp_path):
    run_dir = tmp_path / "run"
    results = ranks.run(_train_with_hook, 2, hook, tmp_path, _argv(digits, run_dir))
    assert results == [[0, 0, 1, 1]] * 2 and committed_steps(str(run_dir)) == [2, 6, 8]
    logs = [(run_dir / "logs" / f"rank-0000{rank}.log").read_text() for rank in (0, 1)]
    assert all(f"{cause}" in log and "(rank 1); training goes on" in log for log in logs)
    assert "Traceback" in logs[1] and "Traceback" not in logs[0]


def _train_without_memory(lacking: list[str], argv: list[str]) -> tuple[int, list[str], int]:
    """With slices as if on a GPU, and rank 1 without these kinds of memory. (code, allocations, failed saves)."""
    from imm_scale.checkpoint import host_copy

    allocations: list[str] = []
    savers: list[Saver] = []
    begin, init = host_copy.HostCopy.begin, Saver.__init__

    def empty(numel: int, pinned: bool) -> Any:
        import torch

        kind = "pinned" if pinned else "pageable"
        allocations.append(kind)
        if os.environ["RANK"] == "1" and kind in lacking and allocations.count(kind) == 2:  # some of it was to be had
            raise RuntimeError("CUDA error: out of memory")
        return torch.empty(numel)

    def begun(self: host_copy.HostCopy) -> None:
        host_copy.HostCopy.from_gpu = False  # type: ignore[assignment,method-assign]
        begin(self)

    def noted(self: Saver, *args: Any) -> None:
        savers.append(self)
        init(self, *args)

    host_copy._empty, host_copy.HostCopy.begin, Saver.__init__ = empty, begun, noted  # type: ignore[method-assign]
    host_copy.HostCopy.from_gpu = True  # type: ignore[assignment,method-assign]
    host_copy.LARGEST_CHUNK = 1 << 10
    host_copy.SMALLEST_CHUNK = 1 << 8
    code = ranks.command("train", *argv)
    return code, allocations, savers[0].failed_checkpoints


def test_a_rank_that_can_pin_nothing_has_all_copy_to_pageable_memory(digits, tmp_path):
    run_dir = tmp_path / "run"
    argv = [*_argv(digits, run_dir), "train.max_steps=4"]
    results = ranks.run(_train_without_memory, 2, ["pinned"], argv)
    for rank, (code, allocations, failed) in enumerate(results):
        assert (code, failed) == (0, 0)
        pinned = allocations.index("pageable")
        assert (pinned == 2) == (rank == 1), "it stops at the chunk it cannot have"
        assert set(allocations[pinned:]) == {"pageable"}
    logs = [(run_dir / "logs" / f"rank-0000{rank}.log").read_text() for rank in (0, 1)]
    assert logs[0].count("pageable memory") == 1 and "out of memory (rank 1)" in logs[0]
    assert "pageable memory" not in logs[1]
    # What went through many small chunks is what an undisturbed run saves; and it goes on from there.
    reference = tmp_path / "reference"
    ranks.train(2, *_argv(digits, reference))
    assert Checkpoint.of_step(str(run_dir), 4).checksums == Checkpoint.of_step(str(reference), 4).checksums
    ranks.train(2, *_argv(digits, run_dir))
    assert Checkpoint.latest(str(run_dir)).checksums == Checkpoint.latest(str(reference)).checksums


def test_a_rank_without_any_memory_for_the_copy_ends_all_at_start(digits, tmp_path):
    argv = _argv(digits, tmp_path / "run")
    for code, _, _ in ranks.run(_train_without_memory, 2, ["pinned", "pageable"], argv):
        assert code == 2
    log = (tmp_path / "run" / "logs" / "rank-00000.log").read_text()
    assert "no host memory for the copy" in log and "(rank 1); ask for more memory per node" in log
    assert not committed_steps(str(tmp_path / "run"))


def _train_beside_a_slow_save(argv: list[str]) -> list[tuple[str, int]]:
    """What happened in which order: steps taken, writes begun and ended. A write of step n waits for steps after n.

    The copy is late as well: by then the next step would be over, did it not wait before it changes the weights.
    """
    from imm_scale.checkpoint.host_copy import HostCopy
    from imm_scale.parallel.deepspeed_engine import Engine

    copy = HostCopy._copy

    def late(self: HostCopy) -> None:
        time.sleep(0.3)
        copy(self)

    HostCopy._copy = late  # type: ignore[method-assign]

    events: list[tuple[str, int]] = []
    stepped, step, write = threading.Condition(), Engine.step, checkpoints.write_rank

    def counted(self: Engine, *args: Any) -> Any:
        result = step(self, *args)
        with stepped:
            events.append(("step", self.optimizer_steps()))
            stepped.notify()
        return result

    def slow(url: str, *args: Any) -> None:
        number = int(url[-8:])
        events.append(("begin", number))
        if number < LAST:
            awaited = ("step", number + (1 if number % 4 else 2))  # that of the next save waits for this one
            with stepped:
                assert stepped.wait_for(lambda: awaited in events, timeout=60)
        write(url, *args)
        events.append(("end", number))

    Engine.step, checkpoints.write_rank = counted, slow  # type: ignore[method-assign]
    assert train(configs.load([], argv).config) == "completed"
    return events


def test_steps_go_on_beside_a_save_and_the_next_save_waits(digits, tmp_path):
    run_dir = tmp_path / "run"
    events = ranks.run(_train_beside_a_slow_save, 1, _argv(digits, run_dir))[0]
    begun = [number for what, number in events if what == "begin"]
    assert begun == [2, 4, 6, 8] == committed_steps(str(run_dir))
    under_way = 0
    for what, _ in events:
        under_way += {"begin": 1, "end": -1, "step": 0}[what]
        assert under_way in (0, 1)
    assert events.index(("step", 6)) < events.index(("end", 4)) < events.index(("begin", 6))
    # What was written is the state of its step, though later steps had changed the weights by then.
    reference = tmp_path / "reference"
    ranks.train(1, *_argv(digits, reference))
    for number in begun:
        a, b = (Checkpoint.of_step(str(folder), number) for folder in (run_dir, reference))
        assert a.checksums == b.checksums and set(a.checksums) == {"weight", "exp_avg", "exp_avg_sq", "ema-0.99"}
    assert len({Checkpoint.of_step(str(run_dir), number).checksums["weight"] for number in begun}) == len(begun)


# --- on the way back ---


@pytest.fixture(scope="module")
def finished(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    ranks.train(1, *_argv(digits, run_dir))
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-r", str(finished), str(tmp_path / "run")], check=True)
    return tmp_path / "run"


def _tensors(run_dir: Path, step: int) -> Path:
    return Path(checkpoints.folder(str(run_dir), step)) / "rank-00000.safetensors"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_last_checkpoint_does_not_count_as_the_end(digits, run_dir):
    before = Checkpoint.of_step(str(run_dir), LAST).checksums
    _flip(_tensors(run_dir, LAST))
    ranks.train(1, *_argv(digits, run_dir), "train.keep_last=1")
    log = (run_dir / "logs" / "rank-00000.log").read_text()
    assert f"checkpoint of step {LAST} is skipped, it is damaged: rank-00000.safetensors" in log
    assert committed_steps(str(run_dir)) == [LAST]
    assert Checkpoint.of_step(str(run_dir), LAST).damaged_files() == []
    assert Checkpoint.of_step(str(run_dir), LAST).checksums == before


def test_nothing_starts_from_scratch_unless_told_to(digits, run_dir):
    for step in range(EVERY, LAST + 1, EVERY):
        _tensors(run_dir, step).unlink()
    argv = ["train", *_argv(digits, run_dir)]
    code, output = ranks.run(ranks.command_and_output, 1, *argv)[0]
    assert code == 2 and "none is intact" in output and "run.from_scratch=true" in output
    assert all(f"step {step} is skipped" in output for step in range(EVERY, LAST + 1, EVERY))
    assert ranks.run(ranks.command, 1, *argv, "run.from_scratch=true") == [0]
    assert Checkpoint.latest(str(run_dir)).meta.optimizer_steps == LAST
    assert Checkpoint.latest(str(run_dir)).damaged_files() == []


def _rewrite(run_dir: Path, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes what a checkpoint says of itself and commits it anew, as a writer with a mistake would."""
    url, meta = Path(checkpoints.folder(str(run_dir), step)), Checkpoint.of_step(str(run_dir), step).meta
    part = json.loads((url / "rank-00000.json").read_text())
    change(part)
    (url / "rank-00000.json").write_text(json.dumps(part))
    checkpoints.commit(str(url), meta)


@pytest.mark.parametrize(
    ("state", "message"),
    [("exp_avg_sq", "exp_avg_sq did not arrive as it was saved"), ("ema-0.99", "ema-0.99 did not arrive")],
)
def test_state_that_does_not_arrive_is_refused(state, message, digits, run_dir):
    for step in (4, 6, 8):
        checkpoints.remove(checkpoints.folder(str(run_dir), step))

    def other_sum(part: dict[str, Any]) -> None:
        part["checksums"][state] += 1

    _rewrite(run_dir, EVERY, other_sum)
    code, output = ranks.run(ranks.command_and_output, 1, "train", *_argv(digits, run_dir))[0]
    assert code == 2 and message in output and "to go on from the checkpoint before it" in output


def test_moments_that_are_zero_are_refused(digits, run_dir):
    """What a resume that lost its optimizer looks like: everything loads, and the moments start anew."""
    from safetensors.torch import load_file, save_file

    for step in (4, 6, 8):
        checkpoints.remove(checkpoints.folder(str(run_dir), step))
    path = _tensors(run_dir, EVERY)
    tensors = {key: value * (not key.startswith("exp_avg/")) for key, value in load_file(path).items()}
    save_file(tensors, path)

    def as_written(part: dict[str, Any]) -> None:
        import hashlib

        data = path.read_bytes()
        part.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        del part["checksums"]  # as an older writer

    _rewrite(run_dir, EVERY, as_written)
    code, output = ranks.run(ranks.command_and_output, 1, "train", *_argv(digits, run_dir))[0]
    assert code == 2 and f"exp_avg is zero after {EVERY} optimizer steps" in output


def test_what_a_dead_writer_left_is_removed(digits, run_dir):
    checkpoints.remove(checkpoints.folder(str(run_dir), LAST))
    partial = Path(checkpoints.folder(str(run_dir), LAST + 1))
    partial.mkdir()
    (partial / "rank-00000.safetensors").write_bytes(b"half")
    ranks.train(1, *_argv(digits, run_dir))
    assert not partial.exists() and committed_steps(str(run_dir))[-1] == LAST
    log = (run_dir / "logs" / "rank-00000.log").read_text()
    assert f"checkpoint of step {LAST + 1} is skipped: it was never committed" in log


def test_checkpoints_are_written_for_their_owner_and_group_as_other_files(finished):
    """No private temporary mode is left on what colleagues read."""
    modes = {stat.S_IMODE(path.stat().st_mode) for path in finished.rglob("*") if path.is_file()}
    assert len(modes) == 1
