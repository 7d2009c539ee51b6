"""Parts of the transformer against numpy written from the DiT paper's formulas."""

import importlib.util
import math
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imm_scale.errors import UserError
from imm_scale.methods.imm_times import map_r
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.models import layers
from imm_scale.models.fp32_linear import Fp32Linear
from imm_scale.models.layers import (
    Attention,
    Block,
    FinalLayer,
    TimeEmbedder,
    attend,
    keyed_dropout,
    position_table,
    time_frequencies,
)

# A few dozen fp64 operations on values of order 1.
FP64 = 1e-12


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomized(module, std=0.2):
    """The module in fp64 with every weight random: DiT's zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(std * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


def weights(module):
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def layer_norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention_reference(w, x, heads, prefix="", qk_norm=False):
    """Softmax attention a head at a time; rows of qkv are queries, keys, values, each split into heads in order."""
    d = x.shape[-1]
    k = d // heads
    qkv = linear(w, f"{prefix}qkv", x)
    out = np.zeros_like(x)
    for h in range(heads):
        q, key, v = (qkv[..., part * d + h * k : part * d + (h + 1) * k] for part in range(3))
        if qk_norm:
            q, key = (
                u / np.sqrt((u**2).mean(-1, keepdims=True) + np.finfo(np.float64).eps) * w[f"{prefix}{name}.weight"]
                for u, name in ((q, "q_norm"), (key, "k_norm"))
            )
        logits = q @ key.transpose(0, 2, 1) / math.sqrt(k)
        share = np.exp(logits - logits.max(-1, keepdims=True))
        out[..., h * k : (h + 1) * k] = share / share.sum(-1, keepdims=True) @ v
    return linear(w, f"{prefix}proj", out)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_softmax_attention_head_by_head(heads, qk_norm):
    attention, x = randomized(Attention(8, heads, qk_norm, "sdpa")), randn(2, 5, 8)
    expected = attention_reference(weights(attention), x.numpy(), heads, qk_norm=qk_norm)
    np.testing.assert_allclose(attention(x).detach().numpy(), expected, rtol=0, atol=FP64)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_block_is_the_adaln_zero_block(qk_norm):
    block = randomized(Block(8, 2, 4.0, qk_norm, 0.0, "sdpa"))
    x, condition = randn(3, 5, 8), randn(3, 8, seed=2)
    w = weights(block)
    modulation = linear(w, "adaLN_modulation.1", condition.numpy())  # the net takes the SiLU once for all
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (u[:, None] for u in np.split(modulation, 6, axis=1))
    h = x.numpy()
    h = h + gate_a * attention_reference(w, layer_norm(h) * (1 + scale_a) + shift_a, 2, "attn.", qk_norm)
    hidden = gelu_tanh(linear(w, "mlp.fc1", layer_norm(h) * (1 + scale_m) + shift_m))
    h = h + gate_m * linear(w, "mlp.fc2", hidden)
    np.testing.assert_allclose(block(x, condition).detach().numpy(), h, rtol=0, atol=FP64 * 10)


def test_final_layer_is_modulated_norm_then_linear():
    layer = randomized(FinalLayer(8, 2, 3))
    x, condition = randn(3, 5, 8), randn(3, 8, seed=2)
    w = weights(layer)
    shift, scale = (u[:, None] for u in np.split(linear(w, "adaLN_modulation.1", condition.numpy()), 2, axis=1))
    expected = linear(w, "linear", layer_norm(x.numpy()) * (1 + scale) + shift)
    np.testing.assert_allclose(layer(x, condition).detach().numpy(), expected, rtol=0, atol=FP64)


# ---------------------------------------------------------------------------------------------------------------------
# Time embedding


def test_time_embedding_is_cosines_then_sines_of_geometric_frequencies_then_an_mlp():
    embedder = randomized(TimeEmbedder(12, "positional"))
    times = np.array([0.0, 1.0, 497.25, 994.0])
    angles = times[:, None] * 10000.0 ** (-np.arange(128) / 128)
    inputs = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    w = weights(embedder)
    expected = linear(w, "mlp.2", silu(linear(w, "mlp.0", inputs)))
    embedding = embedder(torch.from_numpy(times)).detach().numpy()
    # The angle 994 is rounded at 1e-13, and 256 of them are summed
    np.testing.assert_allclose(embedding, expected, rtol=0, atol=1e-10)


def test_fourier_frequencies_are_fixed_and_normal_with_scale_16():
    frequencies = time_frequencies("fourier")
    assert (frequencies.shape, frequencies.dtype) == ((128,), torch.float64)
    assert torch.equal(frequencies, time_frequencies("fourier"))
    # 128 draws at 4 standard errors
    assert frequencies.std().item() == pytest.approx(2 * math.pi * 16, rel=4 / math.sqrt(256))
    assert abs(frequencies.mean().item()) < 4 * 2 * math.pi * 16 / math.sqrt(128)


def test_an_unknown_time_embedding_is_refused_with_the_choice():
    with pytest.raises(UserError, match=r"'learned'.*positional, fourier"):
        time_frequencies("learned")


@torch.no_grad()
@pytest.mark.parametrize("t", [0.5, 0.7, 0.9, 0.994])
def test_embeddings_of_t_and_r_stay_apart_under_bf16_autocast(t):
    """At k = 12 and t = 0.994 t - r is 1.4e-6: rounding 1000 t, or the MLP, to bf16 would merge the two."""
    embedder = TimeEmbedder(64, "positional")
    modulation = Fp32Linear(64, 6 * 64)
    t = torch.tensor([t], dtype=torch.float64)
    r = map_r(OTFlowMatching(), torch.zeros_like(t), t, 12)
    both = 1000 * torch.cat([t, r])

    def differences(embedder, modulation, c_noise):
        embedded = embedder(c_noise)
        projected = modulation(torch.nn.functional.silu(embedded))
        return [(u[0] - u[1]).double() for u in (embedded, projected)]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = differences(embedder, modulation, both)
    exact = differences(embedder.double(), modulation.double(), both)
    for a, b in zip(autocast, exact, strict=True):
        assert a.abs().max() > 0
        # fp32 rounds embeddings of order 0.3 by 3e-8 while t and r are 1e-3 of their first angle apart
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.999
        assert a.norm() / b.norm() == pytest.approx(1, abs=0.01)


def test_fp32_linear_ignores_autocast_and_is_a_linear_layer():
    layer, x = Fp32Linear(32, 8), torch.randn(4, 32)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), expected)
        assert torch.nn.functional.linear(x, layer.weight, layer.bias).dtype == torch.bfloat16, "autocast was on"
        out = layer(x)
    out.sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(8, 32), rtol=1e-5, atol=1e-5)


def test_fp32_linear_compiled_under_autocast_has_an_fp32_backward_pass():
    """The compiler traces a backward pass under the forward's autocast, which would round both of its products."""
    torch.compiler.reset()
    layer, x = Fp32Linear(64, 64), torch.randn(32, 64, requires_grad=True)
    grad = torch.randn(32, 64)
    expected = torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    gradients = torch.autograd.grad(out, (x, *layer.parameters()), grad)
    # fp32 sums of 64 terms; with factors of 16 bits they would be 1e-2 off
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Positions


