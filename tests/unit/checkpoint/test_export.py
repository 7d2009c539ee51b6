"""An export that is interrupted is not taken for whole, and leaves a file that stood there as it was."""

import os

import pytest

from imm_scale import storage
from imm_scale.checkpoint import export
from imm_scale.errors import UserError


@pytest.fixture
def interrupted(monkeypatch):
    """From now on Ctrl-C comes when the weights are written and about to get their name."""

    def interrupt(*paths: str) -> None:
        raise KeyboardInterrupt

    return lambda: monkeypatch.setattr(os, "replace", interrupt)


def test_a_file_stays_as_it_was(trained, tmp_path, interrupted):
    out = str(tmp_path / "weights.safetensors")
    export.export(trained, out)
    before = storage.read_bytes(out)
    interrupted()
    with pytest.raises(KeyboardInterrupt):
        export.export(trained, out, ema=0.0)
    assert storage.read_bytes(out) == before
    assert storage.list_names(str(tmp_path)) == ["weights.safetensors"], "nothing is left beside it"


@pytest.mark.parametrize("stood_there", [False, True])
def test_half_a_folder_is_no_export(stood_there, trained, tmp_path, interrupted):
    """Neither a new config beside old weights, nor the other way round."""
    out = str(tmp_path / "weights")
    if stood_there:
        export.export(trained, out, format="diffusers")
    interrupted()
    with pytest.raises(KeyboardInterrupt):
        export.export(trained, out, ema=0.0, format="diffusers")
    assert not export.is_export(out)
    with pytest.raises(UserError):
        export.read(out)
