"""The planner's arithmetic, its page, and what it says to impossible wishes. Engines meet it in tests/distributed."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

from imm_scale import config as configs
from imm_scale.cli import main
from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.planner import estimate, flops, hardware
from imm_scale.planner import text as page

XL = "configs/imagenet256_dit_xl2.yaml"
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@cache
def _xl() -> Config:
    return configs.load([XL]).config


def _estimate(*overrides: str, nodes: int = 1, gpus: int = 8, gpu: str = "h100-80gb", link: str | None = None):
    config = configs.changed(_xl(), configs.settings_of(overrides), "a test")
    return config, estimate.estimate(config, nodes, gpus, gpu, link)


def test_flops_are_those_of_the_paper():
    """118.618 G multiply-adds forward, 4 forwards, 4,096 images; a multiply-add is 2 FLOPs."""
    _, estimated = _estimate(nodes=64)
    assert estimated.step_flops == pytest.approx(2 * 4 * 118.618e9 * 4096, rel=1e-3)
    assert estimated.executed_flops * estimated.world_size == pytest.approx(estimated.step_flops)
    _, again = _estimate("train.activation_checkpointing=true", nodes=64)
    assert again.step_flops == estimated.step_flops
    assert again.executed_flops == pytest.approx(estimated.executed_flops * 5 / 4)


def test_empty_slots_are_work_too():
    """1,024 groups on 3 x 8 ranks: 43 slots a rank, 8 of 1,032 empty; two micro-batches make it 44."""
    _, estimated = _estimate("train.micro_batch_size=64", nodes=3)
    slots = estimated.layout.slots
    assert estimated.executed_flops == pytest.approx(slots * 4 * 4 * estimated.forward_flops)
    assert slots * 24 > 1024


def test_a_ring_sends_each_byte_twice_for_an_all_reduce():
    item = flops.Traffic("all_reduce", "gradients", 800.0, False)
    assert item.sent(1) == 0
    assert item.sent(8) == pytest.approx(2 * 800 * 7 / 8)
    assert flops.Traffic("all_gather", "weights", 800.0, True).sent(8) == pytest.approx(700)


def test_checkpoint_and_averages_by_hand():
    _, estimated = _estimate("ema.decays=[0.9999,0.999]")
    assert estimated.checkpoint_bytes == 4 * estimated.parameters.total * 5
    assert estimated.parameters.total == 675_111_184 + 1_624_320 - 256 * 1152  # imm.md's count less the position table


def test_data_bandwidth_follows_from_the_pace():
    """A VAE latent: 8 x 32 x 32 fp16 after a header of 128 bytes, padded to 512, two headers and a label of 512."""
    _, estimated = _estimate()
    record = 512 + 16896 + 512 + 512
    assert estimated.data.record_bytes == record
    assert estimated.data_bytes_per_second.high == pytest.approx(estimated.images_per_second.high * record)


def test_days_and_gpu_hours():
    config, estimated = _estimate(nodes=2)
    saves = config.train.max_steps / config.train.checkpoint_every
    seconds = config.train.max_steps * estimated.step_seconds.low + saves * estimated.checkpoint_seconds.low
    assert estimated.days.low == pytest.approx(seconds / 86400)
    assert estimated.gpu_hours.low == pytest.approx(seconds / 3600 * 16)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_more_machines_never_need_more_memory_or_time_to_compute(stage):
    few, many = (_estimate(f"zero.stage={stage}", nodes=nodes)[1] for nodes in (1, 16))
    assert many.memory.total <= few.memory.total
    assert many.compute_seconds.high < few.compute_seconds.high
    assert few.step_seconds.low < few.step_seconds.high


def test_a_slower_link_takes_longer():
    fast, slow = (_estimate(nodes=4, link=link)[1] for link in ("ib-ndr", "eth-10g"))
    assert fast.network_seconds.low < slow.network_seconds.low
    assert fast.compute_seconds == slow.compute_seconds


def test_suggestions_fit_when_they_are_followed():
    config, estimated = _estimate(gpu="a100-40gb")
    assert not estimated.fits
    changes = estimate.suggest(config, estimated)
    assert changes
    for change in changes:
        _, followed = _estimate(*change.overrides, gpu="a100-40gb")
        assert followed.fits and followed == change.estimate


def test_where_nothing_fits_the_page_says_so():
    config, estimated = _estimate("model.width=16384", "model.heads=64", gpus=1, gpu="l4-24gb")
    assert estimate.suggest(config, estimated) == []
    assert "nothing tried fits" in page.render(config, estimated, [])


def test_pairs_are_tried_where_one_change_is_not_enough():
    config, estimated = _estimate("train.micro_batch_size=512", gpus=8, gpu="l4-24gb")
    changes = estimate.suggest(config, estimated)
    assert changes and all(change.estimate.fits for change in changes)


def test_the_page_says_what_is_a_model(capsys):
    assert main(["plan", XL, "--nodes", "64", "--gpus-per-node", "8", "--gpu", "h100-80gb", "--link", "ib-ndr"]) == 0
    text = capsys.readouterr().out
    for word in ("weights", "gradients", "optimizer", "ema 0.9999", "activations", "all_reduce gradients", "GPU-hours"):
        assert word in text
    assert "time (model" in text and "fits" in text


def test_json_and_comparison(capsys):
    assert main(["plan", XL, "--gpu", "h100-80gb", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["memory"]["total"] > numbers["memory"]["weights"] > 0
    assert main(["plan", XL, "--gpus-per-node", "8", "--gpu", "h100-80gb", "--compare"]) == 0
    table = capsys.readouterr().out.split("ZeRO stages and micro-batches")[1]
    assert len(table.splitlines()) > 4 * 4


BAD = [
    (["--gpu", "h100"], "did you mean h100-80gb"),
    (["--gpu", "A100"], "a100-80gb"),
    (["--gpu", "h100-80gb", "--link", "ib-ndx"], "ib-ndr"),
    (["--gpu", "h100-80gb", "--nodes", "0"], "at least 1"),
    (["--gpu", "h100-80gb", "--nodes", "200", "--gpus-per-node", "8"], "at most 1024 ranks fit"),
    (["--gpu", "h100-80gb", "train.micro_batch_size=6"], "not a multiple"),
    (["--gpu", "v100-32gb", "precision=bf16"], "precision=fp16"),
    (["--gpu", "h100-80gb", "data.latent_shape=null"], "data.latent_shape"),
    (["--gpu", "h100-80gb", "data.latent_shape=[4,32]"], "must be channels, height and width, or"),
]


@pytest.mark.parametrize(("args", "message"), BAD)
def test_impossible_wishes_get_a_sentence(args, message, capsys):
    assert main(["plan", XL, *args]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_the_table_of_hardware_is_whole():
    for gpu in hardware.GPUS.values():
        assert gpu.half >= gpu.tf32 >= gpu.fp32 > 1e12 and gpu.source
        assert gpu.memory > 2**34 and gpu.bandwidth > 1e11 and gpu.intra > 1e10
    for link in hardware.LINKS.values():
        assert link.per_node(8) == link.bandwidth * (8 if link.per_gpu else 1) and link.source


def test_a_manifest_describes_the_data(digits):
    config = configs.load(["configs/demo.yaml"], [f"data.manifest={digits}"]).config
    estimated = estimate.estimate(config, 1, 2, "l4-24gb")
    assert (estimated.data.shape, estimated.data.num_classes, estimated.data.num_samples) == ((1, 8, 8), 10, 1797)


def test_unknown_gpu_raises_for_the_sweep_too():
    with pytest.raises(UserError, match="unknown"):
        hardware.gpu("abacus")


_EXAMPLES = re.findall(r"```\n\$ imm-scale (plan .*)\n([^`]*)```", (ROOT / "docs" / "planning.md").read_text())


@pytest.mark.parametrize(("command", "printed"), _EXAMPLES, ids=["fits", "does not fit"])
def test_the_examples_of_the_docs_are_what_is_printed(command, printed, capsys):
    main(command.split())
    assert capsys.readouterr().out == printed


def test_the_page_says_what_cut_strata_cost(capsys):
    """MeanFlow on micro-batches of 6: 4.1 forwards and 2 of guidance, where whole fours would take 3.275 and 2."""
    words = ("data.latent_shape=[4,32,32]", "data.num_classes=1000", "--gpu", "h100-80gb")
    assert main(["plan", "imagenet256_meanflow_b2", *words, "train.micro_batch_size=6"]) == 0
    cut = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("  step ") and "forwards" in line
    )
    assert main(["plan", "imagenet256_meanflow_b2", *words, "train.micro_batch_size=8"]) == 0
    whole = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("  step ") and "forwards" in line
    )
    assert "forwards x 256; " in cut and "where every rank's micro-batches are multiples of 4 groups" in cut
    assert "multiples" not in whole
    of_cut, of_whole = (float(line.split(" forwards")[0].split()[-1]) for line in (cut, whole))
    assert of_cut - of_whole == pytest.approx(0.75 * 1.1, abs=0.02)
