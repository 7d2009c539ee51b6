"""Samples that cannot be drawn, or not measured, are refused before weights are read and before a job is queued."""

import pytest

from imm_scale import cli
from imm_scale.checkpoint.format import Checkpoint
from imm_scale.config.schema import ExtractorConfig
from imm_scale.errors import UserError
from imm_scale.evaluation import networks
from launchers import slurm, submit

REFUSED = [
    (["--grid", "even"], "grid 'even' is unknown"),
    (["--grid", "0.9,0", "--steps", "1,4"], "has 1 steps, not 4"),  # 1 step could be drawn
    (["--labels", "7-12"], "not [10, 11, 12]"),
    (["--labels", "3-"], "labels='3-'"),
    (["--ema", "0.31"], "no moving average of decay 0.31"),
    (["--sampler", "heun"], "use sampler=pushforward"),
    (["--guide", "/nowhere", "--guidance", "2"], "/nowhere is not a run folder"),
    (["--guide-step", "77", "--guidance", "2"], "no checkpoint of step 77"),
    (["--guide-ema", "0"], "guidance is off"),
    (["sampling.guidance_interval=[0.2,0.7]"], "does nothing here"),  # guidance is off
    (["sampling.guidance_interval=[0,0.2]", "--guidance", "2", "--steps", "1,2"], "no step begins inside"),
    (["--vae", "/autoencoder"], "sampling.vae does nothing here"),
]
REFUSED_TO_MEASURE = [
    (["evaluation.extractor.kind=onnx"], "needs evaluation.extractor.file and .sha256"),
    (["evaluation.extractor.resize=64"], "evaluation.extractor.resize=64 does nothing with"),
    (["evaluation.extractor.kind=pixels", "evaluation.extractor.mean=[0.5]"], "does nothing with"),
    (["evaluation.metrics=[inception_score]"], "needs class logits"),
    (["evaluation.metrics=[kernel]", "evaluation.compared=6"], "at least 7 are needed"),
    (["--num", "1"], "at least 2 samples"),
    (["evaluation.reference_entry=fid"], "there is none"),
]


@pytest.fixture
def no_weights(monkeypatch):
    """Whoever reads weights fails the test."""
    monkeypatch.setattr(Checkpoint, "read", None)


@pytest.mark.parametrize(("flags", "said"), REFUSED)
def test_samples_that_cannot_be_drawn(flags, said, trained, no_weights, capsys):
    assert cli.main(["sample", trained, *flags]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "said"), [*REFUSED, *REFUSED_TO_MEASURE])
def test_an_evaluation_that_would_fail_in_the_queue(flags, said, trained, no_weights, monkeypatch, capsys):
    monkeypatch.setattr(slurm, "available", lambda: False)
    assert submit.main(["evaluate", "--cluster", "lab", "--dry-run", "--", trained, *flags]) == 2
    assert said in capsys.readouterr().err


def test_another_kind_of_extractor_takes_leave_of_what_the_run_set():
    config = ExtractorConfig(kind="latents", file="net.pt", sha256="0" * 64)
    networks.check(config, ["evaluation.extractor.kind"])
    with pytest.raises(UserError, match=r"file=net\.pt does nothing"):
        networks.check(config)  # the kind was forgotten


def test_of_a_run_that_comes_later_nothing_is_asked(monkeypatch, capsys):
    monkeypatch.setattr(slurm, "available", lambda: False)
    argv = [
        "evaluate",
        "--cluster",
        "lab",
        "--dependency",
        "afterok:1",
        "--dry-run",
        "--",
        "runs/later",
        "--ema",
        "0.9",
    ]
    assert submit.main(argv) == 0
    assert "runs/later" in capsys.readouterr().out


def test_latents_that_no_format_holds(trained, no_weights, capsys):
    assert cli.main(["sample", trained, "--latents", "--format", "grid,folder"]) == 2
    assert "--latents does nothing" in capsys.readouterr().err
