"""From a run to numbers with error bars: real digits, and a classifier of them trained here as the feature net."""

import base64
import hashlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from sklearn.datasets import load_digits
from torch import nn

from imm_scale.checkpoint.export import load_net
from imm_scale.config.schema import SamplingConfig
from imm_scale.data import codec as codecs
from imm_scale.evaluation import cost_quality, gallery
from imm_scale.evaluation.collect import GROUPS, group_of
from imm_scale.evaluation.metrics.frechet import Moments, frechet_distance
from imm_scale.evaluation.records import SCHEMA_VERSION, read_evaluations
from imm_scale.planner.flops import forward_multiply_adds
from imm_scale.sampling.job import Model
from imm_scale.sampling.source import find
from tests import ranks
from tests.conftest import ANY_METHOD

ALL = "evaluation.metrics=[frechet,kernel,precision_recall,density_coverage,inception_score]"
NUM = "256"


class _Classifier(nn.Module):
    """32 features and 10 logits of (N, 1, 8, 8) images of 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 32), nn.ReLU()
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(x)
        return features, self.head(features)


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> list[str]:
    """Overrides that name a classifier which gets over 95 % of digits it has not seen right."""
    data = load_digits()
    x = torch.from_numpy(np.round(data.images * 255 / 16) / 255.0).float()[:, None]
    y = torch.from_numpy(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = _Classifier()
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        held_out = torch.arange(len(x)) % 5 == 0
        x_train, y_train = x[~held_out], y[~held_out]
        for _ in range(300):
            index = torch.randint(0, len(x_train), (128,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x_train[index])[1], y_train[index]).backward()
            optimizer.step()
    assert (net(x[held_out])[1].argmax(1) == y[held_out]).float().mean() > 0.95
    path = tmp_path_factory.mktemp("network") / "digits.pt"
    torch.jit.script(net.eval()).save(str(path))
    kind = {"kind": "torchscript", "file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    kind |= {"range": "[0,1]", "logits": "'1'"}
    return [f"evaluation.extractor.{key}={value}" for key, value in kind.items()]


@pytest.fixture(scope="module")
def flow(digits, tmp_path_factory) -> str:
    """A small flow-matching run with checkpoints at 2 and 240 steps: few Euler steps are worse than many."""
    run_dir = str(tmp_path_factory.mktemp("flow") / "run")
    settings = ["method.name=flow_matching", "method.flow_map.second_time=none"]
    settings += ["train.keep_last=9", "ema.decays=[0.95]", "optimizer.lr=3e-3", f"data.manifest={digits}"]
    for steps in (2, 240):
        ranks.train(1, *ANY_METHOD, *settings, f"run.dir={run_dir}", f"train.max_steps={steps}")
    return run_dir


@pytest.fixture(scope="module")
def evaluated(flow, network) -> list[dict]:
    argv = ["--steps", "1,4,16", "--num", NUM, "--repeats", "1", "--guidance", "1,1.5", ALL, *network]
    assert ranks.run(ranks.command, 2, "evaluate", flow, *argv) == [0, 0]
    first = f"{flow}/checkpoints/step-00000002"
    assert ranks.run(
        ranks.command, 1, "evaluate", first, "--steps", "16", "--num", NUM, "--repeats", "1", *network
    ) == [0]
    return read_evaluations(flow)


def _results(evaluated: list[dict], step: int, guidance: float) -> dict[int, dict]:
    evaluations = [e for e in evaluated if e["step"] == step and e["guidance_scale"] == guidance]
    return {result["steps"]: result for evaluation in evaluations for result in evaluation["results"]}


def test_more_steps_and_later_checkpoints_are_better_beyond_their_errors(evaluated):
    late, early = _results(evaluated, 240, 1.0), _results(evaluated, 2, 1.0)
    for worse, better in ((late[1], late[16]), (late[1], late[4]), (early[16], late[16])):
        gap = worse["value"] - better["value"]
        assert gap > 3 * math.hypot(worse["error"], better["error"]), (worse["value"], better["value"])
    # One Euler step draws means of many digits: clear cases of their class, but all alike.
    for name, more in (("kernel_digits", False), ("coverage_digits", True), ("recall_digits", True)):
        one, many = (late[steps]["measures"][name] for steps in (1, 16))
        gap = (many["value"] - one["value"]) * (1 if more else -1)
        assert gap > 2 * math.hypot(one["error"], many["error"]), (name, one, many)


def test_a_file_holds_what_is_needed_to_get_its_numbers_again(evaluated, flow):
    late = next(e for e in evaluated if e["step"] == 240 and e["guidance_scale"] == 1.5)
    assert late["schema_version"] == SCHEMA_VERSION
    assert late["ema"] == "ema-0.95"
    assert late["rounding"] == "uint8, nearest"
    assert late["reference"]["count"] == 1797
    for id_ in (late["reference"]["id"], late["extractor"]["id"], late["weights"], late["reference"]["manifest_hash"]):
        assert len(id_) == 64
    assert {"torch", "imm-scale", "python"} <= late["versions"].keys()
    assert any("256 samples" in warning for warning in late["warnings"]) is False, (
        "256 samples of 32 features are enough"
    )
    spec, _ = load_net(flow)
    for result in late["results"]:
        assert result["metric"] == "frechet_digits"
        assert result["function_evaluations"] == 2 * result["steps"], "guidance costs a second pass"
        assert result["flops_per_image"] == 2 * forward_multiply_adds(spec.net) * result["function_evaluations"]
        axes = (result["sequence_passes"], result["refinement_passes"], result["passes"])
        assert axes == (1, result["passes"], result["function_evaluations"]), "a guide's pass comes after the net's own"
        assert result["multiply_adds"] == forward_multiply_adds(spec.net) * result["passes"]
        assert result["error_kind"] == "jackknife over samples"
        assert 0 < result["numerical_error"] < 1e-3 * result["value"]
        assert len(result["times"]) == result["steps"] + 1


def test_the_value_is_that_of_the_sampled_images(evaluated, flow, network, tmp_path):
    """Sampled by the other command, measured by the definitions on full data."""
    argv = ["sample", flow, "--steps", "4", "--num", NUM, "--format", "npz", "--out", str(tmp_path)]
    assert ranks.run(ranks.command, 1, *argv) == [0]
    net = torch.jit.load(dict(word.split("=", 1) for word in network)["evaluation.extractor.file"])

    def features(images: np.ndarray) -> torch.Tensor:
        return net(torch.from_numpy(images).permute(0, 3, 1, 2) / 255.0)[0].detach().double()

    ours = features(np.load(tmp_path / "steps-4.npz")["arr_0"])
    theirs = features(np.round(load_digits().images * 255 / 16).astype(np.uint8)[..., None])
    sets = []
    for x in (ours, theirs):
        moments = Moments(32)
        moments.add(x)
        sets.append(moments)
    result = _results(evaluated, 240, 1.0)[4]
    # Digits go through fp16 latents on their way to the reference; rounding to uint8 undoes that.
    assert result["value"] == pytest.approx(frechet_distance(*sets), rel=1e-5)
    groups = np.bincount(group_of(torch.arange(256)).numpy(), minlength=GROUPS)
    assert groups.sum() == 256


def test_curves_take_the_best_guidance_at_each_cost(evaluated):
    points = cost_quality.curves(e for e in evaluated if e["step"] == 240)["frechet_digits"]
    values = {}
    for guidance in (1.0, 1.5):
        for result in _results(evaluated, 240, guidance).values():
            values.setdefault(result["function_evaluations"], []).append(result["value"])
    assert [(p.function_evaluations, p.value) for p in points] == [(c, min(values[c])) for c in sorted(values)]


def test_the_gallery_shows_one_noise_and_the_nearest_digits(flow, trained, digits, network):
    argv = ["evaluate", flow, "--gallery", trained, "sampling.steps=[1,4]"]
    code, output = ranks.run(ranks.command_and_output, 1, *argv)[0]
    assert code == 0, output
    document = json.loads(Path(flow, "gallery", "gallery.json").read_text())
    captions = [entry["caption"] for entry in document["same_noise"]]
    assert captions == [
        "run at step 240, 1 step",
        "run at step 240, 4 steps",
        "run at step 2, 4 steps",
        "k=11-seed0 at step 2, 1 step",
        "k=11-seed0 at step 2, 4 steps",
    ]
    assert len(document["nearest"]) == 10
    # The nearest of the first sample among all digits, as stock webdataset reads them.
    model = Model.load(find(flow).at_newest(), SamplingConfig(), torch.device("cpu"))
    z = gallery.draw(model, SamplingConfig(), 4, 1)
    shards = [str(Path(digits).parent / shard["name"]) for shard in json.loads(Path(digits).read_text())["shards"]]
    files = [sample["latent.npy"] for sample in wds.WebDataset(shards, shardshuffle=False)]
    raw = torch.from_numpy(np.stack([np.load(io.BytesIO(file)) for file in files])).float()
    latents = codecs.normalize(raw, model.spec.space.codec.mean, model.spec.space.codec.std).double()
    order = (latents - z).flatten(1).norm(dim=1).argsort()[:3].tolist()
    assert document["nearest"][0]["caption"] == f"sample 0; then training images {', '.join(map(str, order))}"
    page = gallery.section(flow)
    assert page.count("data:image/png;base64,") == 15
    assert base64.b64encode(Path(flow, "gallery", "nearest-000.png").read_bytes()).decode() in page
    assert "Copies would lie near 0" in page
    assert gallery.section(digits) == ""


def test_an_export_is_evaluated_against_a_reference_file(flow, tmp_path, digits):
    assert ranks.run(ranks.command, 1, "export", flow, "--out", f"{tmp_path}/w.safetensors") == [0]
    assert ranks.run(ranks.command, 1, "evaluate", "--make-reference", digits, "--out", f"{tmp_path}/ref.npz") == [0]
    argv = ["--steps", "4", "--num", NUM, "--repeats", "2"]
    code, from_run = ranks.run(ranks.command_and_output, 1, "evaluate", flow, *argv)[0]
    assert code == 0, from_run
    reference = ["--reference", f"{tmp_path}/ref.npz", "--out", f"{tmp_path}/evaluations"]
    code, output = ranks.run(ranks.command_and_output, 2, "evaluate", f"{tmp_path}/w.safetensors", *reference, *argv)[0]
    assert code == 0, output
    assert output.splitlines()[-1] == from_run.splitlines()[0]
    (file,) = (tmp_path / "evaluations").glob("export-*.json")
    assert json.loads(file.read_text())["reference"]["count"] == 1797


def test_files_of_the_first_version_are_still_read(tmp_path):
    result = {
        "metric": "frechet_latents", "steps": 1, "function_evaluations": 1, "sampler": "pushforward", "grid": "uniform",
        "guidance_scale": 1.0, "num": 100, "seeds": [0, 1], "values": [1.0, 3.0], "mean": 2.0, "std": 1.4,
    }  # fmt: skip
    document = {
        "schema_version": 1, "step": 500, "images_seen": 64000, "objective": "imm", "ema": "ema-0.995",
        "reference": "ab" * 32, "extractor": "latents", "seed": 0, "results": [result], "versions": {"torch": "2"},
    }  # fmt: skip
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "step-00000500-0123456789ab.json").write_text(json.dumps(document))
    (evaluation,) = read_evaluations(str(tmp_path))
    assert evaluation["results"][0].items() >= result.items()
    assert evaluation["results"][0]["measures"] == {
        "frechet_latents": {"value": 2.0, "error": 1.4, "values": [1.0, 3.0]}
    }
    read = [evaluation["results"][0][key] for key in ("sequence_passes", "refinement_passes", "passes")]
    assert read == [1, 1, 1], "samples had one block then"
    assert evaluation["results"][0]["multiply_adds"] is None, "which the file does not tell"
    assert evaluation["extractor"] == {"name": "latents", "id": None}
    assert evaluation["reference"]["manifest_hash"] == "ab" * 32
    assert cost_quality.curves([evaluation])["frechet_latents"][0].value == 2.0
