"""Evaluations and the report of a run, from the command line."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from imm_scale.data.manifest import Manifest
from imm_scale.data.spaces import Latents, LatentsConfig
from imm_scale.evaluation.extractors import LATENTS
from imm_scale.evaluation.metrics.frechet import Moments, frechet_distance
from imm_scale.evaluation.records import read_evaluations
from imm_scale.evaluation.reference import Reference, of_manifest
from imm_scale.parallel.world import World
from tests import ranks
from tests.conftest import ANY_METHOD


@pytest.fixture(scope="module")
def evaluated(trained: str) -> list[dict]:
    argv = ["evaluate", trained, "--steps", "1,2", "--repeats", "2", "--num", "100"]
    assert ranks.run(ranks.command, 2, *argv) == [0, 0]
    files = list(Path(trained, "evaluations").glob("step-00000002-*.json"))
    assert len(files) == 2, "one per step count"
    results = [json.loads(file.read_text())["results"] for file in files]
    return sorted((result for (result,) in results), key=lambda result: result["steps"])


def test_an_evaluation_says_how_to_get_it_again(evaluated):
    assert [result["steps"] for result in evaluated] == [1, 2]
    assert [result["grid"] for result in evaluated] == ["uniform", "eta_1.4"]
    for result in evaluated:
        assert result["metric"] == "frechet_latents"
        assert result["seeds"] == [0, 1]
        assert result["num"] == 100
        assert result["mean"] == pytest.approx(np.mean(result["values"]))
        assert result["std"] == pytest.approx(np.std(result["values"], ddof=1))
        assert result["values"][0] != result["values"][1]


def _of_digits(manifest: str) -> Reference:
    space = Latents.of(LatentsConfig(), Manifest.load(manifest))
    return of_manifest(manifest, LATENTS, 100, World(), seed=0, space=space, decode=None)


def test_the_value_is_the_distance_of_the_sampled_latents_to_the_digits(evaluated, trained, digits, tmp_path):
    argv = ["sample", trained, "--steps", "2", "--num", "100", "--seed", "1", "--latents", "--out", str(tmp_path)]
    assert ranks.run(ranks.command, 1, *argv) == [0]
    moments = Moments(64)
    moments.add(LATENTS(torch.from_numpy(np.load(tmp_path / "steps-2.npz")["latents"])).features)
    reference = _of_digits(digits)
    assert reference.count == 1797
    # The file holds fp32, the evaluation saw fp64.
    assert evaluated[1]["values"][1] == pytest.approx(frechet_distance(moments, reference), rel=1e-5)


def test_the_reference_has_the_scale_the_model_works_on(digits):
    moments = _of_digits(digits)
    # Normalized over all pixels of all images, up to the fp16 of the shards: mean 0, mean square 0.25.
    assert moments.mean.mean().item() == pytest.approx(0.0, abs=1e-3)
    total = moments.covariance.diagonal().mean() + moments.mean.square().mean()
    assert total.item() == pytest.approx(0.25, rel=2e-3)


def test_an_evaluation_is_not_done_twice(evaluated, trained):
    before = {path: path.stat().st_mtime_ns for path in Path(trained, "evaluations").iterdir()}
    argv = ["evaluate", trained, "--steps", "1,2", "--repeats", "2", "--num", "100"]
    assert "frechet_latents" in ranks.run(ranks.command_and_output, 1, *argv)[0][1]
    assert {path: path.stat().st_mtime_ns for path in Path(trained, "evaluations").iterdir()} == before


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for key, value in attrs if key in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_an_evaluation_of_other_weights_at_this_step_neither_counts_nor_goes(evaluated, trained, tmp_path):
    """As where a run began anew in its folder: the file says of which checkpoint it is."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    argv = ["evaluate", str(run_dir), "--steps", "1", "--repeats", "2", "--num", "100"]
    (old,) = [f for f in (run_dir / "evaluations").iterdir() if json.loads(f.read_text())["results"][0]["steps"] == 1]
    others = {**json.loads(old.read_text()), "checkpoint": "0" * 64}
    old.write_text(json.dumps(others))
    before = set((run_dir / "evaluations").iterdir())
    for _ in range(2):
        assert ranks.run(ranks.command, 1, *argv) == [0]
        assert json.loads(old.read_text()) == others
        (new,) = set((run_dir / "evaluations").iterdir()) - before
    assert json.loads(new.read_text())["results"][0]["values"] == pytest.approx(evaluated[0]["values"], rel=1e-9)


def test_the_report_is_one_file_with_everything(evaluated, trained, digits, tmp_path):
    other = str(tmp_path / "flow_matching")
    flow = [
        "method.name=flow_matching",
        "method.flow_map.second_time=none",
        "run.name=<b>flow</b>",
    ]
    ranks.train(1, *ANY_METHOD, f"data.manifest={digits}", f"run.dir={other}", "train.max_steps=2", *flow)
    assert ranks.run(ranks.command, 1, "evaluate", other, "--steps", "10,20", "--repeats", "2", "--num", "100") == [0]
    assert ranks.run(ranks.command, 1, "sample", trained, "--steps", "1,2", "--num", "10") == [0]
    out = tmp_path / "report.html"
    code, output = ranks.run(ranks.command_and_output, 1, "report", trained, other, "--out", str(out))[0]
    assert code == 0
    (theirs,) = (e["results"][0] for e in read_evaluations(other) if e["results"][0]["steps"] == 10)
    ratio = evaluated[0]["mean"] / theirs["mean"]
    assert f"IMM with 1 against flow matching with 10 steps: {evaluated[0]['mean']:.4f}" in output
    assert f"= {ratio:.2f}" in output
    page = _Page()
    page.feed(out.read_text())
    assert len(page.links) >= 4
    assert all(link.startswith("data:") for link in page.links), "nothing is fetched from elsewhere"
    page.links.remove("data:,")  # no icon
    for link in page.links:
        assert len(base64.b64decode(link.split(",", 1)[1])) > 100
    for phrase in ("frechet_latents", "method.flow_map.second_time", "deepspeed", "<b>flow</b>"):
        assert phrase in page.text
    assert not re.search(r"<b>flow</b>", out.read_text()), "text from a config is escaped"
