"""Draws, times and loss never wait for a GPU: no value is read back from it, and nothing is copied to it.

The device is `meta`, which has no values at all; a real GPU would only be slower where these fail.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imm_scale.methods.base import Method
from imm_scale.methods.eulerian import Eulerian, EulerianConfig
from imm_scale.methods.eulerian.guidance import TrainingGuidanceConfig
from imm_scale.methods.eulerian.steps import StepConfig
from imm_scale.methods.flow_map import PARAMETERIZATIONS, FlowMap
from imm_scale.methods.flow_matching import FlowMatching
from imm_scale.methods.imm_times import MAPPINGS
from imm_scale.methods.mmd import KERNELS
from imm_scale.methods.special_cases import ConsistencyTraining, GenerativeMomentMatching
from imm_scale.methods.tokens.blocks import blocks
from imm_scale.methods.tokens.masked import MaskedConfig, MaskedDiffusion
from imm_scale.methods.tokens.next_block import NextBlock, NextBlockConfig
from imm_scale.methods.tokens.token_net import TokenNet
from imm_scale.models.base import Backbone
from imm_scale.models.dit import DiT
from imm_scale.models.token_transformer import TokenTransformer
from tests.unit.methods.small import COSINE, OT, imm, losses
from tests.unit.methods.tokens import toy
from tests.unit.models.heads.laws import KINDS
from tests.unit.models.test_streams import NET

# Values that leave the device, and lists that are copied to it (behind the back of a dispatch mode).
WAITING = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)


class NoLists(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function not in WAITING, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


class OneDevice(TorchDispatchMode):
    """Refuses reading a value, copies between devices, and operators on several; a 0-d tensor is a number."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.name() not in ("aten::_local_scalar_dense", "aten::is_nonzero"), f"{function} reads a value"
        out = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim()}
        assert len(devices) < 2, f"{function} is given {devices}"
        return out


class Scale(Backbone):
    has_dropout = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, c_noise, second, label, dropout_key=None):
        return self.weight * x


class Told(Scale):
    takes_guidance = True

    def forward(self, x, c_noise, second, label, dropout_key=None, guidance=None):
        return self.weight * x * guidance.sum(dim=1).to(x.dtype).view(-1, 1, 1, 1)


def _loss_on_meta(
    method: Method, interp=OT, parameterization: str = "simple_edm", net: type[Scale] = Scale, **flow_map_settings: Any
) -> None:
    with torch.device("meta"):
        flow_map = FlowMap(net(), interp, parameterization, null_label=5, **flow_map_settings)
        x, label, ordinal = torch.randn(8, 2, 3, 3), torch.zeros(8, dtype=torch.int64), torch.arange(8)
    with NoLists(), OneDevice():
        group_losses = losses(method, flow_map, x, label, ordinal, seed=0)
        group_losses.loss_G.sum().backward()
    assert (group_losses.loss_G.device.type, group_losses.loss_G.dtype) == ("meta", torch.float64)
    assert flow_map.model.weight.grad is not None


COMMON: dict[str, Any] = {"t_min": 0.0, "t_max": 0.994, "label_drop": 0.2}


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("interp", [OT, COSINE], ids=lambda interp: interp.name)
def test_every_mapping(mapping, interp):
    _loss_on_meta(imm(particles=4, mapping=mapping, **COMMON), interp)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_every_kernel_and_parameterization(kernel, parameterization):
    _loss_on_meta(imm(particles=4, kernel=kernel, **COMMON), OT, parameterization)


@pytest.mark.parametrize("kind", [FlowMatching, ConsistencyTraining, GenerativeMomentMatching])
def test_every_other_method(kind):
    _loss_on_meta(kind(kind.Config(**COMMON).resolved("fp32")))


@pytest.mark.parametrize("net", [Scale, Told])
@pytest.mark.parametrize("derivative", ["tangent", "difference"])
def test_a_guided_velocity(net, derivative):
    guidance = TrainingGuidanceConfig(kind="condition") if net is Told else TrainingGuidanceConfig(kappa=0.5)
    step = StepConfig(start=0.1, end=0.1)
    settings = {"tangent_mix": 1.0} if derivative == "tangent" else {"step": step}
    config = EulerianConfig(derivative=derivative, guidance=guidance, label_drop=0.2, **settings)
    _loss_on_meta(Eulerian(config.resolved("fp32")), OT, "euler_fm", net, time_scale=1.0)


IN_BLOCKS = [
    imm(particles=4, context_noise=0.2, **COMMON),
    *(kind(kind.Config(**COMMON).resolved("fp32")) for kind in (FlowMatching, ConsistencyTraining)),
    GenerativeMomentMatching(GenerativeMomentMatching.Config(**COMMON).resolved("fp32")),
    Eulerian(EulerianConfig(derivative="difference", step=StepConfig(start=0.1, end=0.1)).resolved("fp32")),
]


@pytest.mark.parametrize("method", IN_BLOCKS, ids=lambda method: method.config.name)
def test_samples_of_four_blocks(method):
    with torch.device("meta"):
        flow_map = FlowMap(DiT(replace(NET, dropout=0.1)), OT, "euler_fm", null_label=5, time_scale=1.0)
        x, label, ordinal = torch.randn(8, 3, 8, 4), torch.zeros(8, dtype=torch.int64), torch.arange(8)
    with NoLists(), OneDevice():
        losses(method, flow_map, x, label, ordinal, seed=0).loss_G.sum().backward()
    assert all(p.grad is not None for p in flow_map.parameters())


def _tokens(method: Method, kind: str, **settings: Any) -> None:
    """A loss on meta after another one: what that left on the device is there."""
    length, vocabulary = 6, 5
    with torch.device("meta"):
        net = TokenNet(
            TokenTransformer(toy.architecture(length, vocabulary, head=KINDS[kind], dropout=0.1, **settings)),
            vocabulary,
            length,
        )
        x, label = torch.zeros(4, length, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
        ordinal = torch.arange(4)
    method.batch_size = 4
    losses(method, net, x, label, ordinal, seed=0)
    with NoLists(), OneDevice():
        losses(method, net, x, label, ordinal, seed=1).loss_G.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["random", "left_to_right"])
@pytest.mark.parametrize("steps", [[], [1, 2, 4]])
def test_masked_tokens(steps, order, kind):
    _tokens(MaskedDiffusion(MaskedConfig(steps=steps, order=order, grid="cosine")), kind, causal=False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_block_of_tokens(kind):
    _tokens(NextBlock(NextBlockConfig()), kind, causal=True, block=3)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x * torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x * torch.ones(2).to(x.device),
        lambda x: x if x.any() else -x,
    ],
    ids=["float", "tolist", "tensor", "copy", "branch"],
)
def test_what_waits_is_seen(waits):
    x = torch.ones(2, device="meta")
    with pytest.raises((AssertionError, RuntimeError)), NoLists(), OneDevice():
        waits(x)


class Reads(TorchDispatchMode):
    """Counts values that are read back."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.name() == "aten::_local_scalar_dense"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("length", [2, 6])
def test_drawing_blocks_waits_as_often_whatever_their_number_and_takes_a_pass_for_each(length, monkeypatch):
    net = toy.token_net(length, 3, causal=True, block=2)
    passes, plain = [], net.model.states_kept
    monkeypatch.setattr(net.model, "states_kept", lambda *args: passes.append(1) or plain(*args))
    with Reads() as reads:
        blocks(net, toy.masks(net, 4), toy.no_label(4), toy.steps(torch.arange(4)))
    assert reads.count == 3, "what is given is looked at: whether it comes first, the longest, the shortest"
    assert len(passes) == length // 2
