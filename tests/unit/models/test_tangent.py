"""The tangent written through the DiT: forward mode and differences say the same, and the value is that of forward."""

import itertools
import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.probability_path import OTFlowMatching, VPCosine
from imm_scale.models.base import Backbone
from imm_scale.models.dit import DiT, DiTConfig

OT, COSINE = OTFlowMatching(), VPCosine()
N = 4


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors: threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_net(dtype=torch.float32, **overrides):
    """Every weight random, biases of standard deviation 0.3: they are what a tangent must not see."""
    fields = {"width": 16, "depth": 2, "heads": 2, "patch_size": 2, "channels": 3, "height": 4, "image_width": 6}
    net, generator = DiT(DiTConfig(**{**fields, "num_classes": 5, **overrides})), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in net.named_parameters():
            std = 0.3 if name.endswith("bias") else 1.0 / p[0].numel() ** 0.5
            p.copy_(std * torch.randn(p.shape, generator=generator))
    return net.to(dtype)


def given(net, dtype=torch.float32, second=True, scale=1.0):
    """Inputs of `with_tangent`, each beside a random tangent; times are fp64."""
    generator = torch.Generator().manual_seed(2)
    c = net.config

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, dx = (normal(N, c.channels, c.height, c.image_width).to(dtype) for _ in range(2))
    times = [scale * torch.rand(2, generator=generator, dtype=torch.float64) for _ in range(2)]
    dtimes = [scale * normal(2) for _ in range(2)]
    seconds = (times[1], dtimes[1]) if second else (None, None)
    return x, dx, times[0], dtimes[0], *seconds, torch.arange(N) % 6


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


