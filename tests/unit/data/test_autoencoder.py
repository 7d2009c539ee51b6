"""An autoencoder is loaded whole, or refused by what is wrong with its files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from imm_scale.data import autoencoder
from imm_scale.errors import UserError
from tests.small_vae import save_small_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


def _with_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def _with_file(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["encoder.conv_in.weight"]
    save_file(tensors, folder / WEIGHTS)


def _cut(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_a_tensor, "lacks 1 tensors .* such as encoder.conv_in.weight"),
        (_with_config(layers_per_block=2), "lacks .* tensors of the AutoencoderKL that config.json describes"),
        (_with_config(block_out_channels=[16, 16]), "do not belong together"),
        (_with_config(norm_num_groups=3), "do not belong together"),
        (_with_config(down_block_types=["NoSuchBlock"] * 2), "do not belong together"),
        (_with_config(_class_name="AutoencoderTiny"), "is of class AutoencoderTiny"),
        (_with_file("config.json", b"{"), "config.json is not JSON"),
        (_with_file("config.json", b"[]"), "config.json describes no model"),
        (lambda folder: (folder / "config.json").unlink(), "no .*config.json"),
        (_with_file(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "a Git LFS pointer"),
        (_with_file(WEIGHTS, b""), "damaged"),
        (_cut, "damaged"),
    ],
)
def test_files_that_are_no_whole_autoencoder(tmp_path, damage, message):
    folder = save_small_vae(tmp_path / "vae")
    damage(tmp_path / "vae")
    with pytest.raises(UserError, match=message):
        autoencoder.load(folder)


def test_tensors_in_half_precision_and_by_the_names_of_older_releases(tmp_path):
    """sd-vae-ft-mse calls the projections of its attention query, key, value and proj_attn."""
    folder = save_small_vae(tmp_path / "vae")
    expected = {name: value.half().float() for name, value in autoencoder.load(folder).state_dict().items()}
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in load_file(tmp_path / "vae" / WEIGHTS).items():
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        tensors[name] = value.half()
    assert sum("proj_attn" in name for name in tensors) == 4
    save_file(tensors, tmp_path / "vae" / WEIGHTS)
    loaded = autoencoder.load(folder).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
