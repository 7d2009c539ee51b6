"""Kernels, waits and idle time from the events of a Chrome trace."""

import pytest
import torch

from benchmarks.gpu import trace
from benchmarks.gpu.trace import Trace, covered


def _event(category, begin, length, name="k"):
    return {"ph": "X", "cat": category, "ts": begin, "dur": length, "name": name}


def test_overlapping_and_touching_intervals_count_once():
    # [0, 4) and [2, 6) make 6, [6, 7) touches, [9, 10) stands alone, [9, 9.5) lies inside: 8 in all.
    assert covered([(9, 10), (0, 4), (2, 6), (6, 7), (9, 9.5)]) == 8
    assert covered([]) == 0


def test_a_trace_with_two_streams_and_a_gap():
    seen = Trace(
        [
            _event("kernel", 100, 10),
            _event("kernel", 105, 10),  # on another stream, beside the first
            _event("gpu_memcpy", 120, 5),
            _event("kernel", 135, 5),
            _event("gpu_user_annotation", 100, 40),  # a range of the program's, no work
            _event("cuda_runtime", 100, 3, "cudaLaunchKernel"),
            _event("cuda_runtime", 104, 9, "cudaStreamSynchronize"),
            _event("cuda_runtime", 115, 9, "cudaStreamSynchronize"),
            {"ph": "i", "cat": "kernel", "ts": 0, "name": "an instant"},
        ]
    )
    assert (seen.kernels, seen.copies, dict(seen.waits)) == (3, 1, {"cudaStreamSynchronize": 2})
    # Busy from 100 to 115, 120 to 125 and 135 to 140: 25 of 40.
    assert seen.idle_share == pytest.approx(15 / 40)
    assert seen.seconds == pytest.approx({"k": 30e-6})  # side by side or not, copies too


def test_the_profiler_sees_what_ran(tmp_path):
    a = torch.randn(8, 8)
    seen = trace.record(lambda: a @ a, 3, torch.device("cpu"), tmp_path / "trace.json.gz")
    assert seen.kernels >= 3 and seen.copies == 0 and not seen.waits  # a product of matrices is two operators, or one
    assert (tmp_path / "trace.json.gz").exists()
