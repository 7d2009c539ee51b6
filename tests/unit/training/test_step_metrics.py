"""What a record says, against the checkpoints of the same run and against float64 arithmetic."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from imm_scale import build, rng
from imm_scale.checkpoint.export import load_net
from imm_scale.checkpoint.format import Checkpoint
from imm_scale.checkpoint.run_folder import read_metrics
from imm_scale.data import codec as codecs
from imm_scale.data import sample_order
from imm_scale.data.batch import Batch
from imm_scale.data.dataset import Dataset
from imm_scale.methods.base import GroupLosses
from imm_scale.parallel.deepspeed_engine import StepResult
from imm_scale.planner import flops as cost
from imm_scale.training.step_metrics import Meter, measured_peak
from tests import ranks
from tests.conftest import TINY
from tests.transfers import Transfers

STEPS = 4
SETTINGS = [
    *TINY,
    "model.dropout=0.1",
    f"train.max_steps={STEPS}",
    "train.checkpoint_every=1",
    "train.keep_last=9",
    "data.holdout=102",
    "train.holdout_every=2",
    "train.peak_flops=1e9",
    "train.profile_steps=[2,3]",
]


@pytest.fixture(scope="module")
def run(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three ranks at stage 2 with a checkpoint of every step."""
    run_dir = tmp_path_factory.mktemp("metered") / "run"
    ranks.train(3, *SETTINGS, f"data.manifest={digits}", f"run.dir={run_dir}", "zero.stage=2")
    return run_dir


def _flat(run_dir: Path, step: int, state: str) -> np.ndarray:
    """All of one state at a step as one float64 vector."""
    weights = Checkpoint.of_step(str(run_dir), step).weights(state)
    return np.concatenate([tensor.double().numpy().ravel() for _, tensor in sorted(weights.items())])


def test_norms_and_distances_are_those_of_the_checkpoints(run):
    before, after = _flat(run, 3, "weight"), _flat(run, 4, "weight")
    record = read_metrics(str(run))[-1]
    # fp32 norms of slices against float64: 1e-6 of each.
    assert record["update_norm"] == pytest.approx(np.linalg.norm(after - before), rel=1e-5)
    assert record["weight_norm"] == pytest.approx(np.linalg.norm(after), rel=1e-5)
    distance = np.linalg.norm(_flat(run, 4, "ema-0.99") - after) / np.linalg.norm(after)
    assert record["ema_distance_0.99"] == pytest.approx(distance, rel=1e-5)


def test_adams_second_moment_against_its_epsilon(run):
    corrected = _flat(run, 4, "exp_avg_sq") / (1 - 0.999**4)
    record = read_metrics(str(run))[-1]
    # An element may lie on the bound within rounding: one of thousands.
    assert record["adam_below_eps"] == pytest.approx((np.sqrt(corrected) <= 1e-8).mean(), abs=1e-4)
    assert 0 < record["adam_below_eps"] < 1
    assert record["adam_rms_over_eps"] == pytest.approx(math.sqrt(corrected.mean()) / 1e-8, rel=1e-5)


def test_utilization_is_arithmetic_over_time_and_peak(run):
    net = Checkpoint.latest(str(run))
    spec = build.ModelSpec.from_json(net.meta.spec)
    flops = 2 * cost.training_multiply_adds(spec.net, spec.method.passes, 64)
    for record in read_metrics(str(run)):
        assert record["flops_utilization"] == pytest.approx(flops / record["step_seconds"] / 3e9, rel=1e-9)
        assert record["step_seconds_p50"] <= record["step_seconds_p95"] <= record["step_seconds_max"]
        assert 0 <= record["data_share"] < 1
        assert record["data_share"] * record["step_seconds"] == pytest.approx(record["data_seconds"])


def test_a_trace_of_the_steps_asked_for(run):
    (trace,) = (run / "profile").iterdir()
    assert trace.name == "steps-2-3.json"
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::scaled_dot_product_attention" in names


def test_the_peak_is_measured_on_random_data(monkeypatch):
    factors, matmul = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: factors.append((a, b)) or matmul(a, b))
    assert measured_peak(torch.device("cpu"), "bf16") > 0
    assert measured_peak(torch.device("cpu"), "bf16") > 0
    a, b = factors[0]
    assert a.dtype == b.dtype == torch.bfloat16 and not torch.equal(a, b)
    # 768^2 standard normals: their standard deviation is 1 within 1 / sqrt(2) / 768 = 0.0009 and bf16's rounding.
    assert [float(x.float().std()) for x in (a, b)] == pytest.approx([1.0, 1.0], abs=0.01)
    assert all(torch.equal(x, y) for pair in factors for x, y in zip(pair, (a, b), strict=True))


