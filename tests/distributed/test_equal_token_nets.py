"""Nets over tokens on any ranks, accumulation and ZeRO stage: equal losses and weights but rounding."""

import json
from pathlib import Path

import numpy as np
import pytest

from imm_scale.checkpoint.format import Checkpoint
from tests import ranks, small_tokens
from tests.conftest import ANY_METHOD

STEPS = 4
CHECKPOINTING = "train.activation_checkpointing=true"
# (ranks, ZeRO stage, micro-batch, what else). A sample is a group: micro-batches of 12 end in one that is not full.
CASES = [
    (1, 0, 64, ""),
    (1, 3, 16, CHECKPOINTING),
    (2, 2, 12, CHECKPOINTING),
    (2, 3, 32, ""),
    (3, 1, 64, ""),
]
NETS = {
    "masked": ["method.name=masked", "method.steps=[1,4,16]", "model.head.kind=autoregressive", "model.dropout=0.1"],
    "next_block": [
        "method.name=next_block",
        "model.causal=true",
        "model.block=3",
        "model.head.kind=mixture",
        "model.head.components=3",
        "model.qk_norm=true",
        "model.positions=rotary",
    ],
}


def _folder(folder: Path, net: str, case: tuple[int, int, int, str]) -> Path:
    return folder / "-".join(str(part).replace("=", "_") for part in (net, *case) if part != "")


def _argv(net: str, case: tuple[int, int, int, str], folder: Path, manifest: str) -> list[str]:
    _, stage, micro, more = case
    settings = [f"zero.stage={stage}", f"train.micro_batch_size={micro}", *([more] if more else [])]
    common = [*ANY_METHOD, *small_tokens.NET, f"train.max_steps={STEPS}", f"data.manifest={manifest}"]
    # An epsilon above the rounding of the gradients, as in the test of equal losses.
    return [*common, "optimizer.eps=1e-4", *NETS[net], *settings, f"run.dir={_folder(folder, net, case)}"]


@pytest.fixture(scope="module")
def trained_token_nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every net in every case; those of one size share their processes."""
    folder = tmp_path_factory.mktemp("token_nets")
    manifest = small_tokens.binary_digits(folder / "data", last=512)
    for size in (1, 2, 3):
        pairs = [(net, case) for net in NETS for case in CASES if case[0] == size]
        ranks.train_each(size, [_argv(net, case, folder, manifest) for net, case in pairs])
    return folder


def _curve(run_dir: Path) -> np.ndarray:
    """Losses, and the components' weights where there are some, (steps, quantities)."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in records[0] if name == "loss" or name.startswith("component_")]
    return np.array([[record[name] for name in names] for record in records], dtype=float)


@pytest.mark.parametrize("net", NETS)
def test_losses_and_weights_do_not_depend_on_the_world(net, trained_token_nets):
    folders = [_folder(trained_token_nets, net, case) for case in CASES]
    curve = _curve(folders[0])
    assert len(curve) == STEPS and np.ptp(curve[:, 0]) > 0.1
    assert curve.shape[1] == (1 if net == "masked" else 5), "the entropy of the weights, and three of them"
    expected = Checkpoint.latest(str(folders[0])).weights()
    for folder in folders[1:]:
        # fp32 sums of 64 log-probabilities a sample, in another order.
        np.testing.assert_allclose(_curve(folder), curve, rtol=1e-5, err_msg=folder.name)
        for name, tensor in Checkpoint.latest(str(folder)).weights().items():
            # Weights move by up to 4 learning rates of 1e-3, from values of order 1e-1.
            np.testing.assert_allclose(tensor, expected[name], rtol=2e-5, atol=2e-5, err_msg=f"{folder.name} {name}")
