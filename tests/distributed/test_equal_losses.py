"""The same run on any ranks, accumulation and ZeRO stage: equal losses and weights, up to rounding."""

from pathlib import Path

import numpy as np
import pytest

from imm_scale.training.checkpoint import Checkpoint
from tests import ranks
from tests.conftest import losses

STEPS = 20
# (ranks, ZeRO stage, micro-batch): 3 ranks share 16 groups unevenly, a micro-batch of 32 on one rank accumulates twice.
WORLDS = [(1, 1, 64), (1, 2, 64), (1, 3, 32), (1, 1, 32), (2, 0, 64), (2, 1, 16), (2, 2, 64), (2, 3, 64)]
WORLDS += [(3, 0, 64), (3, 1, 64), (3, 2, 16), (3, 3, 64)]


def _train(size: int, stage: int, micro_batch_size: int, run_dir: Path, tiny: list[str]) -> tuple[np.ndarray, dict]:
    settings = [f"zero.stage={stage}", f"train.micro_batch_size={micro_batch_size}", f"run.dir={run_dir}"]
    ranks.train(size, *tiny, f"train.max_steps={STEPS}", *settings, "train.grad_clip=0.1", "optimizer.weight_decay=0.1")
    checkpoint = Checkpoint.latest(str(run_dir))
    return np.array(losses(run_dir)), {state: checkpoint.weights(state) for state in ("weight", "ema-0.99")}


@pytest.fixture(scope="module")
def reference(digits: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, dict]:
    """One rank, nothing partitioned, no accumulation."""
    from tests.conftest import TINY

    run_dir = tmp_path_factory.mktemp("reference") / "run"
    return _train(1, 0, 64, run_dir, [*TINY, f"data.manifest={digits}"])


@pytest.mark.parametrize(("size", "stage", "micro_batch_size"), WORLDS)
def test_losses_and_weights_do_not_depend_on_the_world(size, stage, micro_batch_size, tiny, tmp_path, reference):
    curve, states = _train(size, stage, micro_batch_size, tmp_path / "run", tiny)
    assert len(curve) == STEPS
    # fp32 sums in another order: 1e-6 in a gradient, which Adam's division carries into weights of order 1e-2.
    np.testing.assert_allclose(curve, reference[0], rtol=1e-4)
    for state, tensors in states.items():
        for name, tensor in tensors.items():
            np.testing.assert_allclose(
                tensor, reference[1][state][name], rtol=1e-3, atol=2e-5, err_msg=f"{state} {name}"
            )


def test_the_curve_is_not_constant(reference):
    assert np.ptp(reference[0]) > 0.01, "equal curves would prove nothing"