def _held_out_loss(run_dir: Path, manifest: str) -> float:
    """By the method itself, one group at a time, on the weights of the last checkpoint."""
    dataset = Dataset(manifest)
    held = sample_order.held_out(dataset.shard_samples, 32, 0, 102.0)
    spec, net = load_net(str(run_dir), 0.0, STEPS)
    net.model.eval()
    method, losses = build.method(spec), []
    for group in range(102 // 4):
        index = held[4 * group : 4 * group + 4]
        raw = torch.stack([torch.from_numpy(dataset.read(i, i + 1)[0]).float() for i in index])
        x = codecs.normalize(raw, spec.space.codec.mean, spec.space.codec.std, 0.5)
        ordinal = (1 << 48) + 4 * group + torch.arange(4)
        with torch.no_grad():
            batch = Batch(0, x, torch.from_numpy(dataset.labels[index]), ordinal, torch.ones(1))
            losses.append(float(method.loss(net, batch, 0).loss_G[0]))
    return float(np.mean(losses))


def test_the_held_out_loss_is_that_of_the_saved_weights(run, digits, tmp_path):
    records = read_metrics(str(run))
    assert ["holdout_loss" in record for record in records] == [False, True, False, True]
    # fp32 sums over other shapes of batches.
    assert records[-1]["holdout_loss"] == pytest.approx(_held_out_loss(run, digits), rel=1e-4)
    ranks.train(1, *SETTINGS, f"data.manifest={digits}", f"run.dir={tmp_path}/run", "zero.stage=0")
    alone = read_metrics(str(tmp_path / "run"))
    assert alone[-1]["holdout_loss"] == pytest.approx(records[-1]["holdout_loss"], rel=1e-4)
    for name in ("update_norm", "weight_norm", "ema_distance_0.99", "adam_rms_over_eps", "grad_norm", "loss_t_0_25"):
        # Sums in another order, carried through four Adam steps.
        assert [r[name] for r in alone] == pytest.approx([r[name] for r in records], rel=1e-3), name


class _NoStatistics:
    def sums(self, optimizer_steps: int) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.float64)

    def record(self, sums: list[float]) -> dict[str, float]:
        return {}


class _Half:
    def of(self, step_seconds: float) -> float:
        return 0.5


def test_losses_by_quarter_of_t_leave_padding_and_skipped_steps_out():
    meter = Meter(torch.device("cpu"), 8, _NoStatistics(), _Half())
    t = torch.tensor([0.1, 0.2, 0.3, 0.99, 1.0, 0.6], dtype=torch.float64)
    loss = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0, 100.0], dtype=torch.float64)
    weight = torch.tensor([1.0, 1, 1, 1, 1, 0])
    meter.add(StepResult(torch.tensor(5.0), 2.0, False, None, GroupLosses(loss, t)), weight, 0.25)
    bad = StepResult(torch.tensor(math.nan), math.nan, True, None, GroupLosses(loss * math.nan, t))
    meter.add(bad, weight, 0.75)
    record = meter.record(1, 0.0, {"retries": 3})
    assert [record[f"loss_t_{q}"] for q in ("0_25", "25_50", "50_75", "75_100")] == [2.0, 5.0, None, 8.0]
    assert (record["loss"], record["grad_norm"]) == (5.0, 2.0)
    assert (record["step_seconds_p50"], record["step_seconds_max"], record["data_retries"]) == (0.5, 0.75, 3)
    assert meter.is_empty


def test_a_step_is_one_addition_and_a_record_one_read(monkeypatch):
    """The meta device stands for a GPU: reading a value of its tensors fails."""
    device = torch.device("meta")
    meter = Meter(device, 8, _NoStatistics(), _Half())
    result = StepResult(
        torch.zeros((), dtype=torch.float64, device=device),
        2.0,
        False,
        None,
        GroupLosses(*torch.ones(2, 6, dtype=torch.float64, device=device)),
    )
    weight = torch.ones(6, device=device)
    with Transfers() as steps:
        for _ in range(3):
            meter.add(result, weight, 0.1)
    assert dict(steps.operators) == {"aten.add_": 3}
    read = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda whole: read.append(whole.device) or torch.ones(len(whole)).double())
    with Transfers() as record:
        assert meter.record(1, 0.0, {"retries": 3})["loss_t_0_25"] == 1.0
    assert read == [device]
    assert record.copies == [("cpu", "meta", True)] * 2, "what reading has met, and no statistics"


def test_every_step_skipped_leaves_no_loss():
    meter = Meter(torch.device("cpu"), 8, _NoStatistics(), _Half())
    groups = GroupLosses(torch.full((2,), math.nan), torch.tensor([0.1, 0.9]))
    meter.add(StepResult(torch.tensor(math.nan), math.inf, True, 4.0, groups), torch.ones(2), 0.1)
    record = meter.record(0, 0.0, {})
    assert record["loss"] is None
    assert record["grad_norm"] is None
    assert record["loss_scale"] == 4.0


def test_held_out_draws_are_out_of_trainings_reach():
    # 1.2 M steps of 4,096 images are 2^32.2; the draws of other ordinals are others.
    ours, training = torch.arange(4) + (1 << 48), torch.arange(4)
    assert not torch.equal(rng.uniform(0, "times", ours, 2), rng.uniform(0, "times", training, 2))


def test_monitors_without_gaps_are_averaged_over_all_groups():
    meter = Meter(torch.device("cpu"), 8, _NoStatistics(), _Half())
    monitors = {"component_entropy": torch.tensor([1.0, 2.0, 50.0])}
    groups = GroupLosses(torch.ones(3).double(), torch.zeros(3).double(), monitors)
    weight = torch.tensor([1.0, 1, 0])
    for _ in range(2):
        meter.add(StepResult(torch.tensor(1.0), 2.0, False, None, groups), weight, 0.1)
    assert meter.record(1, 0.0, {})["component_entropy"] == 1.5
