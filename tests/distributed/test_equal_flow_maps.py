"""Every flow-map method on any ranks, accumulation and ZeRO stage: equal losses and weights but rounding."""

import json
from pathlib import Path

import numpy as np
import pytest

from imm_scale.checkpoint.format import Checkpoint
from imm_scale.errors import UserError
from tests import ranks
from tests.conftest import ANY_METHOD

CONFIGS = Path(__file__).parents[2] / "configs" / "method"
STEPS = 5
CHECKPOINTING = "train.activation_checkpointing=true"
# (ranks, ZeRO stage, micro-batch, what else). 64 samples are 16 strata: 3 ranks and micro-batches of 6 cut them.
CASES = [
    (1, 0, 64, ""),
    (1, 3, 16, CHECKPOINTING),
    (2, 2, 6, CHECKPOINTING),
    (2, 3, 32, ""),
    (3, 1, 64, ""),
]
METHODS = {
    "meanflow": ["method.guidance.kappa=0.5"],
    "imf": [],
    "imf-told": ["method.guidance.kind=condition", "model.dropout=0.1"],
    "soflow": [f"method.schedule_images={64 * STEPS}"],
    "sct": [f"method.schedule_images={64 * STEPS}"],
    "shortcut": [],
    "tvm": [],
}


def _folder(folder: Path, method: str, case: tuple[int, int, int, str]) -> Path:
    return folder / "-".join(str(part).replace("=", "_") for part in (method, *case) if part != "")


def _argv(method: str, case: tuple[int, int, int, str], folder: Path, digits: str) -> list[str]:
    _, stage, micro, more = case
    settings = [f"zero.stage={stage}", f"train.micro_batch_size={micro}", *([more] if more else [])]
    common = [*ANY_METHOD, "optimizer.eps=1e-4", f"train.max_steps={STEPS}", f"data.manifest={digits}"]
    where = f"run.dir={_folder(folder, method, case)}"
    return [str(CONFIGS / f"{method.partition('-')[0]}.yaml"), *common, *METHODS[method], *settings, where]


def _cases(method: str) -> list[tuple[int, int, int, str]]:
    return [case for case in CASES if method != "tvm" or case[1] < 3]


@pytest.fixture(scope="module")
def trained_flow_maps(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method in every case; those of one size share their processes."""
    folder = tmp_path_factory.mktemp("flow_maps")
    for size in (1, 2, 3):
        pairs = [(method, case) for method in METHODS for case in _cases(method) if case[0] == size]
        ranks.train_each(size, [_argv(method, case, folder, digits) for method, case in pairs])
    return folder


def _curve(run_dir: Path) -> np.ndarray:
    """Losses and, as adaptive ones read 1 whatever happens, the residuals behind them, (steps, quantities)."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in records[0] if name == "loss" or name.startswith(("residual_", "tangent_rms_"))]
    assert len(names) > 1
    return np.array([[record[name] for name in names] for record in records], dtype=float)


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_weights_do_not_depend_on_the_world(method, trained_flow_maps):
    folders = [_folder(trained_flow_maps, method, case) for case in _cases(method)]
    curve = _curve(folders[0])
    assert len(curve) == STEPS and np.nanmax(np.ptp(curve, axis=0)) > 1e-3
    expected = Checkpoint.latest(str(folders[0])).weights()
    for folder in folders[1:]:
        np.testing.assert_allclose(_curve(folder), curve, rtol=1e-4, err_msg=folder.name)  # residuals of single groups
        for name, tensor in Checkpoint.latest(str(folder)).weights().items():
            # Weights move by up to 5 learning rates of 1e-3, from values of order 1e-1.
            np.testing.assert_allclose(tensor, expected[name], rtol=2e-5, atol=2e-5, err_msg=f"{folder.name} {name}")


def test_a_live_tangent_is_refused_at_stage_3(digits):
    from imm_scale import config

    with pytest.raises(UserError, match=r"method\.name=tvm.*stage"):
        config.load_words([str(CONFIGS / "tvm.yaml"), f"data.manifest={digits}", "zero.stage=3"])
