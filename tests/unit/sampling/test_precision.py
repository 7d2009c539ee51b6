"""Samples in other precisions, and of a compiled net: what rounds, that sample i stays one thing, and that sets of
different arithmetic are never mixed."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imm_scale.checkpoint import export
from imm_scale.cli import main
from imm_scale.evaluation.records import read_evaluations
from imm_scale.models.layers import Fp32Linear
from imm_scale.parallel import world as distributed
from imm_scale.sampling.draw import Drawer, SamplingPlan, collect
from tests import ranks

PLAN = SamplingPlan(steps=2, labels=tuple(range(10)), num=100, seed=3, guidance_scale=1.5, batch_size=64)
# Demo weights after a full training: those of two steps hardly differ from their start, where the net says nothing.
DEMO = str(Path(__file__).parents[3] / "benchmarks" / "data" / "demo_imm.safetensors")


def _plan(**changes: object) -> SamplingPlan:
    return dataclasses.replace(PLAN, **changes)


def _latents(*plans: SamplingPlan) -> list[np.ndarray]:
    world = distributed.detect()
    distributed.init(world)
    spec, flow_map = export.load_net(DEMO)
    return [collect(flow_map, spec, plan, world).numpy() for plan in plans]


@pytest.fixture(scope="module")
def fp32() -> np.ndarray:
    return ranks.run(_latents, 1, PLAN)[0][0]


@pytest.mark.parametrize("computed", [{"precision": "bf16"}, {"precision": "bf16", "compile": True}])
def test_sample_i_is_one_thing_in_any_batch_on_any_ranks(computed, fp32):
    alone, at_once = ranks.run(_latents, 1, _plan(**computed), _plan(**computed, batch_size=128))[0]
    assert np.array_equal(at_once, alone)
    for (z,) in ranks.run(_latents, 2, _plan(**computed, num=70)):
        assert np.array_equal(z, alone[:70])
    # Products of 8 bits are off by some 2^-9 each; ten times that for the net's depth, two steps and guidance.
    difference = np.linalg.norm(alone - fp32) / np.linalg.norm(fp32)
    assert 2**-12 < difference < 10 * 2**-9, difference


def test_tf32_on_a_cpu_is_fp32(fp32):
    assert np.array_equal(ranks.run(_latents, 1, _plan(precision="tf32"))[0][0], fp32)


def _watched(plan: SamplingPlan) -> tuple[dict[str, set], list[tuple[Tensor, Tensor]], Tensor]:
    """Draws once: dtypes of what each kind of layer computes in, inputs and outputs of the net, the sample."""
    spec, flow_map = export.load_net(DEMO)
    seen: dict[str, set] = {}
    calls: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, given: tuple, out: Tensor) -> None:
        flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        seen.setdefault(type(module).__name__, set()).add((out.dtype, *flags))

    for module in flow_map.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(note)
    flow_map.model.register_forward_hook(lambda module, given, out: calls.append((given[0], out)))
    return seen, calls, Drawer(flow_map, spec, plan).draw(0, 64)[2]


@pytest.mark.parametrize(
    ("name", "product", "flags"),
    [
        ("fp32", torch.float32, (False, False)),
        ("tf32", torch.float32, (True, True)),
        ("bf16", torch.bfloat16, (False, False)),
    ],
)
def test_products_round_and_conditioning_does_not(name, product, flags, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as torch would have it
    seen, _, _ = _watched(_plan(precision=name))
    assert seen[Fp32Linear.__name__] == {(torch.float32, *flags)}
    assert seen["Linear"] == seen["Conv2d"] == {(product, *flags)}
    assert torch.backends.cudnn.allow_tf32, "the process's flags are as before"


def test_around_the_net_nothing_rounds():
    """One step from t_max to 0 of the straight path: x - (t - s) v, with the net's v as it came, in fp64."""
    _, [(given, out)], z = _watched(_plan(precision="bf16", steps=1, guidance_scale=1.0))
    sigma_d, t, s = 0.5, 0.994, 0.0
    x = given.double() * sigma_d * np.hypot(1.0 - t, t)
    # x is known here in fp32 only, as the net was given it.
    torch.testing.assert_close(z, x - (t - s) * sigma_d * out.double(), rtol=0, atol=2 * 2**-24 * x.abs().max().item())


