"""DiT's and SiT's published state dicts: the same function as flow maps, or refused by name."""

import os
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from imm_scale import build, storage
from imm_scale.checkpoint import export
from imm_scale.checkpoint.released import state_dicts
from imm_scale.checkpoint.released.dit_layout import Released
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMap
from tests import ranks
from tests.unit.checkpoint import published_transformers as published

# Folded weights are rounded to fp32 once more (6e-8 of weights of order 1, some hundred of them in a row).
TOLERANCE = 2e-6


def _flow_map(released: Released) -> FlowMap:
    """In float64, so that only the weights are rounded."""
    flow_map = build.net(released.spec)
    export.put(flow_map, released.weights, "the test")
    return flow_map.eval().requires_grad_(False).double()


def _written(path: Any, document: Any) -> str:
    if str(path).endswith(".safetensors"):
        save_file(document, path)
    else:
        torch.save(document, path)
    return str(path)


def _image(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(published.CHANNELS, published.SIDE, published.SIDE))


def _moved(flow_map: FlowMap, x: np.ndarray, s: float, t: float, label: int) -> np.ndarray:
    """f_{s,t}(x) of one image."""
    times = (torch.tensor([u], dtype=torch.float64) for u in (s, t))
    return flow_map(torch.from_numpy(x)[None], *times, torch.tensor([label]))[0].numpy()


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("out_channels", [4, 8])
def test_sit_steps_along_its_velocity(ending, out_channels, tmp_path):
    weights = published.state_dict(out_channels=out_channels)
    released = state_dicts.read(_written(tmp_path / f"sit.{ending}", weights), "sit", heads=2)
    flow_map, sit, x = _flow_map(released), published.Net(weights), _image()
    for t, s, label in ((1.0, 0.9, 0), (0.7, 0.2, 3), (0.5, 0.4999, 5), (0.01, 0.0, 4)):
        u = 1 - t
        velocity = sit(x, u, label)[: published.CHANNELS]  # dx / du, towards data
        stepped = x + (t - s) * velocity
        np.testing.assert_allclose(_moved(flow_map, x, s, t, label), stepped, rtol=0, atol=TOLERANCE)
    assert np.abs(velocity).max() > 0.1, "the net must matter for this test to mean anything"


def test_dit_takes_ddims_step_between_its_noise_levels(tmp_path):
    weights = published.state_dict()
    released = state_dicts.read(_written(tmp_path / "dit.pt", published.checkpoint(weights)), "dit", heads=2)
    flow_map, dit, x = _flow_map(released), published.Net(weights), _image()
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for k, j, label in ((999, 500, 0), (700, 699, 5), (250, 10, 2), (1, 0, 4)):
        eps = dit(x, float(k), label)[: published.CHANNELS]
        clean = (x - np.sqrt(1 - alpha_bar[k]) * eps) / np.sqrt(alpha_bar[k])
        after = np.sqrt(alpha_bar[j]) * clean + np.sqrt(1 - alpha_bar[j]) * eps  # DDIM, eta = 0
        # On our straight lines the same noise-to-data ratio is at t = sigma / (alpha + sigma), x over (alpha + sigma).
        t, s = (np.sqrt(1 - alpha_bar[i]) / (np.sqrt(alpha_bar[i]) + np.sqrt(1 - alpha_bar[i])) for i in (k, j))
        scale_t, scale_s = (np.sqrt(alpha_bar[i]) + np.sqrt(1 - alpha_bar[i]) for i in (k, j))
        moved = _moved(flow_map, x / scale_t, s, t, label) * scale_s
        # Data is the noise's answer over alpha, 157 times as far off at step 999.
        np.testing.assert_allclose(moved, after, rtol=0, atol=TOLERANCE / np.sqrt(alpha_bar[k]))
    assert np.abs(eps).max() > 0.1


def test_samples_are_latents_times_their_factor(tmp_path):
    source = _written(tmp_path / "sit.pt", published.state_dict())
    space = state_dicts.read(source, "sit", heads=2).spec.space
    assert (space.sigma_data, space.shape, space.num_classes, space.codec.image_size) == (1.0, (4, 8, 8), 5, 64)
    posterior = torch.cat([torch.full((1, 4, 8, 8), 2.0), torch.zeros(1, 4, 8, 8)], dim=1)  # mean 2, deviation 0
    z = space.from_stored(posterior, 0, "posterior", torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(z, torch.full((1, 4, 8, 8), 2 * 0.18215), rtol=1e-6, atol=0)


def test_wrapped_names_and_any_url_are_read(tmp_path):
    weights = published.state_dict()
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "ddp.pt")
    storage.write_bytes("memory://published/ddp.pt", (tmp_path / "ddp.pt").read_bytes())
    plain = state_dicts.read(_written(tmp_path / "sit.pt", weights), "sit", heads=2)
    wrapped = state_dicts.read("memory://published/ddp.pt", "sit", heads=2)
    assert plain.spec == wrapped.spec
    assert all(torch.equal(value, wrapped.weights[name]) for name, value in plain.weights.items())


