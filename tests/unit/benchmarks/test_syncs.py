"""Waits for the device, told by the line that waited."""

import warnings

import torch

from benchmarks.gpu import syncs


def test_synchronizations_are_told_by_place_and_other_warnings_stay():
    # A GPU's warnings, made by hand: torch gives them the line of Python that waited.
    sync = "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:147.)"
    with warnings.catch_warnings(record=True) as outside:
        warnings.simplefilter("always")
        with syncs.counted(torch.device("cpu")) as counts:
            for _ in range(3):
                warnings.warn_explicit(sync, UserWarning, "/somewhere/engine.py", 12)
            warnings.warn_explicit(sync, UserWarning, "/somewhere/loop.py", 7)
            warnings.warn_explicit("something else", UserWarning, "/somewhere/loop.py", 8)
    assert counts == {"engine.py:12": 3, "loop.py:7": 1}
    assert [str(warning.message) for warning in outside] == ["something else"]
