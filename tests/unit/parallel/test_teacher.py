"""A net that holds a moving average of another: its weights against the average in float64, and what it answers."""

import copy

import numpy as np
import pytest
import torch

from imm_scale import config as configs
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.methods.tvm import TerminalVelocityMatching, TvmConfig
from imm_scale.models.dit import DiT, DiTConfig
from imm_scale.parallel.ema import ShardedEma
from imm_scale.parallel.param_slice import ParamSlice
from imm_scale.parallel.teacher import Teacher
from tests.unit.methods.small import losses

DECAY = 0.9


def _flow_map() -> FlowMap:
    torch.manual_seed(0)
    net = DiT(DiTConfig(width=8, depth=1, heads=2, patch_size=2, channels=2, height=4, image_width=4, num_classes=3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0, 0.3)
    return FlowMap(net, OTFlowMatching(), "euler_fm", "t_minus_s", 0.5, 1.0, null_label=3)


def _halves(flow_map: FlowMap) -> list[ParamSlice]:
    """Every parameter as two slices, as two owners would have them."""
    slices = []
    for name, parameter in flow_map.model.named_parameters():
        whole = ParamSlice(name, tuple(parameter.shape), 0, {"weight": parameter.data.view(-1)})
        slices += [part for number in (0, 1) if (part := whole.even_part(number, 2)) is not None]
    return slices


def test_its_weights_are_the_average_of_all_that_were():
    flow_map = _flow_map()
    ema = ShardedEma(_halves(flow_map), [0.5, DECAY])
    teacher = Teacher(copy.deepcopy(flow_map), ema, DECAY)
    expected = {name: p.detach().double().numpy().copy() for name, p in flow_map.model.named_parameters()}
    for step in range(5):
        with torch.no_grad():
            for parameter in flow_map.model.parameters():
                parameter.add_(0.1 * (step + 1))
        ema.update()
        teacher.refresh()
        for name, parameter in flow_map.model.named_parameters():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * parameter.detach().double().numpy()
    for name, parameter in teacher.net.model.named_parameters():
        assert not parameter.requires_grad
        np.testing.assert_allclose(parameter.numpy(), expected[name], rtol=1e-5, atol=1e-6)  # five fp32 lerps


def test_terminal_velocity_matching_takes_the_velocity_from_it():
    """Of a teacher with other weights the target is another; of one with the same weights, the net's own."""
    flow_map = _flow_map()
    averaged = TerminalVelocityMatching(TvmConfig(teacher_decay=DECAY, label_drop=0.0).resolved("fp32"))
    own = TerminalVelocityMatching(TvmConfig(label_drop=0.0).resolved("fp32"))
    x, ordinal = 0.5 * torch.randn(8, 2, 4, 4), torch.arange(8)
    data = (x, ordinal % 3, ordinal, 1)
    averaged.teacher = copy.deepcopy(flow_map)
    assert torch.equal(losses(averaged, flow_map, *data).loss_G, losses(own, flow_map, *data).loss_G)
    with torch.no_grad():
        averaged.teacher.model.final_layer.linear.bias.add_(1.0)  # G moves by 1 everywhere, and so the velocity by 0.5
    moved = losses(averaged, flow_map, *data)
    difference = moved.monitors["residual"] - losses(own, flow_map, *data).monitors["residual"]
    assert float(difference.abs().min()) > 0.0
    loss = moved.loss_G.sum()
    loss.backward()
    assert all(parameter.grad is None for parameter in averaged.teacher.parameters())


def test_its_average_has_to_be_kept():
    words = ["method.name=tvm", "method.teacher_decay=0.99", "method.flow_map.second_time=t_minus_s"]
    configs.load([], [*words, "ema.decays=[0.9999,0.99]"])
    with pytest.raises(UserError, match=r"set ema\.decays=\[0\.9999, 0\.99\]"):
        configs.load([], [*words, "ema.decays=[0.9999]"])
