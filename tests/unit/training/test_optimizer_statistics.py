"""Sums over slices against float64 arithmetic, and what taking them asks of a GPU."""

import math

import numpy as np
import pytest
import torch

from imm_scale.parallel.ema import ShardedEma
from imm_scale.parallel.param_slice import ParamSlice
from imm_scale.training.optimizer_statistics import OptimizerStatistics
from tests.transfers import Transfers

BETA2, EPS, STEPS = 0.999, 1e-8, 7
BIAS = 1.0 - BETA2**STEPS


def _shards(sizes: list[int], device: str = "cpu") -> list[ParamSlice]:
    generator = torch.Generator().manual_seed(0)
    shards = []
    for size in sizes:
        weight, first, second = torch.randn(3, size, generator=generator)
        states = {"weight": weight, "exp_avg": first, "exp_avg_sq": second.square() * EPS**2}
        shards.append(ParamSlice("w", (size,), 0, {key: value.to(device) for key, value in states.items()}))
    return shards


def test_sums_are_those_of_float64():
    shards = _shards([3, 1000, 17])
    bound = torch.tensor(EPS**2 * BIAS)
    second = shards[0].states["exp_avg_sq"]
    second[0], second[1], second[2] = bound, torch.nextafter(bound, torch.tensor(1.0)), 0.0
    ema = ShardedEma(shards, [0.5, 0.9])
    statistics = OptimizerStatistics(ema, BETA2, EPS)
    before = np.concatenate([shard.states["weight"].double().numpy() for shard in shards])
    statistics.remember()
    for shard in shards:
        shard.states["weight"].mul_(1.01)
    ema.update()
    weights, v, average = (
        np.concatenate([tensor.double().numpy() for tensor in tensors])
        for tensors in (
            [shard.states["weight"] for shard in shards],
            [shard.states["exp_avg_sq"] for shard in shards],
            ema.averages[0.9],
        )
    )
    update, weight, elements, below, total, _, distance = statistics.sums(STEPS).tolist()
    # Differences are taken in fp32, and their squares summed in fp64: 1e-6 relative of each difference's own rounding.
    assert update == pytest.approx(np.square(weights - before).sum(), rel=1e-4)
    assert distance == pytest.approx(np.square(average - weights).sum(), rel=1e-4)
    assert weight == pytest.approx(np.square(weights).sum(), rel=1e-12)
    assert total == pytest.approx(v.sum() / BIAS, rel=1e-12)
    # Compared as fp32: the bound itself counts, the next number above it does not.
    assert (elements, below) == (1020, (v.astype(np.float32) <= bound.numpy()).sum())
    assert v[0] <= float(bound) < v[1]


def test_an_update_is_measured_once_and_only_when_remembered():
    statistics = OptimizerStatistics(ShardedEma(_shards([4]), [0.5]), BETA2, EPS)
    assert math.isnan(statistics.sums(1)[0])
    statistics.remember()
    assert statistics.sums(1)[0] == 0.0
    assert math.isnan(statistics.sums(1)[0])


def test_a_rank_that_owns_nothing_adds_nothing():
    statistics = OptimizerStatistics(ShardedEma([], [0.5, 0.9]), BETA2, EPS)
    statistics.remember()
    assert statistics.sums(1).tolist() == [0.0] * 7


def _on_a_device(slices: int) -> Transfers:
    statistics = OptimizerStatistics(ShardedEma(_shards([5] * slices, "meta"), [0.5, 0.9]), BETA2, EPS)
    with Transfers() as seen:
        statistics.remember()
        assert statistics.sums(STEPS).device.type == "meta"
    return seen


def test_nothing_is_read_and_slices_cost_no_operators():
    few, many = _on_a_device(3), _on_a_device(300)
    assert not many.reads and not many.copies
    for seen in (few, many):
        del seen.operators["aten.empty_like"]  # allocates, launches nothing
    assert many.operators == few.operators
    assert many.operators.total() < 50
