"""The proofs notice what they are for: each is given a defect of its kind."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu import branches, draws, memory, stages
from benchmarks.gpu.report import Context, Report
from imm_scale import rng
from imm_scale.data.loader import Batch
from imm_scale.models import layers
from imm_scale.training.engine import Engine, StepResult
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
    found = failing(draws.run)
    assert any(name.startswith("words, compiled") for name in found)
    assert any(name.startswith("normals, compiled") for name in found)


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


# Engines have a process of their own each, where what is changed stays.


def _with_kept_engines(out: Path) -> list[str]:
    kept, plain = [], Engine.close

    def close(self: Engine) -> None:
        kept.append([shard.states for shard in self.held_shards()])
        plain(self)

    Engine.close = close  # type: ignore[method-assign]
    return _failed(memory.run, out)


def test_an_engine_that_is_not_let_go_is_noticed(tmp_path):
    (found,) = ranks.run(_with_kept_engines, 1, tmp_path)
    assert "stage 0: left of it after 3 were closed" in found


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
