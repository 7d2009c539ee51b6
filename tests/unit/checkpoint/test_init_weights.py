"""Starting from other weights: what fits is taken, another meaning is refused by key, what is new starts as said."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imm_scale import build
from imm_scale import config as configs
from imm_scale.build import ModelSpec
from imm_scale.checkpoint import export, init_weights
from imm_scale.checkpoint.released import state_dicts
from imm_scale.config.schema import TrainConfig
from imm_scale.data.codec import AUTOENCODER_UNKNOWN
from imm_scale.data.manifest import Codec, TokenCodec
from imm_scale.data.spaces import Latents
from imm_scale.data.tokens.spaces import Tokens
from imm_scale.errors import UserError
from imm_scale.methods.eulerian import EulerianConfig
from imm_scale.methods.eulerian.guidance import TrainingGuidanceConfig
from imm_scale.methods.flow_map import FlowMap, FlowMapConfig
from imm_scale.methods.flow_matching import FlowMatchingConfig
from imm_scale.methods.imm import ImmConfig
from imm_scale.methods.tokens.masked import MaskedConfig
from imm_scale.models.dit import DiTConfig
from imm_scale.models.heads import HeadConfig
from imm_scale.models.layers import position_table
from imm_scale.models.token_transformer import TokenArchitecture
from tests.unit.checkpoint import published_transformers as published

CLASSES = 4
NET = DiTConfig(16, 2, 2, 2, channels=1, height=4, image_width=4, num_classes=CLASSES)
SPACE = Latents(0.5, (1, 4, 4), Codec("pixels", "", 4, 1, 1, (0.1,), (0.3,)), CLASSES, ())
SPEC = ModelSpec(ImmConfig().resolved("fp32"), NET, SPACE)
FLOW = FlowMatchingConfig(flow_map=FlowMapConfig(second_time="none")).resolved("fp32")


def _random(net: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return net.requires_grad_(False).eval()


def _source(spec: ModelSpec, tmp_path: Any) -> tuple[str, FlowMap]:
    """An exported file of random weights, and the flow map that they are."""
    flow_map = build.net(spec)
    _random(flow_map)
    url = str(tmp_path / "source.safetensors")
    export.write(spec, flow_map.model.state_dict(), url)
    return url, flow_map.double()


def _started(spec: ModelSpec, url: str, **train: Any) -> FlowMap:
    """A fresh net of a run that starts from a file."""
    prepared: Any = SimpleNamespace(config=SimpleNamespace(train=TrainConfig(init_from=url, **train)), spec=spec)
    flow_map = build.net(spec, seed=7)
    init_weights.check(prepared)
    init_weights.load(flow_map, prepared)
    return flow_map.requires_grad_(False).eval().double()


def _space(**changes: Any) -> Latents:
    return replace(SPACE, **changes)


def _images(spec: ModelSpec, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, *spec.space.shape, generator=generator, dtype=torch.float64)


def _velocity(flow_map: FlowMap, x: Tensor, s: float, t: float, label: Tensor) -> Tensor:
    """The mean velocity from t to s."""
    times = (torch.full((len(x),), u, dtype=torch.float64) for u in (s, t))
    return (x - flow_map(x, *times, label)) / (t - s)


# What fits


@pytest.mark.parametrize("second_time", ["s", "t_minus_s"])
@pytest.mark.parametrize("parameterization", ["euler_fm", "velocity"])
def test_a_flow_matching_net_starts_imm_with_its_velocity(second_time, parameterization, tmp_path, caplog):
    flow = replace(FLOW, flow_map=FlowMapConfig(parameterization=parameterization, second_time="none"))
    url, source = _source(ModelSpec(flow, replace(NET, second_time=False), SPACE), tmp_path)
    method = ImmConfig(flow_map=FlowMapConfig(parameterization=parameterization, second_time=second_time))
    caplog.set_level("INFO")
    flow_map = _started(replace(SPEC, method=method.resolved("fp32")), url)
    assert f"starts from the weights of {url}" in caplog.text
    assert "the embedder of the second time is new and answers 0" in caplog.text
    x, label = _images(SPEC), torch.tensor([0, 3, 2, CLASSES])
    for s, t in ((0.4999, 0.5), (0.0, 0.994), (0.2, 0.7)):
        ours = _velocity(flow_map, x, s, t, label)
        # The same fp64 sums; over t - s = 1e-4 their rounding shows.
        torch.testing.assert_close(ours, _velocity(source, x, s, t, label), rtol=0, atol=1e-10)
        raw = source.average(x, *[torch.full((4,), t, dtype=torch.float64)] * 2, label)
        torch.testing.assert_close(ours, 0.5 * raw, rtol=0, atol=1e-10)
    assert raw.abs().max() > 0.1
    weight = flow_map.model.s_embedder.mlp
    assert (weight[2].weight == 0).all() and (weight[0].weight != 0).any(), "else it could never learn"


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_a_published_net_starts_imm_with_its_first_step(family, tmp_path):
    weights = published.state_dict()
    torch.save(weights, tmp_path / "published.pt")
    released = state_dicts.read(str(tmp_path / "published.pt"), family, heads=2)
    url = str(tmp_path / "published.safetensors")
    export.write(released.spec, released.weights, url)
    method = ImmConfig(flow_map=replace(released.spec.method.flow_map, second_time="s"), t_max=0.99)
    spec = ModelSpec(method.resolved("fp32"), replace(released.spec.net, second_time=True), released.spec.space)
    flow_map, net = _started(spec, url), published.Net(weights)
    x, label = _images(spec, 1), torch.tensor([3])
    t, s = 0.6, 0.6 - 1e-3
    if family == "sit":
        velocity = -net(x[0].numpy(), 1 - t, 3)[:4]
    else:  # at a step of the schedule: eps and the data it means, on straight lines
        alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[600]
        t = float(np.sqrt(1 - alpha_bar) / (np.sqrt(alpha_bar) + np.sqrt(1 - alpha_bar)))
        s = t - 1e-3
        eps = net(x[0].numpy() / np.hypot(1 - t, t), 600.0, 3)[:4]
        velocity = eps - (x[0].numpy() - t * eps) / (1 - t)
    # Weights rounded to fp32; eps over 1 - t = 0.16.
    np.testing.assert_allclose(_velocity(flow_map, x, s, t, label)[0].numpy(), velocity, rtol=0, atol=2e-5)
    assert np.abs(velocity).max() > 0.1


def test_keys_without_weights_may_differ(tmp_path):
    url, source = _source(SPEC, tmp_path)
    flow_map = _started(replace(SPEC, net=replace(NET, dropout=0.2, attention="xformers")), url)
    for name, value in source.model.state_dict().items():
        assert torch.equal(flow_map.model.state_dict()[name], value)


def test_settings_of_the_loss_may_differ(tmp_path):
    url, _ = _source(SPEC, tmp_path)
    _started(replace(SPEC, method=replace(SPEC.method, kernel="rbf", k=9, particles=2, a=2.0, t_max=0.9)), url)


# What means something else

UNLIKE: dict[str, tuple[ModelSpec, str, str]] = {
    "method.flow_map.parameterization": (
        replace(SPEC, method=replace(SPEC.method, flow_map=FlowMapConfig(parameterization="identity"))),
        "euler_fm",
        "identity",
    ),
    "method.flow_map.second_time": (
        replace(SPEC, method=replace(SPEC.method, flow_map=FlowMapConfig(second_time="t_minus_s"))),
        "s",
        "t_minus_s",
    ),
    "method.flow_map.time_scale": (
        replace(SPEC, method=replace(SPEC.method, flow_map=FlowMapConfig(time_scale=1.0))),
        "1000.0",
        "1.0",
    ),
    "method.flow_map.time_input": (
        replace(SPEC, method=replace(SPEC.method, flow_map=FlowMapConfig(time_input="ddpm_step"))),
        "t",
        "ddpm_step",
    ),
    "model.heads": (replace(SPEC, net=replace(NET, heads=4)), "2", "4"),
    "model.time_embedding": (replace(SPEC, net=replace(NET, time_embedding="fourier")), "positional", "fourier"),
    "data.space.sigma_data": (replace(SPEC, space=_space(sigma_data=1.0)), "0.5", "1.0"),
    "data.codec": (
        replace(SPEC, space=_space(codec=replace(SPACE.codec, kind="vae", weights_hash="ab" * 32))),
        "pixels",
        "vae abababababab",
    ),
}


@pytest.mark.parametrize("key", UNLIKE)
def test_another_meaning_is_refused_by_key_unless_told(key, tmp_path, caplog):
    url, source = _source(SPEC, tmp_path)
    spec, there, here = UNLIKE[key]
    with pytest.raises(UserError) as caught:
        _started(spec, url)
    assert f"{key}: {there} there, {here} here" in str(caught.value)
    assert f"train.init_allow_change=[{key}]" in str(caught.value)
    with pytest.raises(UserError, match="mean something else"):
        _started(spec, url, init_allow_change=["method.flow_map.trajectory"])
    caplog.set_level("INFO")
    for allowed in (key, key.rpartition(".")[0]):
        flow_map = _started(spec, url, init_allow_change=[allowed])
        for name, value in source.model.state_dict().items():
            assert torch.equal(flow_map.model.state_dict()[name], value)
    assert f"{key} was {there} and is {here}, as allowed" in caplog.text


def test_several_meanings_are_named_at_once(tmp_path):
    url, _ = _source(SPEC, tmp_path)
    flow_map = FlowMapConfig("vp_cosine", "simple_edm", "s", 1.0)
    with pytest.raises(UserError) as caught:
        _started(replace(SPEC, method=replace(SPEC.method, flow_map=flow_map)), url, init_allow_change=["model"])
    keys = [f"method.flow_map.{key}" for key in ("trajectory", "parameterization", "time_scale")]
    assert f"init_allow_change=[{','.join(keys)}]" in str(caught.value)
    assert "method.flow_map.trajectory=ot_fm method.flow_map.parameterization=euler_fm" in str(caught.value)


def test_a_net_may_forget_its_second_time_where_that_is_allowed(tmp_path):
    url, _ = _source(SPEC, tmp_path)
    spec = ModelSpec(FLOW, replace(NET, second_time=False), SPACE)
    with pytest.raises(UserError, match=r"method.flow_map.second_time: s there, none here"):
        _started(spec, url)
    _started(spec, url, init_allow_change=["method.flow_map.second_time"])


TOLD = ModelSpec(
    EulerianConfig(guidance=TrainingGuidanceConfig(kind="condition")).resolved("fp32"),
    replace(NET, guidance=True),
    SPACE,
)
NOT_TOLD = replace(TOLD, method=EulerianConfig().resolved("fp32"), net=NET)


def test_a_net_starts_to_be_told_its_guidance_as_it_was(tmp_path, caplog):
    url, source = _source(NOT_TOLD, tmp_path)
    caplog.set_level("INFO")
    flow_map = _started(TOLD, url)
    assert "the embedder of the guidance is new and answers 0" in caplog.text
    x, label = _images(SPEC), torch.tensor([0, 3, 2, CLASSES])
    s, t = torch.full((4,), 0.1, dtype=torch.float64), torch.full((4,), 0.8, dtype=torch.float64)
    for scale in (1.0, 4.0):
        told = torch.tensor([[1 - 1 / scale, 0.2, 0.7]], dtype=torch.float64).expand(4, 3)
        assert torch.equal(flow_map(x, s, t, label, guidance=told), source(x, s, t, label))
    weight = flow_map.model.guidance_embedder.mlp
    assert not weight[2].weight.any() and weight[0].weight.any(), "else it could never learn"
    assert build.net(TOLD, seed=7).model.guidance_embedder.mlp[0].weight.std() > 0.01


def test_guidance_is_forgotten_where_that_is_allowed(tmp_path, caplog):
    url, _ = _source(TOLD, tmp_path)
    with pytest.raises(UserError, match=r"method\.guidance\.kind: condition there, fixed here"):
        _started(NOT_TOLD, url)
    with pytest.raises(UserError, match=r"method\.name: eulerian there, imm here"):
        _started(SPEC, url)
    caplog.set_level("INFO")
    _started(NOT_TOLD, url, init_allow_change=["method.guidance.kind"])
    assert "the embedder of the guidance is left out" in caplog.text
    _started(TOLD, url)


def test_autoencoders_are_told_apart_where_they_are_known(tmp_path):
    def of(weights_hash: str) -> ModelSpec:
        return replace(SPEC, space=_space(codec=replace(SPACE.codec, kind="vae", weights_hash=weights_hash)))

    url, _ = _source(of("a" * 64), tmp_path)
    _started(of("a" * 64), url)
    _started(of(AUTOENCODER_UNKNOWN), url)
    with pytest.raises(UserError, match=r"data.codec: vae aaaaaaaaaaaa there, vae bbbbbbbbbbbb here"):
        _started(of("b" * 64), url)


def test_another_normalization_is_said_with_the_sources_own(tmp_path, caplog):
    url, _ = _source(SPEC, tmp_path)
    caplog.set_level("INFO")
    _started(replace(SPEC, space=_space(codec=replace(SPACE.codec, mean=(0.2,)))), url)
    assert "data.space.mean=[0.1] data.space.std=[0.3]" in caplog.text
    caplog.clear()
    _started(SPEC, url)
    assert "normalized" not in caplog.text


# What does not fit


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"width": 32}, "model.width 16 there, 32 here"),
        ({"depth": 3}, "model.depth 2 there, 3 here"),
        ({"depth": 1}, "blocks.1"),
        ({"mlp_ratio": 2.0}, "model.mlp_ratio 4.0 there, 2.0 here"),
        ({"patch_size": 4}, "model.patch_size 2 there, 4 here"),
        ({"qk_norm": True}, "k_norm.weight is missing there"),
    ],
)
def test_another_shape_is_refused_whatever_is_allowed(changes, key, tmp_path):
    url, _ = _source(SPEC, tmp_path)
    with pytest.raises(UserError) as caught:
        _started(replace(SPEC, net=replace(NET, **changes)), url, init_allow_change=["model"])
    assert key in str(caught.value) and "holds another net" in str(caught.value)


def test_an_export_has_neither_steps_nor_averages(tmp_path):
    url, _ = _source(SPEC, tmp_path)
    for key, value in (("init_ema", 0.0), ("init_step", 3)):
        with pytest.raises(UserError, match="an export, which holds one set of weights"):
            _started(SPEC, url, **{key: value})


def test_files_of_others_are_refused_with_the_way_in(tmp_path):
    with pytest.raises(UserError, match=r"net\.pt was not written by imm-scale.*imm-scale import"):
        _started(SPEC, str(tmp_path / "net.pt"))
    (tmp_path / "net.safetensors").write_bytes(b"hello, this is no such file")
    with pytest.raises(UserError, match=r"net\.safetensors is not a safetensors file"):
        _started(SPEC, str(tmp_path / "net.safetensors"))


# What is new


def _rows(flow_map: FlowMap) -> Tensor:
    return flow_map.model.y_embedder.weight


def _named(*names: str) -> ModelSpec:
    return replace(
        SPEC,
        net=replace(NET, num_classes=len(names)),
        space=_space(num_classes=len(names), class_names=names),
    )


@pytest.mark.parametrize(
    ("names", "rows", "phrase"),
    [
        (("d", "b"), [3, 1, 4], "of 2 classes 2 start at rows of the source's 4"),
        (("a", "b", "c", "d"), [0, 1, 2, 3, 4], ""),
        (("x", "c", "y", "a", "z"), [4, 2, 4, 0, 4, 4], "of 5 classes 2 start at rows of the source's 4, 3 are new"),
    ],
)
def test_classes_keep_the_rows_of_their_names(names, rows, phrase, tmp_path, caplog):
    url, source = _source(_named("a", "b", "c", "d"), tmp_path)
    caplog.set_level("INFO")
    flow_map = _started(_named(*names), url)
    assert torch.equal(_rows(flow_map), _rows(source)[rows])
    assert phrase in caplog.text and ("rows of the source" in caplog.text) == bool(phrase)


@pytest.mark.parametrize(("classes", "rows"), [(6, [0, 1, 2, 3, 4, 4, 4]), (2, [0, 1, 4])])
def test_classes_without_names_keep_the_rows_of_their_numbers(classes, rows, tmp_path):
    url, source = _source(SPEC, tmp_path)
    spec = replace(SPEC, net=replace(NET, num_classes=classes), space=_space(num_classes=classes))
    flow_map = _started(spec, url)
    assert torch.equal(_rows(flow_map), _rows(source)[rows])
    x, times = _images(SPEC), (torch.full((4,), u, dtype=torch.float64) for u in (0.2, 0.6))
    s, t = times
    # "No label" and a class that is new answer as the source without a label: the same sums.
    for label in (classes, classes - 1 if classes > CLASSES else classes):
        ours = flow_map(x, s, t, torch.full((4,), label))
        assert torch.equal(ours, source(x, s, t, torch.full((4,), CLASSES)))


def test_a_row_for_no_label_that_was_never_trained_is_not_taken(tmp_path, caplog):
    url, source = _source(replace(SPEC, method=replace(SPEC.method, label_drop=0.0)), tmp_path)
    caplog.set_level("INFO")
    flow_map = _started(SPEC, url)
    assert torch.equal(_rows(flow_map)[:-1], _rows(source)[:-1])
    # fp32 means in another order
    torch.testing.assert_close(_rows(flow_map)[-1], _rows(source)[:-1].mean(0), rtol=0, atol=1e-6)
    assert "the mean of its classes, as it never trained without label" in caplog.text


@pytest.mark.parametrize(("height", "width"), [(8, 8), (2, 4), (4, 12)])
def test_another_resolution_has_the_positions_of_its_own_grid(height, width, tmp_path, caplog):
    url, source = _source(SPEC, tmp_path)
    net = replace(NET, height=height, image_width=width)
    space = _space(shape=(1, height, width))
    caplog.set_level("INFO")
    flow_map = _started(replace(SPEC, net=net, space=space), url)
    for name, value in source.model.state_dict().items():
        assert torch.equal(flow_map.model.state_dict()[name], value)
    assert torch.equal(flow_map.model.pos_embed[0], position_table(16, height // 2, width // 2).double())
    assert f"the net had 2 x 2 patches and has {height // 2} x {width // 2}" in caplog.text


def test_tokens_that_mean_something_else_are_named_by_keys_that_can_be_typed(tmp_path):
    head = HeadConfig("mixture", 2, group=1)
    net = TokenArchitecture(8, 1, 2, length=6, vocabulary=4, num_classes=1, head=head)
    space = Tokens(6, TokenCodec(4, "hf", "ab" * 32), 1, ())
    source = ModelSpec(MaskedConfig(steps=[1]), net, space)
    url = str(tmp_path / "tokens.safetensors")
    export.write(source, build.net(source).model.state_dict(), url)
    other = replace(net, length=5, head=replace(head, group=2))
    spec = replace(source, net=other, space=Tokens(5, TokenCodec(4, "hf", "cd" * 32), 1, ()))
    with pytest.raises(UserError) as caught:
        _started(spec, url)
    keys = ["model.head.group", "data.codec", "data.latent_shape"]
    assert "Train as they were trained (model.head.group=1), or" in str(caught.value)
    assert f"init_allow_change=[{','.join(keys)}]" in str(caught.value)
    configs.load(
        [], ["model.name=token_transformer", "train.init_from=x", f"train.init_allow_change=[{','.join(keys)}]"]
    )
    assert _started(spec, url, init_allow_change=keys).model.config.length == 5
    with pytest.raises(UserError, match=r"vocabulary of the data 4 there, 3 here"):
        _started(replace(source, net=replace(net, vocabulary=3)), url)
