"""A run whose samples are four blocks, from training to files: steps of blocks, given ones, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from imm_scale import cli
from imm_scale import config as configs
from imm_scale.checkpoint import export, init_weights
from imm_scale.config.schema import SamplingConfig
from imm_scale.errors import UserError
from imm_scale.evaluation.records import read_evaluations
from imm_scale.parallel.world import World
from imm_scale.planner.flops import forward_multiply_adds
from imm_scale.preflight import prepare
from imm_scale.sampling.draw import collect, plan_of, times_of
from tests import ranks
from tests.conftest import TINY


@pytest.fixture(scope="module")
def in_blocks(digits: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny run of two steps with `model.blocks=4`, 10 classes of 8 x 8 pixels, a row of patches a block."""
    run_dir = str(tmp_path_factory.mktemp("in_blocks") / "run")
    ranks.train(1, *TINY, "model.blocks=4", f"data.manifest={digits}", f"run.dir={run_dir}", "train.max_steps=2")
    return run_dir


def _draw(run_dir: str, steps: int, num: int = 8, **settings) -> np.ndarray:
    spec, net = export.load_net(run_dir)
    return collect(net, spec, plan_of(SamplingConfig(**settings), spec, steps, num, 0), World()).numpy()


def test_a_run_is_logged_and_sampled(in_blocks, tmp_path, capsys):
    record = json.loads((Path(in_blocks) / "metrics.jsonl").read_text().splitlines()[0])
    of_blocks = [record[f"loss_block_{j}"] for j in (1, 2, 3, 4)]
    assert record["loss"] == pytest.approx(sum(of_blocks) / 4) and len(set(of_blocks)) == 4
    out = str(tmp_path / "samples")
    flags = ["--num", "20", "--guidance", "1.5", "--out", out, "--latents"]
    assert cli.main(["sample", in_blocks, "--steps", "1,2", *flags]) == 0
    assert cli.main(["sample", in_blocks, "--block-steps", "2-1-1-1", *flags]) == 0
    for name, calls in (("steps-1", 8), ("steps-2", 16), ("steps-2-1-1-1", 10)):
        record = json.loads((tmp_path / "samples" / f"{name}-guidance-1.5.json").read_text())
        assert record["finished"] and record["function_evaluations"] == calls, "of label and null, in each block"
    latents = np.load(f"{out}/steps-2-1-1-1-guidance-1.5.npz")["latents"]
    expected = _draw(in_blocks, 2, 20, block_steps="2-1-1-1", guidance_scale=1.5)
    assert np.array_equal(latents, expected)


def test_the_first_block_takes_the_steps_that_are_its_own(in_blocks):
    """More steps in later blocks leave the ones before as they are; the list of one count is that count."""
    two, mixed = _draw(in_blocks, 2), _draw(in_blocks, 3, block_steps="2-2-3-1")
    assert np.array_equal(mixed[:, :, :4], two[:, :, :4]) and not np.array_equal(mixed[:, :, 4:], two[:, :, 4:])
    assert np.array_equal(_draw(in_blocks, 2, block_steps="2-2-2-2"), two)


def test_sample_i_does_not_depend_on_how_many_are_drawn_at_once(in_blocks):
    alone = _draw(in_blocks, 2, guidance_scale=1.5)
    assert np.array_equal(_draw(in_blocks, 2, 70, guidance_scale=1.5, batch_size=128)[:8], alone)


def test_blocks_that_are_given_are_continued(in_blocks, tmp_path):
    own, file = _draw(in_blocks, 2), str(tmp_path / "own.npz")
    np.savez(file, latents=own[:3])
    given = _draw(in_blocks, 2, given=file, given_blocks=2)
    assert np.array_equal(given[:3], own[:3]), "one's own beginning goes on as it did"
    assert np.array_equal(given[3:6, :, :4], own[:3, :, :4]), "the fourth sample continues the first latents again"
    assert not np.array_equal(given[3:6, :, 4:], own[:3, :, 4:])


def test_costs_are_those_of_calls_and_clean_passes(in_blocks):
    spec, _ = export.load_net(in_blocks)
    for settings, steps, calls, forwards in (
        ({}, 1, 4, 1.75),
        ({}, 4, 16, 4.75),
        ({"guidance_scale": 2.0}, 2, 16, 5.5),
        ({"block_steps": "4-2-1-1"}, 4, 8, 2.75),
    ):
        plan = plan_of(SamplingConfig(**settings), spec, steps, 8, 0)
        times = times_of(spec, plan)
        assert plan.function_evaluations(times) == calls
        assert plan.forwards(times) == forwards
        assert plan.sequence_passes == 4
    assert forward_multiply_adds(spec.net) == forward_multiply_adds(spec.net.at_once)


def test_evaluations_are_told_apart_by_steps_of_blocks_and_by_what_is_given(in_blocks, tmp_path):
    """Work in forwards of the net: L + 1 - 1 / J, L the mean over blocks; of two given blocks, two are drawn."""
    np.savez(tmp_path / "own.npz", latents=_draw(in_blocks, 2)[:3])
    argv = ["evaluate", in_blocks, "--num", "64", "--repeats", "1", "--steps", "2"]
    for word in ("", "sampling.block_steps=2-1-1-1", f"sampling.given={tmp_path / 'own.npz'} sampling.given_blocks=2"):
        assert cli.main([*argv, *word.split()]) == 0
    results = [one["results"][0] for one in read_evaluations(in_blocks)]
    keys = ("sequence_passes", "refinement_passes", "passes")
    assert sorted(tuple(one[key] for key in keys) for one in results) == [(2, 2, 4), (4, 1.25, 5), (4, 2, 8)]
    assert len({one["value"] for one in results}) == 3
    forward = forward_multiply_adds(export.load_net(in_blocks)[0].net)
    works = {(one["sequence_passes"], one["passes"]): one["multiply_adds"] for one in results}
    assert works[4, 8] == round(2.75 * forward) and works[4, 5] == round(2.0 * forward)