@pytest.mark.parametrize(("width", "rows", "columns"), [(8, 3, 3), (16, 2, 5), (384, 16, 16)])
def test_position_table_encodes_the_column_first_and_sin_before_cos(width, rows, columns):
    quarter = width // 4
    expected = np.zeros((rows * columns, width))
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                frequency = 10000.0 ** (-i / quarter)
                expected[row * columns + column, [i, quarter + i, 2 * quarter + i, 3 * quarter + i]] = (
                    math.sin(column * frequency),
                    math.cos(column * frequency),
                    math.sin(row * frequency),
                    math.cos(row * frequency),
                )
    table = position_table(width, rows, columns)
    assert table.dtype == torch.float32
    np.testing.assert_allclose(table.numpy(), expected, rtol=0, atol=1e-7)  # fp32


# ---------------------------------------------------------------------------------------------------------------------
# Dropout


def test_dropout_drops_the_share_and_scales_the_rest():
    x = torch.ones(50, 16, 32)
    dropped = keyed_dropout(x, 0.3, torch.arange(50), stream=0)
    mask = dropped != 0
    n = x.numel()
    assert abs(mask.float().mean().item() - 0.7) < 4.5 * math.sqrt(0.21 / n)
    torch.testing.assert_close(dropped[mask], torch.full((int(mask.sum()),), 1 / 0.7), rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(keys=st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=4, unique=True), stream=st.integers(0, 60))
