"""The proofs notice what they are for: each is given a defect of its kind."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import branches, conditioning, draws, heads, memory, stages, streams
from benchmarks.gpu.report import Context, Report
from imm_scale import rng
from imm_scale.data.loader import Batch
from imm_scale.models import block_causal, fp32_linear, layers
from imm_scale.models.heads import unembedding
from imm_scale.parallel.deepspeed_engine import Engine, StepResult
from tests import ranks


def _failed(section: Callable[[Context, Report], None], out: Path) -> list[str]:
    """Runs a section at size small and names the checks that failed."""
    report = Report(out / "section.json")
    section(Context("small", torch.device("cpu"), out), report)
    assert report.entries
    return [entry.name for entry in report.failed]


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`_failed`, with a compiler that generates nothing."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    return functools.partial(_failed, out=tmp_path)


def test_a_wrong_bit_on_tensors_is_noticed(failing, monkeypatch):
    plain = rng._philox_on_tensors
    monkeypatch.setattr(rng, "_philox_on_tensors", lambda *args: tuple(word ^ 1 for word in plain(*args)))
    failures = failing(draws.run)
    assert any(name.startswith("words, compiled") for name in failures)
    assert any(name.startswith("normals, compiled") for name in failures)


class _MatrixUnits(TorchDispatchMode):
    """Where tf32 is allowed, keeps 10 bits of the mantissas of fp32 factors and drops the rest, as a GPU does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        factors = {torch.ops.aten.mm.default: (0, 1), torch.ops.aten.addmm.default: (1, 2)}.get(func, ())
        cut = [
            (arg.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)
            if i in factors and arg.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
            else arg
            for i, arg in enumerate(args)
        ]
        return func(*cut, **(kwargs or {}))


@pytest.mark.parametrize(("split", "lost"), [(True, 0), (False, 3)])
def test_conditioning_rounded_to_tf32_is_noticed(split, lost, failing, monkeypatch):
    """Rounded inputs lose the difference of t and r at 0.95, 0.98 and 0.99; inputs in two parts keep it."""
    allowed = torch.backends.cuda.matmul.allow_tf32

    def rounds(x: torch.Tensor) -> bool:
        return split and x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32

    monkeypatch.setattr(fp32_linear, "rounds_to_tf32", rounds)
    with _MatrixUnits():
        failures = failing(conditioning.run)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    assert len(failures) == lost, failures


def test_a_weight_without_its_gradient_is_noticed(failing, monkeypatch):
    def forward(self: layers.Mlp, x: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(self.fc1(x), approximate="tanh")
        return F.linear(hidden, self.fc2.weight.detach(), self.fc2.bias)

    monkeypatch.setattr(layers.Mlp, "forward", forward)
    assert "bf16: parameters without a gradient" in failing(branches.run)


def test_a_block_that_is_compiled_again_and_again_is_noticed(failing, monkeypatch):
    plain = layers.Mlp.forward

    def forward(self: layers.Mlp, x: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1  # a number in the graph, another at each call
        return plain(self, x) * (1.0 + 1e-9 * self.calls)

    monkeypatch.setattr(layers.Mlp, "forward", forward)
    assert "bf16, compiled: graphs after the second step" in failing(branches.run)


def test_logits_in_16_bits_are_noticed(failing, monkeypatch):
    monkeypatch.setattr(unembedding, "without_autocast", lambda _: contextlib.nullcontext())
    failures = failing(lambda context, report: heads.prove(context, report, "factorized"))
    assert failures[0].startswith("factorized, bf16: ") and len(failures) >= 1


def test_a_block_that_is_not_kept_is_noticed(failing, monkeypatch):
    monkeypatch.setattr(block_causal.Cache, "past", lambda cache, layer: None)
    assert len(failing(streams.prove_sampling)) == 2


# Engines have a process of their own each, where what is changed stays.


def _with_leaked_engines(out: Path) -> list[str]:
    leaked, plain = [], Engine.close

    def close(self: Engine) -> None:
        leaked.append([shard.states for shard in self.held_slices()])
        plain(self)

    Engine.close = close  # type: ignore[method-assign]
    return _failed(memory.run, out)


def test_an_engine_that_is_not_let_go_is_noticed(tmp_path):
    (failures,) = ranks.run(_with_leaked_engines, 1, tmp_path)
    assert "stage 0: left of it after 3 were closed" in failures


def _with_another_rate_at_stage_1(out: Path) -> list[str]:
    plain = Engine.step

    def step(self: Engine, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        return plain(self, micro_batches, lr * (1.001 if self._stage == 1 else 1.0))

    Engine.step = step  # type: ignore[method-assign]
    cases = [stages._Case(1, "fp32"), stages._Case(2, "fp32")]
    stages._one_of_each = lambda _: cases  # type: ignore[assignment]
    return _failed(stages.run, out)


def test_a_stage_that_steps_further_is_noticed(tmp_path):
    assert ranks.run(_with_another_rate_at_stage_1, 1, tmp_path) == [["stage 1, fp32: change of the weights, relative"]]
