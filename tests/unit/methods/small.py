"""A net with few weights, its flow map and a batch, for the tests of the objective."""

import dataclasses

import torch
from torch import nn

from imm_scale.data.batch import Batch
from imm_scale.data.manifest import Codec
from imm_scale.data.spaces import Latents
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.flow_matching import FlowMatching, FlowMatchingConfig
from imm_scale.methods.imm import ImmConfig, InductiveMomentMatching
from imm_scale.methods.probability_path import OTFlowMatching, VPCosine
from imm_scale.methods.special_cases import GenerativeMomentMatching, GmmnConfig
from imm_scale.models.base import Backbone
from imm_scale.models.dit import DiT, DiTConfig

OT, COSINE = OTFlowMatching(), VPCosine()
SIGMA_D = 0.5


def imm(**settings):
    """IMM with every setting named or as it is by default in fp32."""
    return InductiveMomentMatching(ImmConfig(**settings).resolved("fp32"))


def flow_matching(**settings):
    return FlowMatching(FlowMatchingConfig(**settings).resolved("fp32"))


def gmmn(**settings):
    return GenerativeMomentMatching(GmmnConfig(**settings).resolved("fp32"))


def varied(method, **changes):
    """The same method with other settings."""
    return type(method)(dataclasses.replace(method.config, **changes))


def losses(method, net, x, label, ordinal, seed):
    """What the method makes of whole groups."""
    weight = torch.ones(len(x) // method.group_size, device=x.device)
    return method.loss(net, Batch(0, x, label, ordinal, weight), seed)


BASE = imm(particles=4, t_min=0.0, t_max=0.994, k=12, label_drop=0.0)


def starting_noise(shape, index, seed):
    """What sampling starts from, (N, *shape) fp64."""
    return _space(shape).prior(seed, "sample", index).double()


def fresh_noise(shape, index, seed):
    """The noise that restarts add, by step."""
    return lambda step: _space(shape).prior(seed, "restart", index, stream=step).double()


def _space(shape):
    return Latents(SIGMA_D, tuple(shape), Codec("pixels", "", 1, 1, 1, (0.0,), (1.0,)), 5, ())


class Net(Backbone):
    """A net with few weights that looks at everything it is given; it remembers its calls."""

    def __init__(self, zero=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = 0.3 * torch.randn(6, generator=generator, dtype=torch.float64)
        self.w = nn.Parameter(torch.zeros_like(weights) if zero else weights)
        self.calls = []

    def forward(self, x, c_noise, second, label, dropout_key=None):
        self.calls.append((x.detach(), c_noise, second, label, dropout_key))
        per_sample = [
            v.repeat_interleave(len(x) // len(v)).view(-1, *[1] * (x.dim() - 1)) / 1000 for v in (c_noise, second)
        ]
        w, label = self.w, label.view(-1, *[1] * (x.dim() - 1))
        mixed = w[0] * x.roll(1, -1) + w[1] * torch.tanh(x) + w[2] * per_sample[0] + w[3] * torch.sin(3 * per_sample[1])
        return mixed + w[4] * torch.cos(label.double()) * x**2 + w[5] * x


def clean(groups, m, shape=(2, 3, 3), seed=0, dtype=torch.float64):
    """Unit-scaled data: standard deviation sigma_d."""
    generator = torch.Generator().manual_seed(seed)
    return SIGMA_D * torch.randn(groups * m, *shape, generator=generator, dtype=dtype)


def batch(objective, groups, first_group=0, **kwargs):
    m = objective.group_size
    x = clean(groups, m, **kwargs)
    ordinal = torch.arange(first_group * m, (first_group + groups) * m)
    return x, torch.arange(groups * m) % 5, ordinal


def flow_map_of(net=None, interp=OT, parameterization="euler_fm", second_time="s", null_label=None):
    net = Net() if net is None else net
    return FlowMap(net, interp, parameterization, second_time, SIGMA_D, null_label=null_label)


def small_dit(**overrides):
    torch.manual_seed(0)
    config = DiTConfig(16, 2, 2, 2, channels=2, height=4, image_width=4, num_classes=5, **overrides)
    net = DiT(config).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net
