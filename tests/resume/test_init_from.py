"""Runs that start from other weights: once, under ZeRO 3 too, and refused before anything is written."""

import shutil

import torch

from imm_scale.checkpoint.format import Checkpoint, committed_steps
from tests import ranks

STILL = ["optimizer.lr=1e-30", "seed=5", "train.checkpoint_every=1"]  # weights stay as they came, unlike the seed's


def test_sharded_weights_start_from_them_once_and_so_do_the_averages(trained, tiny, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    settings = [
        *tiny,
        *STILL,
        f"train.init_from={source}",
        "train.init_ema=0",
        "train.init_step=2",
        "zero.stage=3",
    ]
    ranks.train(2, *settings, "train.max_steps=1")
    shutil.rmtree(source)  # what goes on does not look for it
    ranks.train(2, *settings, "train.max_steps=2")
    expected = Checkpoint.latest(trained).weights("weight")
    ended = Checkpoint.latest(str(tmp_path / "run"))
    assert ended.meta.step == 2
    for state in ("weight", "ema-0.99"):
        for name, tensor in ended.weights(state).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-25)
    average = Checkpoint.latest(trained).weights("ema-0.99")
    assert any(not torch.equal(average[name], expected[name]) for name in expected), "0 took the weights themselves"


def test_what_is_refused_leaves_nothing_and_mended_it_starts(trained, tiny, tmp_path):
    run_dir, settings = tmp_path / "run", [*tiny, *STILL, f"train.init_from={trained}", "train.max_steps=1"]
    refused = {
        "method.flow_map.second_time: s there, t_minus_s here": ["method.flow_map.second_time=t_minus_s"],
        "model.depth 2 there, 3 here": ["model.depth=3"],
        "has no checkpoint of step 1; it has 2": ["train.init_step=1"],
        "holds no moving average of decay 0.5": ["train.init_ema=0.5"],
    }
    for phrase, changes in refused.items():
        ((code, output),) = ranks.run(ranks.command_and_output, 1, "train", *settings, *changes)
        assert code == 2 and phrase in output and "Traceback" not in output
        assert not (run_dir / "config.yaml").exists() and not (run_dir / "checkpoints").exists()
    # Of a start that ended before its first checkpoint there is a config, and nothing to contradict.
    run_dir.mkdir(exist_ok=True)  # the lock lies there
    (run_dir / "config.yaml").write_text("optimizer:\n  lr: 3.0\nmodel:\n  depth: 3\n")
    ranks.train(1, *settings)
    assert committed_steps(str(run_dir)) == [1]