VARIANTS = [
    {},
    {"patch_size": 1},
    {"qk_norm": True},
    {"dropout": 0.5},
    {"time_embedding": "fourier"},
    {"second_time": False},
    {"qk_norm": True, "dropout": 0.2, "depth": 3},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_tangent_is_that_of_forward_mode_and_the_value_is_forwards_to_the_bit(variant):
    net = random_net(**variant)
    arguments = given(net, second=variant.get("second_time", True))
    key = torch.arange(N) if net.has_dropout else None
    out, tangent = net.with_tangent(*arguments, key)
    x, _, c_noise, _, second, _, label = arguments
    assert torch.equal(out, net(x, c_noise, second, label, key))
    assert out.requires_grad and not tangent.requires_grad
    reference, expected = Backbone.with_tangent(net, *arguments, key)
    assert torch.equal(reference, out)
    assert relative(tangent, expected) < 1e-6  # fp32


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_tangent_of_the_first_samples_alone_is_theirs(variant):
    """Of two of four samples, which are the first of two groups; forward mode takes them apart as well."""
    net = random_net(**variant)
    x, dx, c_noise, dc_noise, second, dsecond, label = given(net, second=variant.get("second_time", True))
    key = torch.arange(N) if net.has_dropout else None
    few = (x, dx[:2], c_noise, dc_noise[:1], second, None if dsecond is None else dsecond[:1], label)
    for method in (DiT.with_tangent, Backbone.with_tangent):
        _, whole = method(net, x, dx, c_noise, dc_noise, second, dsecond, label, key)
        out, first = method(net, *few, key)
        assert torch.equal(out, net(x, c_noise, second, label, key)) and len(first) == 2
        assert relative(first, whole[:2]) < 1e-6  # fp32


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_tangent_is_the_limit_of_a_difference(variant):
    net = random_net(torch.float64, **variant)
    x, dx, c_noise, dc_noise, second, dsecond, label = given(net, torch.float64, variant.get("second_time", True))
    key = torch.arange(N) if net.has_dropout else None
    _, tangent = net.with_tangent(x, dx, c_noise, dc_noise, second, dsecond, label, key)

    def at(h):
        moved = None if second is None else second + h * dsecond
        return net(x + h * dx, c_noise + h * dc_noise, moved, label, key)

    h = 1e-6  # of the error h^2 = 1e-12 and eps / h = 2e-10, the latter times the net's condition
    with torch.no_grad():
        difference = (at(h) - at(-h)) / (2 * h)
    # The Fourier embedding's frequencies reach 2 pi 16 * 3: a third derivative of 1e7 h^2.
    assert relative(difference, tangent) < (1e-4 if variant.get("time_embedding") == "fourier" else 1e-8)


def test_gradients_of_the_value_are_those_of_forward():
    net = random_net(torch.float64, qk_norm=True)
    arguments = given(net, torch.float64)
    x, _, c_noise, _, second, _, label = arguments
    out, tangent = net.with_tangent(*arguments)
    ours = torch.autograd.grad((out * tangent).sum(), list(net.parameters()))
    theirs = torch.autograd.grad((net(x, c_noise, second, label) * tangent).sum(), list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("variant", [{}, {"qk_norm": True}], ids=str)
def test_a_live_tangent_has_the_gradient_that_differences_of_the_loss_have(variant):
    net = random_net(torch.float64, **variant)
    generator = torch.Generator().manual_seed(3)
    parameters = list(net.parameters())
    along = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]

    def loss():
        out, tangent = net.with_tangent(*given(net, torch.float64), None, live=True)
        return tangent.square().mean() + (out * tangent).mean()

    def moved_by(step):
        with torch.no_grad():
            for p, direction in zip(parameters, along, strict=True):
                p.add_(direction, alpha=step)
        return float(loss().detach())

    gradients = torch.autograd.grad(loss(), parameters)
    slope = sum(float((g * direction).sum()) for g, direction in zip(gradients, along, strict=True))
    h = 1e-6
    difference = (moved_by(h) - moved_by(-2 * h)) / (2 * h)
    assert abs(difference - slope) < 1e-7 * abs(slope)  # h^2 and eps / h, times what the net makes of them


def test_recomputed_blocks_give_the_same_value_tangent_and_gradients():
    net = random_net()
    results = []
    for recomputed in (False, True):
        net.activation_checkpointing = recomputed
        for live in (False, True):
            out, tangent = net.with_tangent(*given(net), None, live=live)
            loss = (out * tangent).sum()
            results.append((out, tangent, *torch.autograd.grad(loss, list(net.parameters()))))
    for plain, again in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
def test_bf16_neither_drowns_small_tangents_in_biases_nor_overflows(size):
    net = random_net(width=64, heads=4, depth=4)
    arguments = list(given(net))
    for index in (1, 3, 5):
        arguments[index] = size * arguments[index]
    _, expected = net.double().with_tangent(*(a.double() if a.is_floating_point() else a for a in arguments))
    net.float()
    with torch.autocast("cpu", torch.bfloat16):
        out, tangent = net.with_tangent(*arguments)
        x, _, c_noise, _, second, _, label = arguments
        assert torch.equal(out, net(x, c_noise, second, label))
    assert relative(tangent, expected) < 1e-2  # 2^-8 and what four blocks make of it


def test_compiled_blocks_have_no_graph_break():
    net = random_net()
    expected = net.with_tangent(*given(net))
    for block in net.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = net.with_tangent(*given(net))
    assert all(relative(a, b) < 1e-6 for a, b in zip(got, expected, strict=True))


MAPS = [
    (path, parameterization, second)
    for path, parameterization, second in itertools.product(
        (OT, COSINE), ("identity", "simple_edm", "euler_fm", "velocity", "epsilon"), ("s", "t_minus_s", "none")
    )
    if not (path is COSINE and parameterization in ("euler_fm", "velocity"))
]


@pytest.mark.parametrize(("path", "parameterization", "second"), MAPS)
def test_the_total_derivative_is_the_limit_of_a_difference_along_the_path(path, parameterization, second):
    net = random_net(torch.float64, second_time=second != "none")
    flow_map = FlowMap(net, path, parameterization, second, time_scale=3.0)
    x, w, *_, label = given(net, torch.float64)
    s, t = torch.tensor([0.1, 0.3]).double(), torch.tensor([0.7, 0.6]).double()
    out, derivative = flow_map.with_tangent(x, w, s, t, label)
    assert torch.equal(out, flow_map.average(x, s, t, label))
    h = 1e-6
    with torch.no_grad():
        ahead, behind = (flow_map.average(x + d * w, s, t + d, label) for d in (h, -h))
    assert relative((ahead - behind) / (2 * h), derivative) < 1e-7  # as above, beside derivatives of c_in


@pytest.mark.parametrize(("path", "parameterization", "second"), MAPS)
def test_velocity_is_the_derivative_by_the_target_time_at_s_equal_to_t(path, parameterization, second):
    net = random_net(torch.float64, second_time=second != "none")
    flow_map = FlowMap(net, path, parameterization, second, time_scale=3.0)
    x, *_, label = given(net, torch.float64)
    t, h = torch.tensor([0.7, 0.4]).double(), 1e-5
    with torch.no_grad():
        velocity = flow_map.velocity(x, t, label)
        # f_{t,t}(x) = x, and s may pass t: 4 f(h) - f(2h) - 3 f(0) over 2h is exact to h^2.
        difference = (3 * x - 4 * flow_map(x, t - h, t, label) + flow_map(x, t - 2 * h, t, label)) / (2 * h)
    assert relative(difference, velocity) < 1e-8


@pytest.mark.parametrize(
    "config",
    [
        {"width": 1152, "depth": 1, "heads": 16, "channels": 4, "height": 32, "image_width": 32},
        {"width": 64, "depth": 3, "heads": 4, "channels": 1, "height": 8, "image_width": 8},
    ],
)
def test_value_and_tangent_cost_what_counting_products_by_hand_gives(config):
    with torch.device("meta"):
        net = DiT(DiTConfig(patch_size=2, **config))
        x, times, _, label = net.config.example(16)

    def counted(pass_):
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
            pass_()
        return counter.get_total_flops()

    forward = counted(lambda: net(x, times, times, label))
    both = counted(lambda: net.with_tangent(x, x, times, times, times, times, label))
    # A block multiplies 12 width^2 + 2 T width times a token for the value; the tangent's attention has 5 products.
    tokens, width = net.config.tokens, net.config.width
    by_hand = 2 + 3 * tokens / (12 * width + 2 * tokens)
    assert both / forward == pytest.approx(by_hand, abs=0.01)  # embedders and adaLN cost the same in both
