"""The Frechet distance between features with places, and EDM2's reference files, by the command."""

import dataclasses
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
import scipy.linalg
import torch
from torch import nn

from imm_scale.config.schema import EvaluationConfig, ExtractorConfig
from imm_scale.errors import UserError
from imm_scale.evaluation import images, networks
from imm_scale.evaluation.networks import open_extractor
from imm_scale.evaluation.reference import Reference, of_images, open_reference
from imm_scale.parallel.world import World
from tests import ranks

CPU = torch.device("cpu")
CHANNELS, PLACES = 9, 3


class _Net(nn.Module):
    """Means of channels, and 9 channels at 3 x 3 places, as Inception has 192 at 17 x 17."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.places = nn.Conv2d(3, CHANNELS, 2, stride=2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.mean(dim=(2, 3)), self.places(x / 255.0).relu()


def _config(path: Path, kind: str = "torchscript", spatial: str | None = "1", **more: object) -> ExtractorConfig:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ExtractorConfig(kind=kind, file=str(path), sha256=digest, spatial=spatial, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("network") / "net.pt"
    torch.jit.script(_Net().eval()).save(str(path))
    return path


def _set(path: Path, seed: int, num: int = 200) -> tuple[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    array = (rng.integers(0, 160, (num, 6, 6, 3)) + rng.integers(0, 96, (num, 1, 1, 1))).astype(np.uint8)
    np.savez(path, arr_0=array)
    return str(path), array


def _spatial(array: np.ndarray) -> np.ndarray:
    """(N, 7 * 9) by the formula: the first 7 channels of the convolution at all places, in fp64."""
    with torch.no_grad():
        x = torch.from_numpy(array).permute(0, 3, 1, 2).double() / 255.0
        return _Net().double().places(x).relu()[:, :7].flatten(1).numpy()


def _frechet(a: np.ndarray, b: np.ndarray) -> float:
    """As guided-diffusion's evaluator has it: numpy's moments, scipy's general square root."""
    (mu, sigma), (nu, tau) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(sigma @ tau)
    return float(((mu - nu) ** 2).sum() + np.trace(sigma) + np.trace(tau) - 2 * np.trace(root).real)


def _flags(config: ExtractorConfig) -> list[str]:
    return [f"evaluation.extractor.{key}={getattr(config, key)}" for key in ("kind", "file", "sha256", "spatial")]


@pytest.mark.parametrize("size", [1, 2])
def test_the_command_gives_the_evaluators_number(network, tmp_path, size):
    theirs, reference = _set(tmp_path / "reference.npz", 0)
    ours, samples = _set(tmp_path / "samples.npz", 1)
    of_reference = _flags(_config(network))
    flags = [*of_reference, "evaluation.metrics=[frechet,spatial_frechet]"]
    ref = str(tmp_path / "ref.npz")
    make = ["evaluate", "--make-reference", theirs, "--out", ref, *of_reference]
    assert ranks.run(ranks.command, size, *make) == [0] * size
    with np.load(ref) as file:  # under the names the ADM evaluator looks up
        np.testing.assert_allclose(file["mu_s"], _spatial(reference).mean(0), rtol=1e-5)
        assert file["sigma_s"].shape == (63, 63)
    code, output = ranks.run(ranks.command_and_output, size, "evaluate", ours, "--reference", ref, *flags)[0]
    assert code == 0, output
    (line,) = [line for line in output.splitlines() if line.startswith("spatial_frechet_net")]
    # Printed to 4 digits; the network computes in fp32, the formula above in fp64.
    assert float(line.split()[1]) == pytest.approx(_frechet(_spatial(samples), _spatial(reference)), abs=6e-5)
    assert "+-" in line, "its jackknife error"


