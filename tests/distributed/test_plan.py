"""The planner against real engines: memory, FLOPs and bytes on the wire of every ZeRO stage at one and two ranks."""

import os
from typing import Any

import pytest

from imm_scale import config as configs
from imm_scale.planner import estimate as plan
from imm_scale.planner import memory
from imm_scale.planner.estimate import Estimate
from tests import measure, ranks

# Buckets smaller than the net, so that they fill and are emptied on the way.
COMMON = ["model.heads=4", "zero.extra.zero_optimization.reduce_bucket_size=1000000"]
# Activations lead in the first. Gradients and weights do in the second: 4 tokens, and enough blocks that those which
# stage 3 gathers at once are a small part.
NETS = {
    "activations": ["model.depth=4", "model.width=128", "train.global_batch_size=32", "train.micro_batch_size=8"],
    "gradients": [
        "model.depth=8",
        "model.width=256",
        "model.patch_size=8",
        "train.global_batch_size=16",
        "train.micro_batch_size=4",
        "ema.decays=[0.9,0.99]",
    ],
}
HALF = "bf16 zero.reduce_precision=autocast"
# (ranks, precision, net, stages)
COVERING = [
    (2, "fp32", "gradients", (0, 1, 2, 3)),
    (1, "fp32", "activations", (0, 3)),
    (2, "bf16", "gradients", (1, 3)),
    (2, HALF, "gradients", (2, 3)),
]
ALL = [
    (size, precision, net, (0, 1, 2, 3)[precision == HALF :])
    for size in (1, 2)
    for precision in ("fp32", "bf16", HALF)
    for net in NETS
]
CASES = ALL if int(os.environ.get("IMM_SOAK", "1")) > 1 else COVERING  # as `make soak` sets it
TOLERANCE = 0.1  # what the planner claims


def _predicted(overrides: list[str], size: int) -> tuple[Estimate, memory.Setting]:
    config = configs.load([], [*measure.LATENTS, *overrides]).config
    estimate = plan.estimate(config, 1, size, "a100-40gb")
    return estimate, plan.setting(config, estimate.net, estimate.layout)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}".replace(" ", "-"))
def measured(request) -> list[tuple[list[str], int, list[dict[str, Any]]]]:
    """(overrides, ranks, what each rank measured) of every stage."""
    size, precision, net, stages = request.param
    cases = [[*COMMON, *NETS[net], *f"precision={precision}".split(), f"zero.stage={stage}"] for stage in stages]
    by_rank = ranks.run(measure.engines, size, cases)
    return [(case, size, [rank[index] for rank in by_rank]) for index, case in enumerate(cases)]


def test_what_is_held_between_steps(measured):
    """Weights, optimizer, averages, and at stage 3 gradients and buckets."""
    for overrides, size, measurements in measured:
        estimate, setting = _predicted(overrides, size)
        predicted = memory.between_steps(setting, estimate.parameters).total
        assert predicted == pytest.approx(max(rank["held"] for rank in measurements), rel=TOLERANCE), overrides


def test_the_peak_of_a_step(measured):
    for overrides, size, measurements in measured:
        estimate, setting = _predicted(overrides, size)
        peak = memory.peak(setting, estimate.parameters)
        assert peak.total == pytest.approx(max(rank["peak"] for rank in measurements), rel=TOLERANCE), (
            peak.when,
            overrides,
        )


def test_flops(measured):
    """Up to the first layer, whose input needs no gradient."""
    for overrides, size, measurements in measured:
        estimate, _ = _predicted(overrides, size)
        assert estimate.executed_flops == pytest.approx(measurements[0]["flops"], rel=TOLERANCE), overrides


def test_bytes_on_the_wire(measured):
    for overrides, size, measurements in measured:
        if size == 1:
            continue  # collectives of one rank send nothing
        estimate, _ = _predicted(overrides, size)
        sent = measurements[0]["sent"]
        predicted = {item.collective: item.payload for item in estimate.traffic}
        for collective in predicted.keys() | sent.keys():
            # 1 % of the weights: norms and counts that DeepSpeed reduces beside the tensors
            slack = 0.01 * 4 * estimate.parameters.total
            assert predicted.get(collective, 0.0) == pytest.approx(sent.get(collective, 0), rel=TOLERANCE, abs=slack), (
                collective,
                overrides,
            )
