"""Mistakes of a whole run: exit code 2, a message with the remedy, and nothing written over."""

import json
import resource
import shutil
from pathlib import Path

import pytest

from imm_scale import cli
from imm_scale import config as configs
from imm_scale.checkpoint.format import committed_steps
from imm_scale.errors import UserError
from tests import ranks


def _fails_with_2(phrases: list[str], *argv: str, size: int = 1) -> None:
    for code, message in ranks.run(ranks.command_and_output, size, *argv):
        assert code == 2, message
        for phrase in phrases:
            assert phrase in message
        assert "Traceback" not in message


@pytest.mark.parametrize(
    ("overrides", "phrases"),
    [
        (["train.global_batch_size=4096", "train.micro_batch_size=64"], ["1797", "4096"]),
        (["data.manifest=/nowhere/manifest.json"], ["/nowhere/manifest.json"]),
        (["data.manifest=null"], ["data.manifest"]),
        (["data.codec=vae"], ["pixels", "vae"]),
        (["data.latent_shape=[4,32,32]"], ["(1, 8, 8)", "(4, 32, 32)"]),
        (["data.num_classes=1000"], ["10", "1000"]),
        (["precision=fp16"], ["fp16", "bf16"]),
        (["precision=fp32", "zero.reduce_precision=autocast"], ["zero.reduce_precision", "precision=fp32"]),
        (["model.heads=3"], ["model.width=32", "model.heads=3"]),
        (["model.patch_size=3"], ["model.patch_size=3", "8 x 8"]),
        (["model.size=DiT-M/2"], ["DiT-M/2", "DiT-XL/2"]),
        (["zero.stage=4"], ["zero.stage=4", "[0, 3]"]),
        (["zero.offload=parameters", "zero.stage=1"], ["zero.offload=parameters", "zero.stage=3"]),
        (["zero.extra.gradient_clipping=1"], ["zero.extra.gradient_clipping", "train.grad_clip"]),
        (["zero.extra.zero_optimization.stage=2"], ["zero.extra.zero_optimization.stage", "zero.stage"]),
        (["optimizer.name=lion"], ["optimizer.name", "lion", "adamw", "radam"]),
        (["trane.max_steps=1"], ["trane.max_steps", "train.max_steps"]),
        (["configs/none.yaml"], ["configs/none.yaml"]),
        (["loss"], ["'loss'"]),
        (["run.dir=/proc/nothing/run"], ["/proc/nothing/run", "run.dir"]),
        (["run.dir=nosuch://bucket/run"], ["nosuch"]),
    ],
)
def test_a_run_that_cannot_start(overrides, phrases, tiny, tmp_path):
    _fails_with_2(phrases, "train", *tiny, "train.max_steps=2", *overrides)
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_groups(tiny, tmp_path):
    few = ["train.global_batch_size=8", "train.micro_batch_size=8"]
    _fails_with_2(["3 ranks", "at most 2 ranks fit"], "train", *tiny, *few, size=3)


def test_a_folder_nobody_can_write_to_stops_all_ranks(tiny):
    _fails_with_2(["/proc/nothing/run"], "train", *tiny, "run.dir=/proc/nothing/run", size=2)


def test_a_short_shard_is_found_before_training(tiny, digits, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(Path(digits).parent, folder)
    shard = next(folder.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1024])
    _fails_with_2([shard.name], "train", *tiny, f"data.manifest={folder}/manifest.json")
    assert not (tmp_path / "run").exists()


def test_another_config_in_the_run_folder_is_refused_or_allowed_on_purpose(tiny, tmp_path):
    run_dir = tmp_path / "run"
    ranks.train(1, *tiny, "train.max_steps=2")
    before = (run_dir / "config.yaml").read_text(), (run_dir / "status.json").read_text()
    changed = [*tiny, "train.max_steps=4", "optimizer.lr=5e-4", "model.qk_norm=false", "train.log_every=2"]
    _fails_with_2(["optimizer.lr: 0.001 -> 0.0005", "run.allow_change=[optimizer.lr]"], "train", *changed)
    assert ((run_dir / "config.yaml").read_text(), (run_dir / "status.json").read_text()) == before
    other = [
        *(word for word in tiny if not word.startswith("method.")),
        "train.max_steps=4",
        "model.depth=3",
        "method.name=flow_matching",
    ]
    phrases = ["model.depth: 2 -> 3", "method.name: imm -> flow_matching"]
    _fails_with_2(phrases, "train", *other)
    allowed = "run.allow_change=[model,objective]"
    _fails_with_2(["holds another net", "blocks.2"], "train", *other, allowed)
    ranks.train(1, *changed, "run.allow_change=[optimizer.lr]")
    assert committed_steps(str(run_dir)) == [2, 4]


