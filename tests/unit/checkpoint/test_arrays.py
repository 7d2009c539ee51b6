"""Pickles of numpy arrays, read as data; what else they hold is refused by its name."""

import collections
import contextlib
import os
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest

from imm_scale.checkpoint.released.arrays import load_arrays
from imm_scale.errors import UserError

_MU = np.random.default_rng(0).standard_normal(5)
_SIGMA = np.cov(np.random.default_rng(1).standard_normal((5, 40)))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_and_kind_of_number_comes_back(protocol):
    kinds = {f"{order}{code}": np.arange(6).astype(order + code) for order in "<>" for code in ("f2", "f8", "i4", "u2")}
    entry = {
        "mu": _MU, "sigma": np.asfortranarray(_SIGMA), "empty": np.zeros((0, 3)), "bytes": np.arange(4, dtype="u1"),
        "flags": np.array([True, False]), "cube": np.arange(24.0).reshape(2, 3, 4), **kinds,
    }  # fmt: skip
    document = collections.OrderedDict(num_images=50_000, fid=entry, scalar={"n": np.float64(2.5), "i": np.int64(7)})
    loaded = load_arrays(pickle.dumps(document, protocol), "file")
    assert loaded["num_images"] == 50_000
    for name, array in entry.items():
        assert loaded["fid"][name].dtype == array.dtype
        np.testing.assert_array_equal(loaded["fid"][name], array)
    assert (loaded["scalar"]["n"], loaded["scalar"]["i"]) == (2.5, 7)


def test_the_name_numpys_core_had_before_version_2_is_read():
    data = pickle.dumps({"fid": {"mu": _MU}}, 3)
    older = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert older != data
    np.testing.assert_array_equal(load_arrays(older, "file")["fid"]["mu"], _MU)


class _Runs:
    def __init__(self, callee, *args):
        self._call = callee, args

    def __reduce__(self):
        return self._call


class _Sub(np.ndarray):
    pass


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (_Runs(os.system, "touch owned"), "posix.system"),
        (_Runs(eval, "1"), "builtins.eval"),
        (_Runs(Path, "x"), "pathlib"),
        (_Runs(np.load, "owned.npy", None, True), "numpy.load"),
        (np.array([{}], dtype=object), "'O8'"),
        (np.array(["text"]), "'U4'"),
        (np.zeros(2, dtype=[("a", "f8"), ("b", "f8")]), "'V16'"),
        (np.zeros(3).view(_Sub), "_Sub"),
        (np.datetime64("2026-01-01"), "'M8'"),
        (collections.Counter("ab"), "collections.Counter"),
    ],
)
def test_anything_else_is_refused_by_name_and_not_run(value, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nothing in it was run") as refusal:
        load_arrays(pickle.dumps({"fid": {"mu": _MU, "sigma": value}}), "the reference file.pkl")
    assert named in str(refusal.value)
    assert "the reference file.pkl" in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_cut_or_changed_anywhere_is_refused_or_read():
    """Never anything but a UserError or plain values."""
    data = pickle.dumps({"num_images": 3, "fid": {"mu": _MU[:2], "sigma": _SIGMA[:2, :2]}})
    positions = [position for _, _, position in pickletools.genops(data)]
    for end in range(1, len(data)):
        with pytest.raises(UserError):
            load_arrays(data[:end], "file")
    for position in positions:
        for other in (0, 0x28, 0x4E, 0x52, 0x62, 0x94, 0xFF):
            changed = data[:position] + bytes([other]) + data[position + 1 :]
            with contextlib.suppress(UserError):
                load_arrays(changed, "file")


def test_numbers_that_are_not_all_there_and_dicts_in_themselves():
    data = pickle.dumps({"fid": {"mu": np.zeros(2)}}, 4)
    assert data.count(b"K\x02\x85") == 1  # the shape, (2,)
    with pytest.raises(UserError, match="16 bytes that says it has 9 numbers"):
        load_arrays(data.replace(b"K\x02\x85", b"K\x09\x85"), "file")
    circle: dict = {}
    circle["fid"] = circle
    assert load_arrays(pickle.dumps(circle), "file").keys() == {"fid"}