def test_an_onnx_network_with_channels_last_gives_the_same(network, tmp_path):
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _Net()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            pooled, places = self.net(x.permute(0, 3, 1, 2))
            return pooled, places.permute(0, 2, 3, 1)

    path = tmp_path / "last.pt"
    torch.jit.script(Last().eval()).save(str(path))
    array = _set(tmp_path / "set.npz", 0, 8)[1]
    output = open_extractor(_config(path, layout="nhwc"), CPU)(torch.from_numpy(array))
    # The same numbers in another order, which no Frechet distance sees.
    expected = _spatial(array).reshape(8, 7, 9).transpose(0, 2, 1).reshape(8, -1)
    np.testing.assert_allclose(output.spatial, expected, rtol=1e-5, atol=1e-6)


def test_an_onnx_output_is_taken_by_its_name(tmp_path):
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("ReduceMean", ["x"], ["pooled"], axes=[2, 3], keepdims=0),
            onnx.helper.make_node("Neg", ["x"], ["places"]),
        ],
        "net",
        [value("x", onnx.TensorProto.FLOAT, ["n", 3, 6, 6])],
        [value("pooled", onnx.TensorProto.FLOAT, ["n", 3]), value("places", onnx.TensorProto.FLOAT, ["n", 3, 6, 6])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "net.onnx")
    array = _set(tmp_path / "set.npz", 0, 4)[1]
    output = open_extractor(_config(tmp_path / "net.onnx", "onnx", "places"), CPU)(torch.from_numpy(array))
    np.testing.assert_array_equal(output.spatial, -array.transpose(0, 3, 1, 2).reshape(4, -1).astype(float))


def test_what_cannot_be_is_said(network, tmp_path):
    array, config = _set(tmp_path / "set.npz", 0)[0], _config(network)
    extractor = open_extractor(config, CPU)
    plain = open_extractor(dataclasses.replace(config, spatial=None), CPU)
    assert networks.identity_hash(extractor.identity) != networks.identity_hash(plain.identity)
    with pytest.raises(UserError, match=r"a 1x3 output of net has no places"):
        open_extractor(dataclasses.replace(config, spatial="0"), CPU)(torch.zeros(1, 6, 6, 3, dtype=torch.uint8))
    of_images(images.find(array), plain, 10, World()).save(str(tmp_path / "plain.npz"))
    metrics = "evaluation.metrics=[frechet,spatial_frechet]"
    for spatial, phrase in ((None, "gives none: name an output"), ("1", "made with the extractor")):
        flags = [*_flags(config)[:3], *([f"evaluation.extractor.spatial={spatial}"] if spatial else []), metrics]
        argv = ["evaluate", array, "--reference", str(tmp_path / "plain.npz"), *flags]
        code, output = ranks.run(ranks.command_and_output, 1, *argv)[0]
        assert code == 2
        assert phrase in output


def test_what_is_missing_is_said_before_samples_are_drawn(trained, network, tmp_path):
    flags = _flags(_config(network))
    metrics = "evaluation.metrics=[frechet,spatial_frechet]"
    for overrides, phrase in (
        ([metrics], "needs features with places, latents gives none"),
        (["evaluation.metrics=[inception_score]"], "needs class logits, latents gives none"),
        (["evaluation.extractor.spatial=1"], "spatial=1 does nothing with evaluation.extractor.kind=latents"),
        (["evaluation.reference_entry=fid"], "reference_entry=fid chooses from an evaluation.reference"),
        ([*flags[:3], "evaluation.metrics=[inception_score]"], "needs class logits, net gives none"),
    ):
        code, output = ranks.run(ranks.command_and_output, 1, "evaluate", trained, "--num", "100000000", *overrides)[0]
        assert (code, phrase in output) == (2, True), output
    moments = tmp_path / "moments.npz"
    np.savez(moments, mu=np.zeros(64), sigma=np.eye(64))
    argv = ["evaluate", trained, "--reference", str(moments), "--num", "100000000", "evaluation.metrics=[kernel]"]
    code, output = ranks.run(ranks.command_and_output, 1, *argv)[0]
    assert (code, "moments only" in output) == (2, True), output


# --- EDM2's files ---