def _train_with_small_files(limit: int, *argv: str) -> tuple[int, str]:
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return ranks.command_and_output("train", *argv)


def test_a_full_disk_leaves_the_last_checkpoint(tiny, tmp_path):
    run_dir = tmp_path / "run"
    ranks.train(2, *tiny, "train.max_steps=2")
    # The kernel refuses to let any file grow past 100 kB, as a full disk would: a rank's part has twice that.
    for code, message in ranks.run(_train_with_small_files, 2, 100_000, *tiny, "train.max_steps=4"):
        assert code == 2
        assert "cannot write checkpoint" in message
    assert committed_steps(str(run_dir)) == [2]
    assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"
    assert not list(run_dir.rglob("*.tmp"))
    ranks.train(2, *tiny, "train.max_steps=4")
    assert committed_steps(str(run_dir)) == [2, 4]


@pytest.mark.parametrize(
    ("argv", "phrases"),
    [
        (["sample", "RUN", "--labels", "0-12"], ["0-12", "0 to 9"]),
        (["sample", "RUN", "--labels", "cat"], ["cat"]),
        (["sample", "RUN", "--grid", "edm", "--steps", "2", "sampling.foo=1"], ["sampling.foo"]),
        (["sample", "RUN", "--grid", "eta_1.4", "--steps", "4"], ["eta_1.4", "2 steps"]),
        (["sample", "RUN", "--labels", "\u00b2"], ["give all"]),
        (["sample", "RUN", "--grid", "best", "--steps", "2"], ["grid=best", "masked net", "method.name=imm has none"]),
        (["sample", "RUN", "--ema", "0.5"], ["0.5", "0.99"]),
        (["sample", "/nowhere"], ["/nowhere"]),
        (["sample", "/nowhere.safetensors"], ["/nowhere.safetensors"]),
        (["evaluate", "/nowhere"], ["/nowhere"]),
        (["export", "RUN", "--out", "x.bin"], [".safetensors"]),
        (["report", "/nowhere"], ["/nowhere"]),
        (["explain", "objective.kk"], ["method.kk", "did you mean method.k?"]),
    ],
)
def test_other_commands(argv, phrases, trained):
    _fails_with_2(phrases, *(trained if word == "RUN" else word for word in argv))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["report", "RUN", "--out", ""], "--out is empty"),
        (["report", "RUN", "--out="], "--out is empty"),
        (["pack", "--source", "RUN", "--out", ""], "--out is empty"),
        (["encode", "--images=", "--out", "RUN/x", "--codec", "pixels"], "--images is empty"),
        (["sample", "RUN", "--steps", ""], "--steps is empty"),
        (["sample", "RUN", "--guidance", ""], "--guidance is empty"),
        (["sample", "RUN", "--guide", "", "--guidance", "2"], "--guide is empty"),
        (["evaluate", "RUN", "--reference="], "--reference is empty"),
        (["report", "RUN", "--figures", "figures"], "--figures figures is for a sweep"),
        (["evaluate", "RUN", "--gallery", "RUN", "--steps", "0"], "sampling.steps=[0]"),
        (["sample", "RUN", "--guidance", "1e300"], "sample 0 (class 0, seed 0, 1 steps) is not finite"),
        (["evaluate", "RUN", "--guidance", "1e300", "--num", "64"], "is not finite"),
    ],
)
def test_a_word_that_does_nothing_or_cannot_be(argv, said, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main([trained if word == "RUN" else word for word in argv])
    except SystemExit as exit:
        code = exit.code
    assert (code, said in capsys.readouterr().err) == (2, True)


def test_a_value_that_ends_as_a_config_file_does_is_a_value():
    assert configs.load_words(["run.name=trial.yaml", "run.dir=trials/second.yml"]).config.run.name == "trial.yaml"
    with pytest.raises(UserError, match=r"cannot read config 'lr=1e-4\.yaml'"):
        configs.load_words(["lr=1e-4.yaml"])  # a file may be called so


def test_what_lies_below_deepspeeds_keys_is_explained_with_them():
    assert "current  {'flops_profiler': 1}" in configs.explain(
        "zero.extra.flops_profiler", configs.load_words(["zero.extra.flops_profiler=1"])
    )


def test_an_empty_config_of_a_run_is_damage(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    for command in (["sample"], ["evaluate"], ["report", "--out", f"{tmp_path}/page.html"]):
        assert cli.main([command[0], str(tmp_path), *command[1:]]) == 2
        assert "is empty" in capsys.readouterr().err