# What does not fit is refused by name


def _without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key != name}


def _unlike() -> dict[str, tuple[Any, str]]:
    weights = published.state_dict()
    rows_first = weights["pos_embed"].roll(published.WIDTH // 2, 2)
    final = {f"final_layer.linear.{part}": weights[f"final_layer.linear.{part}"][:12] for part in ("weight", "bias")}
    return {
        "missing": (_without(weights, "blocks.1.mlp.fc2.bias"), "it has no blocks.1.mlp.fc2.bias"),
        "left over": (weights | {"blocks.0.attn.q_norm.weight": torch.ones(8)}, "'blocks.0.attn.q_norm.weight'"),
        "other names": ({"transformer_blocks.0.w": torch.ones(2)}, "x_embedder.proj.weight"),
        "positions": (weights | {"pos_embed": rows_first}, "pos_embed is not the sin-cos table"),
        "channels": (weights | final, "final_layer.linear.bias is torch.float32 [12], needed: [16]"),
        "not a tensor": (weights | {"step": 3}, "'step' is 3, not a tensor"),
        "no dict": ([1, 2], "no dict of tensors"),
        "noise": (published.checkpoint(weights, prediction="noise"), "prediction='noise'; only velocity"),
        "path": (published.checkpoint(weights, path_type="GVP"), "path_type='GVP'; only Linear"),
    }


@pytest.mark.parametrize("case", _unlike())
def test_an_unlike_net_is_refused_by_name(case, tmp_path):
    document, text = _unlike()[case]
    with pytest.raises(UserError) as caught:
        state_dicts.read(_written(tmp_path / "net.pt", document), "sit", heads=2)
    assert text in str(caught.value) and "net.pt" in str(caught.value)


class _Hostile:
    def __init__(self, canary: str):
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("damage", ["code", "text", "cut", "empty"])
def test_what_is_no_file_of_weights_is_refused_and_nothing_runs(damage, tmp_path):
    path, canary = tmp_path / "net.pt", tmp_path / "canary"
    torch.save(published.state_dict() | ({"x": _Hostile(str(canary))} if damage == "code" else {}), path)
    data = {"code": path.read_bytes(), "text": b"hello", "cut": path.read_bytes()[:5000], "empty": b""}[damage]
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"net\.pt cannot be loaded as weights alone, and nothing in it was run"):
        state_dicts.read(str(path), "sit", heads=2)
    assert not canary.exists()
    if damage == "code":
        with pytest.raises((RuntimeError, AttributeError, pickle.UnpicklingError)):
            torch.load(path, weights_only=True)


# The command


def test_the_command_writes_a_model_that_works(tmp_path):
    weights = published.state_dict()
    source = _written(tmp_path / "sit.pt", published.checkpoint(weights, path_type="Linear", prediction="velocity"))
    out = str(tmp_path / "sit.safetensors")
    code, text = ranks.command_and_output("import", source, "--from", "sit", "--heads", "2", "--out", out)
    assert code == 0 and "its 'ema' is taken" in text and "--vae" in text
    flow_map, x = export.load_net(out)[1].double(), _image()
    expected = x + 0.5 * published.Net(weights)(x, 0.3, 2)[: published.CHANNELS]
    np.testing.assert_allclose(_moved(flow_map, x, 0.2, 0.7, 2), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["net.pt"], "give --from sit or --from dit"),
        (["net.safetensors"], "give --from sit or --from dit"),
        (["net.pt", "--from", "sit"], "--heads"),
        (["net.pt", "--from", "dit", "--heads", "3"], "num_heads=3"),
        (["net.pt", "--from", "sit", "--second-time", "s"], "sit knows no second time"),
        (["net.pkl", "--heads", "2"], "it is for --from sit and dit"),
        (["nowhere.pt", "--from", "sit"], "does not exist"),
        ([".", "--from", "sit"], "cannot be loaded"),
    ],
)
def test_the_command_refuses(argv, text, tmp_path):
    torch.save(published.state_dict(), tmp_path / "net.pt")
    source, *flags = argv
    out = ["--out", f"{tmp_path}/x.safetensors"]
    code, printed = ranks.command_and_output("import", str(tmp_path / source), *flags, *out)
    assert code == 2 and text in printed and "Traceback" not in printed
    assert not (tmp_path / "x.safetensors").exists()
