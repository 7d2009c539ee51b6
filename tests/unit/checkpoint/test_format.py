"""Slices written by some ranks, read by others; files that stock safetensors reads; no commit without all files."""

import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from imm_scale.checkpoint import format as checkpoints
from imm_scale.checkpoint.format import (
    Checkpoint,
    DamagedCheckpointError,
    Meta,
    committed_steps,
    folder,
    write_rank,
)
from imm_scale.errors import UserError
from imm_scale.parallel.param_slice import ParamSlice

SHAPES = {"a": (3, 5), "b": (7,), "c": ()}


def _meta(step: int, world_size: int) -> Meta:
    return Meta(step, step * 64, step, "", "", "hash", world_size, 1, {})


def _write(run_dir: str, step: int, world_size: int) -> dict[str, torch.Tensor]:
    """Every parameter cut into world_size contiguous slices, one per rank."""
    whole = {name: torch.arange(float(np.prod(shape))) + 100 * i for i, (name, shape) in enumerate(SHAPES.items())}
    for rank in range(world_size):
        slices = []
        for name, shape in SHAPES.items():
            size = len(whole[name])
            start, stop = rank * size // world_size, (rank + 1) * size // world_size
            if start < stop:
                values = whole[name][start:stop]
                parts = (values[:2], values[2:]) if len(values) > 2 else (values,)  # as chunks of memory cut them
                slices.append(ParamSlice(name, shape, start, {"weight": parts}))
        write_rank(folder(run_dir, step), rank, slices, run_dir)
    return whole


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_any_slice_is_assembled_from_any_ranks(world_size, tmp_path):
    whole = _write(str(tmp_path), 1, world_size)
    checkpoints.commit(folder(str(tmp_path), 1), _meta(1, world_size))
    read = Checkpoint.latest(str(tmp_path))
    assert read.meta == _meta(1, world_size)
    for name, values in whole.items():
        for start in range(len(values)):
            for stop in range(start + 1, len(values) + 1):
                assert torch.equal(read.read("weight", name, start, stop - start), values[start:stop])
        assert torch.equal(read.weights()[name], values.view(SHAPES[name]))


def test_stock_safetensors_reads_the_files(tmp_path):
    whole = _write(str(tmp_path), 1, 2)
    parts = [load_file(Path(folder(str(tmp_path), 1)) / f"rank-0000{rank}.safetensors") for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([part["weight/a"] for part in parts]), whole["a"])


def test_without_the_mark_there_is_no_checkpoint(tmp_path):
    _write(str(tmp_path), 1, 2)
    assert committed_steps(str(tmp_path)) == []
    with pytest.raises(UserError, match="no committed checkpoint"):
        Checkpoint.latest(str(tmp_path))


def test_damage_is_named(tmp_path):
    run_dir = str(tmp_path)
    _write(run_dir, 1, 2)
    checkpoints.commit(folder(run_dir, 1), _meta(1, 2))
    tensors = Path(folder(run_dir, 1)) / "rank-00001.safetensors"
    good = tensors.read_bytes()
    tensors.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert Checkpoint.latest(run_dir).damaged_files() == ["rank-00001.safetensors"]
    assert Checkpoint.latest(run_dir).damaged_files(0, 2) == []
    tensors.unlink()
    assert Checkpoint.latest(run_dir).damaged_files(1, 2) == ["rank-00001.safetensors"]
    tensors.write_bytes(good)
    meta = Path(folder(run_dir, 1)) / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "step": 2}))
    with pytest.raises(DamagedCheckpointError, match=r"meta\.json is not what was committed"):
        Checkpoint.latest(run_dir)
    meta.unlink()
    with pytest.raises(DamagedCheckpointError, match=r"meta\.json is missing"):
        Checkpoint.latest(run_dir)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the last number's exponent
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


