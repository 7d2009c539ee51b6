"""What TF32 leaves of the conditioning: matrix units emulated by rounding the factors of every product.

TF32 keeps 10 bits of the mantissa, so that rounding is off by u = 2^-11 at most, relatively, and cutting off by 2 u.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from imm_scale.methods import imm_times
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.models import fp32_linear
from imm_scale.models.dit import DiT, DiTConfig
from imm_scale.models.fp32_linear import Fp32Linear, split_product, tf32_part

U = 2.0**-11
_FACTORS = {torch.ops.aten.mm.default: (0, 1), torch.ops.aten.addmm.default: (1, 2)}


def rounded(x: Tensor) -> Tensor:
    """x to 11 significant bits, ties to even, by frexp and round: written unlike the net's own."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp(torch.round(mantissa * 2**11), exponent - 11).to(x.dtype)


def cut_off(x: Tensor) -> Tensor:
    """x to 11 significant bits, towards zero, as units do that are handed fp32 words and do not read the last bits."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp(torch.trunc(mantissa * 2**11), exponent - 11).to(x.dtype)


class MatrixUnits(TorchDispatchMode):
    """Rounds the factors of every fp32 product as the matrix units of a GPU do; sums stay in fp32."""

    def __init__(self, rounding=rounded) -> None:
        super().__init__()
        self.rounding = rounding
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args = list(args)
        for position in _FACTORS.get(func, ()):
            self.products += position == 1
            args[position] = self.rounding(args[position])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tf32(monkeypatch):
    """The net believes that its products round to TF32, as on a GPU where they are allowed to."""
    monkeypatch.setattr(fp32_linear, "rounds_to_tf32", lambda x: x.dtype == torch.float32)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_tf32_part_is_the_nearest_value_and_the_rest_is_exact():
    x = numbers(10_000) * torch.exp2(torch.linspace(-60, 60, 10_000))
    high = tf32_part(x)
    assert torch.equal(high, rounded(high))
    assert ((x - high).abs() <= U * x.abs()).all()
    assert torch.equal(high.double() + (x - high).double(), x.double())
    ties = (high.double() - rounded(x).double()).abs() > 0
    assert ties.double().mean() < 1e-3  # a tie once in 2^13, which we break upwards
    assert tf32_part(torch.tensor([0.0, -0.0, 1.5])).tolist() == [0.0, 0.0, 1.5]


def test_a_value_that_is_no_number_stays_none():
    x = torch.tensor([[float("nan")], [float("inf")]])
    assert split_product(x, torch.ones(1, 1), torch.zeros(1)).isnan().all()


def test_the_split_product_has_the_input_to_22_bits_and_the_weight_to_11():
    """Elementwise: |W| |x| times what its factors are rounded by and what fp32 sums of 2 x 64 terms add."""
    layer, x = Fp32Linear(64, 96), numbers(32, 64)
    weight = rounded(layer.weight.detach())
    with MatrixUnits():
        product = split_product(x, layer.weight, layer.bias)
    exact = x.double() @ weight.double().t() + layer.bias.double()
    scale = x.abs().double() @ weight.abs().double().t()
    bound = (U**2 + 64 * 2.0**-24) * scale + 2.0**-23 * exact.abs()
    assert ((product - exact).abs() <= bound).all()
    with MatrixUnits():
        plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert (plain - exact).abs().mean() > 30 * (product - exact).abs().mean()


@pytest.fixture
def allowed():
    """The flag, which is not monkeypatched: its object has it by __getattr__ only."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_only_fp32_products_on_cuda_are_rounded_and_only_where_allowed(allowed):
    def rounds(device: str, dtype: torch.dtype) -> bool:
        return fp32_linear.rounds_to_tf32(SimpleNamespace(device=torch.device(device), dtype=dtype))

    assert rounds("cuda:0", torch.float32)
    assert not rounds("cuda:0", torch.float64)
    assert not rounds("cpu", torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = False
    assert not rounds("cuda:0", torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# The difference of what t and r(s, t) make of the net


def net() -> DiT:
    """A DiT with every weight random: its projections start from zeros, which would hide everything."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(width=64, depth=2, heads=2, patch_size=2, height=8, image_width=8, num_classes=5))
    with torch.no_grad():
        for block in (*model.blocks, model.final_layer):
            torch.nn.init.normal_(block.adaLN_modulation[-1].weight, std=0.02)
    return model


@torch.no_grad()
def differences(model: DiT, t: float) -> dict[str, Tensor]:
    """Of the condition and of every modulation, between t and r at the published mapping (k = 12, no gap), s = 0."""
    t = torch.tensor([t], dtype=torch.float64)
    r = imm_times.map_r(OTFlowMatching(), torch.zeros_like(t), t, 12)
    c_noise, second, label = 1000 * torch.cat([t, r]), torch.zeros(2, dtype=torch.float64), torch.tensor([1, 1])
    condition = model._condition(c_noise, second, label)
    values = {"condition": condition}
    for name, layer in (*model.blocks.named_children(), ("final", model.final_layer)):
        values[name] = layer.adaLN_modulation(condition)
    return {name: (value[0] - value[1]).double() for name, value in values.items()}


def errors(approximate: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((approximate[name] - exact[name]).norm() / exact[name].norm()) for name in exact}


# Weights are rounded by u of themselves at most, which changes a difference by u of its norm. Three layers of them lie
# between a time and a modulation; where the SiLUs take their slope moves by as little, which may count once more. What
# fp32 itself does to the difference is measured and comes on top: twice for the 22 bits that are kept, 8 times for the
# 20 where bits are cut off.
LAYERS = 3


@pytest.mark.parametrize(
    ("rounding", "u", "factor"), [(rounded, U, 2), (cut_off, 2 * U, 8)], ids=["rounded", "cut off"]
)
@pytest.mark.parametrize(("t", "lost"), [(0.95, 0.01), (0.98, 0.05), (0.99, 0.2)])
def test_the_difference_of_t_and_r_survives_tf32(tf32, monkeypatch, t, lost, rounding, u, factor):
    model = net()
    in_fp32 = differences(model, t)
    with MatrixUnits(rounding) as units:
        split = differences(model, t)
    assert units.products == 4 + 3
    monkeypatch.undo()
    with MatrixUnits(rounding):
        plain = differences(model, t)
    exact = differences(model.double(), t)
    of_fp32, of_split, of_plain = (errors(difference, exact) for difference in (in_fp32, split, plain))
    print(t, of_fp32, of_split, of_plain)
    for name in exact:
        assert of_split[name] <= 2 * LAYERS * u + factor * of_fp32[name], (name, of_split, of_fp32)
        assert of_plain[name] > lost, (name, of_plain)


def test_rows_without_gradient_come_out_of_the_same_product_and_leave_the_gradient_alone(tf32):
    layer, x, still = Fp32Linear(16, 24), numbers(5, 16).requires_grad_(), numbers(7, 16).requires_grad_()
    out, still_out = layer(x, still[2:])
    assert out.requires_grad and not still_out.requires_grad
    assert torch.equal(out, layer(x)) and torch.equal(still_out, layer(still[2:]))
    gradients = torch.autograd.grad(out.square().sum(), (x, layer.weight, layer.bias))
    expected = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight, layer.bias))
    for a, b in zip(gradients, expected, strict=True):
        assert torch.equal(a, b)


def test_gradients_under_tf32_are_those_of_the_whole_input(tf32):
    layer, x = Fp32Linear(16, 24), numbers(5, 16).requires_grad_()
    out = layer(x)
    grad = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(out, (x, layer.weight, layer.bias), grad)
    expected = torch.autograd.grad(
        torch.nn.functional.linear(x, layer.weight, layer.bias), (x, layer.weight, layer.bias), grad
    )
    torch.testing.assert_close(gradients, expected, rtol=1e-6, atol=1e-6)  # fp32 sums of 24 terms at most


def test_the_split_compiles_in_one_graph_without_changing_a_bit(tf32):
    torch.compiler.reset()
    layer, x = Fp32Linear(16, 24), numbers(5, 16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(compiled(x), plain, rtol=1e-5, atol=1e-6)