@pytest.fixture
def edm2(network, tmp_path) -> tuple[str, np.ndarray]:
    """A .pkl as calculate_metrics.py of NVlabs/edm2 (4bf8162) saves it: num_images, and {mu, sigma} by name."""
    array = _set(tmp_path / "reference.npz", 0)[1]
    means = array.reshape(len(array), -1, 3).mean(1)
    stats = {"num_images": 200, "fid": {"mu": np.zeros(4), "sigma": np.eye(4)}}
    stats["fd_dinov2"] = {"mu": means.mean(0), "sigma": np.cov(means, rowvar=False)}
    path = tmp_path / "img512.pkl"
    path.write_bytes(pickle.dumps(stats))
    return str(path), array


def test_the_command_reads_one_of_its_statistics(network, edm2, tmp_path):
    url, array = edm2
    ours, samples = _set(tmp_path / "samples.npz", 1)
    argv = ["evaluate", ours, "--reference", url, *_flags(_config(network))[:3], "evaluation.reference_entry=fd_dinov2"]
    code, output = ranks.run(ranks.command_and_output, 1, *argv)[0]
    assert code == 0, output
    (line,) = [line for line in output.splitlines() if line.startswith("frechet_net")]
    theirs, mine = (x.reshape(len(x), -1, 3).mean(1) for x in (array, samples))
    assert float(line.split()[1]) == pytest.approx(_frechet(mine, theirs), rel=1e-5, abs=6e-5)
    for word in (argv[-1].replace("fd_dinov2", "kid"), "evaluation.compared=1000"):  # another entry, and none
        code, output = ranks.run(ranks.command_and_output, 1, *argv[:-1], word)[0]
        assert (code, "fd_dinov2, fid" in output) == (2, True), output


def test_the_network_of_fids_takes_fid(edm2, network, monkeypatch):
    config, url = EvaluationConfig(reference=edm2[0]), edm2[0]
    extractor = open_extractor(_config(network, spatial=None), CPU)
    monkeypatch.setattr("imm_scale.evaluation.reference.STANDARD_ID", networks.identity_hash(extractor.identity))
    reference = open_reference(config, extractor)
    assert (len(reference.mean), reference.count) == (4, 200)
    assert reference.source["entry"] == "fid"
    chosen = open_reference(dataclasses.replace(config, reference_entry="fd_dinov2"), extractor)
    assert len(chosen.mean) == 3
    assert Reference.load(url, "fid").id != chosen.id


def test_files_of_adm_keep_their_places_and_damage_is_named(tmp_path):
    path = tmp_path / "adm.npz"
    arrays = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.ones(2), "sigma_s": 2 * np.eye(2)}
    np.savez(path, arr_0=np.zeros((2, 3, 3, 3), np.uint8), **arrays)
    spatial = Reference.load(str(path)).spatial
    assert spatial is not None
    np.testing.assert_array_equal(spatial.covariance, 2 * np.eye(2))
    with pytest.raises(UserError, match=r"reference_entry=fid: .* is no \.pkl file"):
        Reference.load(str(path), "fid")
    for change, phrase in (
        ({"mu_s": np.ones(3)}, "no mu_s"),
        ({"sigma": np.full((3, 3), np.nan)}, "not finite"),
        ({"mu": np.zeros((3, 1))}, "no mu"),
    ):
        np.savez(path, **{**arrays, **change})
        with pytest.raises(UserError, match=phrase):
            Reference.load(str(path))
    for data in (
        b"\x80\x04",
        b"\x80\x04]\x94.",
        pickle.dumps({"num_images": 3}),
        b"\x80\x04K\x05.",
        b"PK\x03\x04",
        b"",
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"adm\.npz"):
            Reference.load(str(path), "fid" if data[:1] == b"\x80" else None)


def test_the_record_of_an_evaluation_names_the_entry(edm2):
    from imm_scale.evaluation.evaluators.distances import _identity

    plain, chosen = _identity(edm2[0], None), _identity(edm2[0], "fid")
    assert plain == hashlib.sha256(Path(edm2[0]).read_bytes()).hexdigest()
    assert chosen == f"{plain} fid"
    assert json.dumps(chosen)
