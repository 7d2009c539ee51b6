"""Where the batches of held-out samples are made; their loss is checked against the objective in test_meter.py."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from imm_scale import config as configs
from imm_scale.data.dataset import Dataset, read_all
from imm_scale.data.manifest import Manifest
from imm_scale.data.sample_order import Layout
from imm_scale.data.shards import write_shard
from imm_scale.data.spaces import Latents, LatentsConfig
from imm_scale.errors import UserError
from imm_scale.preflight import prepare
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


def _write(folder: Path, like: Manifest, samples: int) -> str:
    """A data set of its own, of values that the trained one has nowhere."""
    latents = np.random.default_rng(3).uniform(-1, 1, (samples, *like.stored_shape)).astype(np.float16)
    shard = write_shard(
        str(folder), "v.tar", [f"{i}" for i in range(samples)], latents, [i % 10 for i in range(samples)]
    )
    url = str(folder / "manifest.json")
    # Another mean: what is trained on decides how samples are normalized.
    replace(like, shards=(shard,), codec=replace(like.latent_codec, mean=(0.25,))).save(url)
    return url


def test_a_manifest_of_held_out_samples_takes_the_place_of_a_share(digits, tmp_path):
    url = _write(tmp_path, Manifest.load(digits), 70)
    words = [*TINY, f"data.manifest={digits}", "run.dir=unused", f"data.holdout_manifest={url}"]
    prepared = prepare(configs.load([], words).config, 1)
    assert prepared.num_held_out == 70 and prepared.layout.global_batch_size == 64
    held = HeldOut(prepared.config, prepared.held_out, prepared.spec.space, prepared.layout, 0, torch.device("cpu"))
    batches = list(held._batches())
    assert held.num_groups == 17, "of 4 samples; 2 are left over"
    x = torch.cat([x for x, _ in read_all(url, space=prepared.spec.space)])
    assert torch.equal(torch.cat([batch.x for batch in batches])[:68], x[:68])
    assert torch.cat([batch.weight for batch in batches]).sum() == 17
    with pytest.raises(UserError, match=r"data\.holdout=0\.1 and data\.holdout_manifest=.* both say"):
        configs.load([], [*words, "data.holdout=0.1"])


def test_held_out_samples_of_another_kind_or_of_training_are_refused(digits, tmp_path):
    def refused(url: str) -> str:
        words = [*TINY, f"data.manifest={digits}", "run.dir=unused", f"data.holdout_manifest={url}"]
        with pytest.raises(UserError, match=r"data\.holdout_manifest") as caught:
            prepare(configs.load([], words).config, 1)
        return str(caught.value)

    assert "is what data.manifest trains on" in refused(digits)
    url = _write(tmp_path, replace(Manifest.load(digits), num_classes=11, class_names=()), 8)
    assert "num_classes 11, not 10" in refused(url)