def test_plans_do_not_leave_the_net_compiled():
    spec, flow_map = export.load_net(DEMO)
    blocks = flow_map.model.blocks
    for compiled in (True, True, False, True, False):
        Drawer(flow_map, spec, _plan(compile=compiled))
        assert [block._compiled_call_impl is not None for block in blocks] == [compiled] * len(blocks)


# --- sets ---


def _sample(out: Path, *more: str) -> tuple[int, str]:
    argv = ["sample", DEMO, "--steps", "1", "--num", "200", "--batch-size", "64", "--out", str(out), "--latents"]
    return ranks.run(ranks.command_and_output, 1, *argv, *more)[0]


def test_a_set_of_another_precision_is_drawn_whole_beside_the_one_that_is_there(tmp_path):
    half_done = tmp_path / "out"
    assert _sample(half_done, "--format", "webdataset")[0] == 0
    (half_done / "steps-1.json").unlink()  # as if stopped before its end
    (half_done / "steps-1.shards" / "samples-000002.json").unlink()
    code, output = _sample(half_done, "--format", "npz,webdataset", "--precision", "bf16")
    assert code == 0
    assert "200 samples in" in output, "none of fp32's parts was taken"
    assert len(list((half_done / "steps-1.shards").glob("*.tar"))) == 4, "and all of them are there"
    (drawn,) = half_done.glob("steps-1-*.npz")
    assert _sample(tmp_path / "undisturbed", "--format", "npz,webdataset", "--precision", "bf16")[0] == 0
    ours, theirs = (np.load(file) for file in (drawn, tmp_path / "undisturbed" / "steps-1.npz"))
    assert np.array_equal(ours["latents"], theirs["latents"])
    settings = json.loads(str(ours["settings"]))
    assert settings["precision"] == "bf16"
    assert settings["compile"] is False
    assert _sample(tmp_path / "other", "--format", "npz")[0] == 0
    assert not np.array_equal(np.load(tmp_path / "other" / "steps-1.npz")["latents"], ours["latents"])
    assert "is there already" in _sample(tmp_path / "other", "--format", "npz")[1]
    assert "is there already" not in _sample(tmp_path / "other", "--format", "npz", "sampling.precision=bf16")[1]


def test_evaluations_in_two_precisions_stand_beside_each_other(digits, tmp_path):
    argv = ["evaluate", DEMO, f"data.manifest={digits}", "--out", str(tmp_path / "evaluations"), "--repeats", "1"]
    argv += ["--steps", "1", "--num", "128"]
    for more in ((), ("--precision", "bf16"), ()):
        code, output = ranks.run(ranks.command_and_output, 1, *argv, *more)[0]
        assert code == 0, output
        assert (", bf16)" in output) == bool(more)
    by_precision = {result["precision"]: result for e in read_evaluations(str(tmp_path)) for result in e["results"]}
    assert sorted(by_precision) == ["bf16", "fp32"]
    assert len(list((tmp_path / "evaluations").iterdir())) == 2
    # The samples of one seed differ by their rounding alone, a hundredth of how the distance varies between seeds.
    assert 0 < abs(by_precision["bf16"]["value"] - by_precision["fp32"]["value"]) < by_precision["fp32"]["error"]


# --- mistakes ---


@pytest.fixture
def here() -> Iterator[None]:
    """For commands run in this process."""
    yield
    distributed.shutdown()


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(
    ("argv", "phrases"),
    [
        (["--precision", "fp16"], ["sampling.precision=fp16 needs a GPU", "sampling.precision=bf16"]),
        (["--precision", "fp64"], ["sampling.precision", "fp64", "bf16"]),
        (["--compile"], ["sampling.compile=true needs a C++ compiler", "no-such-compiler", "CXX"]),
        (["sampling.vae_precision=bf16"], ["sampling.vae_precision", "bf16", "tf32"]),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_this_machine_cannot_do_is_said(command, argv, phrases, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main([command, trained, "--steps", "1", "--num", "64", *argv]) == 2
    message = capsys.readouterr().err
    assert all(phrase in message for phrase in phrases), message
