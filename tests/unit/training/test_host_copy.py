"""The memory of a copy: little more than asked for, in chunks that torch's rounding leaves as they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imm_scale.checkpoint.host_copy import LARGEST_CHUNK, SMALLEST_CHUNK, HostCopy, chunk_sizes, cut
from imm_scale.parallel.param_slice import ParamSlice


@given(st.integers(0, 40 * LARGEST_CHUNK))
def test_chunks_are_powers_of_two_and_hardly_more_than_asked_for(numel):
    sizes = list(chunk_sizes(numel))
    assert all(size & (size - 1) == 0 and SMALLEST_CHUNK <= size <= LARGEST_CHUNK for size in sizes)
    assert 0 <= sum(sizes) - numel < SMALLEST_CHUNK


def test_what_xl_needs_on_one_gpu_is_not_rounded_up_by_half():
    """675 M parameters in four states: 10.8 GB, which torch would pin as one piece of 2^34 bytes."""
    elements = 4 * 675_129_632
    pinned = sum(1 << (size - 1).bit_length() for size in chunk_sizes(elements))
    assert pinned * 4 < 10.81e9 and 1 << (4 * elements - 1).bit_length() == 2**34


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 5))
def test_stretches_follow_one_another_through_the_chunks(sizes, chunk):
    whole = torch.arange(sum(sizes) + chunk)
    stretches = cut(list(whole.split(chunk)), sizes)
    assert [sum(len(part) for part in parts) for parts in stretches] == sizes
    flat = [value for parts in stretches for part in parts for value in part.tolist()]
    assert flat == list(range(sum(sizes)))


def _shards() -> list[ParamSlice]:
    generator = torch.Generator().manual_seed(0)
    sizes = (5, 3000, 1, 700)
    return [
        ParamSlice(
            f"p{i}", (size,), i, {state: torch.randn(size, generator=generator) for state in ("weight", "exp_avg")}
        )
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("largest", [256, 1 << 20])
def test_a_copy_holds_what_was_there_when_it_was_taken(largest, monkeypatch):
    monkeypatch.setattr("imm_scale.checkpoint.host_copy.LARGEST_CHUNK", largest)
    monkeypatch.setattr("imm_scale.checkpoint.host_copy.SMALLEST_CHUNK", 64)
    shards = _shards()
    copy = HostCopy(shards)
    assert copy.allocate(pinned=False) == ""
    for round_ in range(2):
        copy.begin()
        copies = copy.take()
        before = [{state: tensor.clone() for state, tensor in shard.states.items()} for shard in shards]
        for shard in shards:
            for tensor in shard.states.values():
                tensor.add_(1.0 + round_)
        for taken, shard, states in zip(copies, shards, before, strict=True):
            assert (taken.name, taken.shape, taken.offset) == (shard.name, shard.shape, shard.offset)
            for state, parts in taken.states.items():
                assert torch.equal(torch.cat(list(parts)), states[state])
        assert (max(len(parts) for taken in copies for parts in taken.states.values()) > 10) == (largest == 256)


def test_memory_that_cannot_be_had_is_said_and_given_back(monkeypatch):
    def failing(numel: int, pinned: bool) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    copy = HostCopy(_shards())
    monkeypatch.setattr("imm_scale.checkpoint.host_copy._empty", failing)
    assert copy.allocate(pinned=True) == "0.0 GiB: CUDA error: out of memory"
    assert copy._places == []