def test_dropout_masks_are_functions_of_key_and_layer(keys, stream):
    x = torch.ones(len(keys), 8, 16)
    together = keyed_dropout(x, 0.5, torch.tensor(keys), stream)
    for row, key in enumerate(keys):
        assert torch.equal(keyed_dropout(x[:1], 0.5, torch.tensor([key]), stream)[0], together[row])
    assert not torch.equal(together[0], together[1])  # 128 coins: equal once in 2^128
    assert not torch.equal(keyed_dropout(x, 0.5, torch.tensor(keys), stream + 1), together)


def test_without_keys_or_at_p_0_there_is_no_dropout():
    x = randn(2, 3, 4)
    assert torch.equal(keyed_dropout(x, 0.5, None, 0), x)
    assert torch.equal(keyed_dropout(x, 0.0, torch.arange(2), 0), x)


def test_dropout_keeps_the_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert keyed_dropout(torch.ones(2, 3, 4, dtype=dtype), 0.5, torch.arange(2), 0).dtype == dtype


# ---------------------------------------------------------------------------------------------------------------------
# Attention back ends


def test_xformers_without_cuda_falls_back_to_torch_with_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    layers._xformers_works.cache_clear()
    q, k, v = (randn(2, 5, 2, 4, seed=i) for i in range(3))
    with pytest.warns(UserWarning, match="xformers needs a CUDA device"):
        output = attend(q, k, v, "xformers")
    layers._xformers_works.cache_clear()
    assert torch.equal(output, attend(q, k, v, "sdpa"))


def test_xformers_is_a_matter_of_the_tensors_device_and_said_once_where_it_cannot_run(monkeypatch):
    """A machine with CUDA and the package, a tensor on its CPU; on the meta device nothing is computed, or said."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "xformers")
    layers._xformers_works.cache_clear()
    assert layers.xformers_works("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = torch.empty(2, 5, 2, 4, device="meta")
        assert attend(q, q, q, "xformers").shape == q.shape
    with pytest.warns(UserWarning, match="xformers needs a CUDA device") as record:
        for _ in range(2):
            attend(*(randn(2, 5, 2, 4, seed=i) for i in range(3)), "xformers")
    layers._xformers_works.cache_clear()
    assert len(record) == 1


def test_a_block_that_asks_for_xformers_compiles_without_graph_breaks():
    torch.compiler.reset()
    layers._xformers_works.cache_clear()
    block = Block(16, 2, 4.0, False, 0.0, "xformers")
    x, condition = torch.randn(2, 4, 16), torch.randn(2, 16)
    with pytest.warns(UserWarning, match="xformers needs a CUDA device"):
        output = torch.compile(block, backend="eager", fullgraph=True)(x, condition)
    torch.testing.assert_close(output, block(x, condition), rtol=1e-6, atol=1e-6)
    layers._xformers_works.cache_clear()


def test_xformers_is_handed_the_layout_it_documents_where_cuda_has_it(monkeypatch):
    """Its memory_efficient_attention takes and gives (batch, tokens, heads, head width), scaled by 1 / sqrt(width)."""
    seen = []

    def memory_efficient_attention(q, k, v):
        seen.append(q.shape)
        weights = torch.softmax(torch.einsum("nthk,nshk->nhts", q, k) / q.shape[-1] ** 0.5, -1)
        return torch.einsum("nhts,nshk->nthk", weights, v)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(layers, "xformers_works", lambda device_type: True)
    q, k, v = (randn(2, 5, 3, 4, seed=i) for i in range(3))
    output = attend(q, k, v, "xformers")
    assert seen == [(2, 5, 3, 4)]
    torch.testing.assert_close(output, attend(q, k, v, "sdpa"))


def test_an_unknown_attention_is_refused_with_the_choice():
    q = randn(1, 2, 1, 4)
    with pytest.raises(UserError, match=r"'flash'.*sdpa, xformers"):
        attend(q, q, q, "flash")


# ---------------------------------------------------------------------------------------------------------------------
# Compilation


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_block_compiles_without_graph_breaks(dropout):
    torch.compiler.reset()
    block = Block(16, 2, 4.0, True, dropout, "sdpa")
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(std=0.2)
    x, condition = torch.randn(2, 4, 16), torch.randn(2, 16)
    key = torch.tensor([1, 2]) if dropout else None
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, condition, key), block(x, condition, key), rtol=1e-6, atol=1e-6)