DAMAGES = {
    "removed": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "header cut": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "cut": _cut,
    "flipped": _flip,
    "another file's": lambda path: path.write_bytes((2).to_bytes(8, "little") + b"{}"),
    "no mapping": lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_never_taken_for_weights(damage, tmp_path):
    """Sampling and exports read weights without hashing the files they are in."""
    run_dir = str(tmp_path)
    _write(run_dir, 1, 2)
    checkpoints.commit(folder(run_dir, 1), _meta(1, 2))
    DAMAGES[damage](Path(folder(run_dir, 1)) / "rank-00001.safetensors")
    with pytest.raises(DamagedCheckpointError, match=r"step-00000001/.* is not what was committed"):
        Checkpoint.latest(run_dir).weights()


def test_a_state_that_is_not_there_is_named(tmp_path):
    _write(str(tmp_path), 1, 1)
    checkpoints.commit(folder(str(tmp_path), 1), _meta(1, 1))
    read = Checkpoint.latest(str(tmp_path))
    with pytest.raises(UserError, match="holds no exp_avg of a; it has weight"):
        read.read("exp_avg", "a")
    with pytest.raises(UserError, match=r"'ema-0\.5'"):
        read.weights("ema-0.5")


def test_retention_keeps_the_newest_and_the_milestones(tmp_path):
    for step in range(1, 9):
        _write(str(tmp_path), step, 1)
        checkpoints.commit(folder(str(tmp_path), step), _meta(step, 1))
    checkpoints.prune(str(tmp_path), 8, keep_last=2, keep_every=3)
    assert committed_steps(str(tmp_path)) == [3, 6, 7, 8]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (3, 6, 7, 8)
    ]


def test_what_an_older_writer_left_out_is_as_if_nothing_had_happened():
    fields = ("step", "images_seen", "optimizer_steps", "config", "spec", "manifest_hash", "world_size", "zero_stage")
    old = {**dict.fromkeys(fields, 1), "versions": {}, "format_version": 1}
    meta = Meta.from_json(json.dumps(old).encode())
    assert (meta.loss_scale, meta.skipped, meta.guards) == (None, (), {})
    new = {**old, "loss_scale": 512.0, "skipped": [[64, 128]], "guards": {"seen": 1}}
    meta = Meta.from_json(json.dumps(new).encode())
    assert (meta.loss_scale, meta.skipped, meta.guards) == (512.0, ((64, 128),), {"seen": 1})


@pytest.mark.parametrize("cuts", [(0, 22), (0, 1, 22), (0, 7, 8, 21, 22)])
def test_a_checksum_does_not_depend_on_the_cut_and_sees_every_change(cuts):
    values = torch.randn(22)

    def total(tensor: torch.Tensor, name: str = "a") -> int:
        parts = [checkpoints.checksum(name, start, tensor[start:stop]) for start, stop in pairwise(cuts)]
        return int(torch.stack(parts).sum())

    # The same sum in Python's own integers.
    key = 2 * int.from_bytes(hashlib.sha256(b"a").digest()[:7], "little") + 1
    bits = values.numpy().view(np.int32).tolist()
    exact = key * sum(word * (2 * i + 1) for i, word in enumerate(bits))
    assert total(values) == (exact + 2**63) % 2**64 - 2**63
    changed = values.clone()
    changed[5] = torch.nextafter(changed[5], torch.tensor(9.0))
    assert len({total(values), total(changed), total(values.roll(1)), total(values, "b")}) == 4


def test_a_checkpoint_that_is_removed_while_it_is_read_is_followed_by_the_next(tmp_path):
    run_dir = str(tmp_path)
    for step in (1, 2):
        _write(run_dir, step, 1)
        checkpoints.commit(folder(run_dir, step), _meta(step, 1))
    read_at: list[int] = []

    def use(checkpoint: Checkpoint) -> int:
        read_at.append(checkpoint.meta.step)
        if checkpoint.meta.step == 2:  # the run commits another and removes this one
            _write(run_dir, 3, 1)
            checkpoints.commit(folder(run_dir, 3), _meta(3, 1))
            checkpoints.remove(folder(run_dir, 2))
        checkpoint.weights()
        return checkpoint.meta.step

    assert checkpoints.use_newest(run_dir, use) == 3
    assert read_at == [2, 3]


def test_a_damaged_checkpoint_that_is_still_there_is_an_error_all_the_same(tmp_path):
    _write(str(tmp_path), 1, 1)
    checkpoints.commit(folder(str(tmp_path), 1), _meta(1, 1))
    (Path(folder(str(tmp_path), 1)) / "rank-00000.safetensors").unlink()
    with pytest.raises(DamagedCheckpointError):
        checkpoints.use_newest(str(tmp_path), lambda checkpoint: checkpoint.weights())


@pytest.mark.parametrize("name", ["step-00000001 (copy)", "step-00000001.bak", "step-last", "step-", "notes.txt"])
def test_what_people_leave_among_checkpoints_is_none(name, tmp_path):
    _write(str(tmp_path), 1, 1)
    checkpoints.commit(folder(str(tmp_path), 1), _meta(1, 1))
    shutil.copytree(folder(str(tmp_path), 1), tmp_path / "checkpoints" / name)
    assert committed_steps(str(tmp_path)) == [1]
