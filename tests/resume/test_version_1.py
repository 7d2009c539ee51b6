"""A run folder and an exported file as version 0.1.0 wrote them go on to be resumed, sampled, measured and reported.

tests/fixtures/version_1: a tiny IMM run on the digits, 8 steps on two ranks at ZeRO stage 1 (`run`), its export,
samples of it in 1 and 2 steps, and the losses of the same run on one rank to step 16 (`losses.json`).
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import ranks
from tests.conftest import losses

FIXTURE = Path(__file__).parents[1] / "fixtures" / "version_1"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE / "run", tmp_path / "run"))


def _command(*argv: object) -> str:
    code, printed = ranks.command_and_output(*map(str, argv))
    assert code == 0, printed
    return printed


def _settings(run_dir: Path, digits: str) -> list[str]:
    """The words this run was started with, beside where the data lies now."""
    return [str(run_dir / "config.yaml"), f"data.manifest={digits}", f"run.dir={run_dir}"]


def test_it_goes_on_as_if_it_had_never_stopped(run_dir, digits):
    ranks.train(1, *_settings(run_dir, digits), "train.max_steps=16", "zero.stage=3")
    # Rounding differs between processors, stages and sums over ranks; a wrong moment or draw is off by 1e-2.
    np.testing.assert_allclose(losses(run_dir), json.loads((FIXTURE / "losses.json").read_text()), rtol=2e-3)


@pytest.mark.parametrize("source", ["run", "exported.safetensors"])
def test_it_draws_the_same_samples(source, tmp_path):
    _command("sample", FIXTURE / source, "--steps", "1,2", "--num", 16, "--format", "npz", "--out", tmp_path)
    for steps in (1, 2):
        with np.load(tmp_path / f"steps-{steps}.npz") as now, np.load(FIXTURE / f"samples-{steps}.npz") as before:
            difference = now["arr_0"].astype(int) - before["arr_0"].astype(int)
        assert np.abs(difference).max() <= 1  # a value may round the other way on another processor


def test_it_exports_the_same_weights(run_dir, tmp_path):
    from imm_scale.checkpoint import export

    _command("export", run_dir, "--out", tmp_path / "now.safetensors")
    (spec, now), (old_spec, before) = (
        export.read(str(file)) for file in (tmp_path / "now.safetensors", FIXTURE / "exported.safetensors")
    )
    assert spec == old_spec
    assert {name: tensor.tolist() for name, tensor in now.items()} == {k: v.tolist() for k, v in before.items()}


def test_its_evaluations_are_read_and_repeated(run_dir, digits, tmp_path):
    before = _distances(run_dir)
    for file in (run_dir / "evaluations").iterdir():
        file.unlink()
    _command("evaluate", run_dir, "--steps", "1,2", "--num", 256, "--repeats", 2, f"data.manifest={digits}")
    # Distances of the same weights, draws and images: what rounding on another processor may change.
    assert _distances(run_dir) == pytest.approx(before, rel=1e-5)
    page = tmp_path / "report.html"
    _command("report", FIXTURE / "run", "--out", page)
    assert all(f"{value:.3g}"[:4] in page.read_text() for value in before.values())


def _distances(run_dir: Path) -> dict[int, float]:
    """{steps: Frechet distance} of the evaluations in a run folder."""
    evaluations = [json.loads(file.read_text()) for file in (run_dir / "evaluations").iterdir()]
    return {evaluation["steps"]: result["value"] for evaluation in evaluations for result in evaluation["results"]}