REFUSED = [
    ({"block_steps": "4-2-1"}, 4, r"block_steps=4-2-1 is of 3 blocks.*in 4"),
    ({"block_steps": "4-2-1-0"}, 4, r"block_steps='4-2-1-0'.*at least 1"),
    ({"block_steps": "4,2,1,1"}, 4, r"as in 4-2-1-1"),
    ({"block_steps": "\u00b2-2-1-1"}, 2, r"as in 4-2-1-1"),  # a digit to str.isdigit, and no number to int
    ({"block_steps": "2-2-1-1", "grid": "0.9,0.5,0"}, 2, r"grid=0\.9,0\.5,0 beside sampling\.block_steps=2-2-1-1"),
    ({"block_steps": "4-2-1-1"}, 2, r"4 steps at most, not 2: use --steps 4"),
    ({"given": "/nowhere.npz"}, 1, r"/nowhere\.npz is not there"),
    ({"given": "FILE"}, 1, r"has no array 'latents'"),
    ({"given": "FILE", "given_blocks": 4}, 1, r"given_blocks=4 of the 4.*give 1 to 3"),
    ({"given_blocks": 2}, 1, r"given_blocks=2 does nothing"),
]


@pytest.mark.parametrize(("settings", "steps", "said"), REFUSED)
def test_what_cannot_be_drawn_is_refused(settings, steps, said, in_blocks, tmp_path):
    np.savez(tmp_path / "file.npz", images=np.zeros(3))
    settings = {key: str(tmp_path / "file.npz") if value == "FILE" else value for key, value in settings.items()}
    with pytest.raises(UserError, match=said):
        _draw(in_blocks, steps, **settings)


LATENTS = np.zeros((2, 1, 8, 8), np.float32)
NO_LATENTS = [
    (LATENTS > 0, "holds bool"),
    (LATENTS.astype(str), "holds <U"),
    (LATENTS.astype(complex), "holds complex128"),
    (LATENTS[:0], r"of shape \(0, 1, 8, 8\)"),
    (np.array([None, None]), "cannot be read"),
    (np.stack([LATENTS[0], np.full((1, 8, 8), np.nan)]), "sample 1 is not finite"),
    (np.full((2, 1, 8, 8), 1e300), "sample 0 is not finite"),  # beyond fp32, which nets take
]


@pytest.mark.parametrize(("array", "said"), NO_LATENTS)
def test_arrays_that_are_no_latents_are_refused(array, said, in_blocks, tmp_path):
    np.savez(tmp_path / "file.npz", latents=array)
    with pytest.raises(UserError, match=said):
        _draw(in_blocks, 1, given=str(tmp_path / "file.npz"))


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY", b"PK\x03\x04 cut off"])
def test_files_that_are_no_npz_are_refused(content, in_blocks, tmp_path):
    (tmp_path / "file.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"is no npz file: imm-scale sample --latents"):
        _draw(in_blocks, 1, given=str(tmp_path / "file.npz"))


def test_latents_of_another_shape_are_refused(in_blocks, tmp_path):
    np.savez(tmp_path / "file.npz", latents=np.zeros((2, 4, 8, 8), np.float32))
    with pytest.raises(UserError, match=r"latents of \(4, 8, 8\), not of \(1, 8, 8\)"):
        _draw(in_blocks, 1, given=str(tmp_path / "file.npz"))


def test_a_model_of_one_block_has_none_to_tell_apart(trained, tmp_path):
    np.savez(tmp_path / "file.npz", latents=np.zeros((2, 1, 8, 8), np.float32))
    with pytest.raises(UserError, match=r"block_steps=2-1 is of 2 blocks.*in 1 "):
        _draw(trained, 2, block_steps="2-1")
    with pytest.raises(UserError, match=r"of the 1 .*leave out sampling\.given"):
        _draw(trained, 2, given=str(tmp_path / "file.npz"))


def test_guidance_without_label_drop_is_refused(digits, capsys):
    words = [*TINY, "model.blocks=4", "method.label_drop=0", "sampling.guidance_scale=1.5", f"data.manifest={digits}"]
    with pytest.raises(UserError, match=r"method\.label_drop above 0"):
        configs.load([], words)


def _prepared(digits: str, source: str, blocks: int):
    words = [*TINY, f"model.blocks={blocks}", f"train.init_from={source}", f"data.manifest={digits}"]
    return prepare(configs.load([], words).config, 1)


def test_weights_of_one_block_start_a_run_of_four_and_not_the_reverse(digits, trained, in_blocks):
    init_weights.check(_prepared(digits, trained, 4))
    with pytest.raises(UserError, match=r"trained with model\.blocks=4"):
        init_weights.check(_prepared(digits, in_blocks, 1))


def test_pipelines_of_other_programs_know_no_blocks(in_blocks, tmp_path, capsys):
    assert cli.main(["export", in_blocks, "--out", str(tmp_path / "net.safetensors")]) == 0
    assert cli.main(["export", in_blocks, "--format", "diffusers", "--out", str(Path(tmp_path) / "pipeline")]) == 2
    assert "model.blocks=4" in capsys.readouterr().err
