"""Where the batches of held-out samples are made; their loss is checked against the objective in test_meter.py."""

import torch

from imm_scale import config as configs
from imm_scale.data.dataset import Dataset
from imm_scale.data.sample_order import Layout
from imm_scale.data.spaces import Latents, LatentsConfig
from imm_scale.training.validation import HeldOut
from tests.conftest import TINY
from tests.transfers import Transfers


def test_samples_travel_as_stored_and_are_made_into_batches_on_the_device(digits):
    config = configs.load([], [*TINY, f"data.manifest={digits}", "run.dir=unused", "data.holdout=102"]).config
    dataset = Dataset(digits)
    space = Latents.of(LatentsConfig(), dataset.manifest)
    held = HeldOut(config, dataset, space, Layout(64, 4, 1, 64), 0, torch.device("meta"))
    with Transfers() as seen:
        batches = list(held._batches())
    assert [batch.x.shape for batch in batches] == [(64, 1, 8, 8)] * 2, "25 groups in micro-batches of 16"
    assert {t.device.type for batch in batches for t in (batch.x, batch.condition, batch.ordinal, batch.weight)} == {
        "meta"
    }
    assert [copy[:2] for copy in seen.copies] == [("cpu", "meta")] * 2 and not seen.reads
