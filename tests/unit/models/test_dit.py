"""The DiT: sizes to the unit, initialization, layout, and one whole forward pass in numpy."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.models import base, layers
from imm_scale.models.base import Backbone
from imm_scale.models.dit import DiT, DiTConfig, build, parameter_count, size_config

# imm.md section 5: without the s-embedder, what it adds.
PARAMETERS = {
    "S": (32_957_200, 246_528),
    "B": (130_500_112, 787_968),
    "L": (458_086_416, 1_312_768),
    "XL": (675_111_184, 1_624_320),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors: threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**overrides):
    fields = {"width": 16, "depth": 2, "heads": 2, "patch_size": 2, "channels": 3, "height": 4, "image_width": 6}
    return DiTConfig(**{**fields, "num_classes": 5, **overrides})


def randomized(config, std=0.2, dtype=torch.float64):
    """The net with every weight random: DiT starts from zeros, which hide mistakes."""
    net, generator = DiT(config).to(dtype), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(std * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net


def inputs(n=4, groups=2, config=None, dtype=torch.float64):
    config = config or tiny()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, config.channels, config.height, config.image_width, generator=generator, dtype=torch.float64)
    c_noise = 1000 * torch.rand(groups, generator=generator, dtype=torch.float64)
    second = c_noise * torch.rand(groups, generator=generator, dtype=torch.float64)
    return x.to(dtype), c_noise, second, torch.arange(n) % (config.num_classes + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("family", PARAMETERS)
def test_parameter_counts_are_the_published_ones_to_the_unit(family):
    without, added = PARAMETERS[family]
    assert parameter_count(size_config(f"DiT-{family}/2", second_time=False)) == without
    assert parameter_count(size_config(f"DiT-{family}/2", second_time=True)) == without + added


def test_parameter_count_is_that_of_the_built_net_and_its_position_table():
    config = tiny()
    net = DiT(config)
    assert parameter_count(config) == sum(p.numel() for p in net.parameters()) + net.pos_embed.numel()


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_sizes_are_read_from_their_names(patch):
    config = size_config(f"DiT-B/{patch}", num_classes=10, height=16, image_width=16)
    assert (config.width, config.depth, config.heads, config.patch_size) == (768, 12, 12, patch)
    assert config.num_classes == 10
    assert config.tokens == (16 // patch) ** 2


def test_overrides_win_over_the_table():
    net = build("DiT-S/2", width=32, depth=1, heads=2, height=4, image_width=4)
    assert isinstance(net, DiT)
    assert (net.config.width, len(net.blocks)) == (32, 1)


@pytest.mark.parametrize("size", ["DiT-M/2", "S/2", "DiT-S", "DiT-S/3", "DiT-S/two", "dit-s/2", "DiT-S/2/2", ""])
def test_unknown_sizes_are_refused_with_the_choice(size):
    with pytest.raises(UserError, match=r"DiT-S/2.*DiT-XL/8") as error:
        size_config(size)
    assert repr(size) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("heads", 3), ("width", 18), ("height", 5), ("image_width", 7), ("attention", "flash"), ("dropout", 1.0)],
)
def test_impossible_shapes_are_refused_by_name_and_value(field, value):
    with pytest.raises(UserError, match=str(value)):
        tiny(**{field: value})


# ---------------------------------------------------------------------------------------------------------------------
# Initialization


def test_output_is_0_at_initialization_and_blocks_are_the_identity():
    net = DiT(tiny())
    x, c_noise, second, label = inputs(dtype=torch.float32)
    assert (net(x, c_noise, second, label) == 0).all()
    tokens, condition = torch.randn(2, 6, 16), torch.randn(2, 16)
    for block in net.blocks:
        assert torch.equal(block(tokens, condition), tokens)


def test_only_what_adaln_zero_zeroes_is_zero():
    net = DiT(tiny(width=64))
    for name, p in net.named_parameters():
        zero = "adaLN" in name or name.startswith("final_layer.linear") or name.endswith("bias")
        assert (p == 0).all() == zero, name
    assert net.y_embedder.weight.std().item() == pytest.approx(0.02, rel=0.15)  # 384 draws: 4 standard errors
    for embedder in (net.t_embedder, net.s_embedder):
        for index in (0, 2):
            assert embedder.mlp[index].weight.std().item() == pytest.approx(0.02, rel=0.1)
    # Xavier's bound of a patch embedder seen as a matrix
    bound = math.sqrt(6 / (64 + 3 * 2 * 2))
    largest = net.x_embedder.weight.abs().max().item()
    assert 0.95 * bound < largest <= bound


def test_gradient_reaches_the_output_layer_from_the_first_step():
    net = DiT(tiny())
    x, c_noise, second, label = inputs(dtype=torch.float32)
    (net(x, c_noise, second, label) - 1).square().sum().backward()
    assert net.final_layer.linear.weight.grad.abs().max() > 0


# ---------------------------------------------------------------------------------------------------------------------
# The whole forward pass in numpy


def reference(net, x, c_noise, second, label):
    """DiT from its paper, a sample, a patch and a head at a time; qkv rows are queries, keys, values, head by head."""
    w = {name: p.detach().numpy() for name, p in net.named_parameters()}
    c = net.config
    p, d, k = c.patch_size, c.width, c.width // c.heads
    rows, columns = c.height // p, c.image_width // p

    def linear(name, u):
        return u @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(u):
        return u / (1 + np.exp(-u))

    def norm(u):
        return (u - u.mean(-1, keepdims=True)) / np.sqrt(u.var(-1, keepdims=True) + 1e-6)

    def embed(name, u):
        angles = u * 10000.0 ** (-np.arange(128) / 128)
        return linear(f"{name}.mlp.2", silu(linear(f"{name}.mlp.0", np.concatenate([np.cos(angles), np.sin(angles)]))))

    def positions():
        frequency = 10000.0 ** (-np.arange(d // 4) / (d // 4))
        parts = [
            np.concatenate([np.sin(j * frequency), np.cos(j * frequency), np.sin(i * frequency), np.cos(i * frequency)])
            for i in range(rows)
            for j in range(columns)
        ]
        return np.stack(parts).astype(np.float32).astype(np.float64)

    out = np.zeros(x.shape)
    repeats = len(x) // len(c_noise)
    for n, image in enumerate(x.numpy()):
        g = n // repeats
        condition = embed("t_embedder", c_noise[g].item()) + w["y_embedder.weight"][label[n]]
        if second is not None:
            condition = condition + embed("s_embedder", second[g].item())
        kernel = w["x_embedder.weight"].reshape(d, -1)
        h = np.stack(
            [
                kernel @ image[:, i * p : (i + 1) * p, j * p : (j + 1) * p].ravel() + w["x_embedder.bias"]
                for i in range(rows)
                for j in range(columns)
            ]
        )
        h = h + positions()
        for b in range(c.depth):
            name = f"blocks.{b}"
            six = np.split(linear(f"{name}.adaLN_modulation.1", silu(condition)), 6)
            qkv = linear(f"{name}.attn.qkv", norm(h) * (1 + six[1]) + six[0])
            attended = np.zeros_like(h)
            for head in range(c.heads):
                q, key, v = (qkv[:, part * d + head * k : part * d + (head + 1) * k] for part in range(3))
                share = np.exp(q @ key.T / math.sqrt(k))
                attended[:, head * k : (head + 1) * k] = share / share.sum(1, keepdims=True) @ v
            h = h + six[2] * linear(f"{name}.attn.proj", attended)
            u = linear(f"{name}.mlp.fc1", norm(h) * (1 + six[4]) + six[3])
            u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
            h = h + six[5] * linear(f"{name}.mlp.fc2", u)
        shift, scale = np.split(linear("final_layer.adaLN_modulation.1", silu(condition)), 2)
        patches = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
        for token, values in enumerate(patches):
            i, j = divmod(token, columns)
            block = values.reshape(p, p, c.channels)
            out[n, :, i * p : (i + 1) * p, j * p : (j + 1) * p] = np.moveaxis(block, 2, 0)
    return out


@pytest.mark.parametrize("config", [tiny(), tiny(second_time=False, heads=4, mlp_ratio=3.0, depth=1)])
def test_forward_pass_is_the_paper_in_numpy(config):
    net = randomized(config)
    x, c_noise, second, label = inputs(config=config)
    second = second if config.second_time else None
    output = net(x, c_noise, second, label).detach().numpy()
    expected = reference(net, x, c_noise, second, label.tolist())
    assert np.abs(expected).max() > 1
    # some 1e4 fp64 roundings on values up to 10
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-10)


def test_channels_of_a_token_are_ordered_row_column_channel():
    """A delta in one output channel of the last layer lights one pixel of one channel in every patch."""
    config = tiny()
    net = DiT(config)
    x, c_noise, second, label = inputs(n=1, groups=1, dtype=torch.float32)
    for row in range(2):
        for column in range(2):
            for channel in range(3):
                nn.init.zeros_(net.final_layer.linear.bias)
                with torch.no_grad():
                    net.final_layer.linear.bias[(row * 2 + column) * 3 + channel] = 1.0
                lit = torch.zeros(1, 3, 4, 6)
                lit[0, channel, row::2, column::2] = 1.0
                assert torch.equal(net(x, c_noise, second, label), lit)


def test_tokens_are_patches_in_row_major_order():
    net = randomized(tiny(depth=1))
    x = torch.zeros(1, 3, 4, 6, dtype=torch.float64)
    base = net.tokens_of(x)
    for row in range(2):
        for column in range(3):
            delta = x.clone()
            delta[0, 1, 2 * row + 1, 2 * column] = 1.0
            changed = (net.tokens_of(delta) != base).any(dim=2)[0]
            assert changed.nonzero().flatten().tolist() == [3 * row + column]


def test_position_table_travels_with_the_net_but_not_with_its_weights():
    net = DiT(tiny())
    assert "pos_embed" not in net.state_dict()
    assert net.pos_embed.shape == (1, 6, 16)
    assert not net.pos_embed.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Conditioning


def test_the_label_table_has_a_last_row_for_no_label():
    net = randomized(tiny(num_classes=7))
    assert net.y_embedder.weight.shape == (8, 16)
    assert net.null_label == 7
    x, c_noise, second, _ = inputs(n=2)
    null, last = net(x, c_noise, second, torch.tensor([7, 7])), net(x, c_noise, second, torch.tensor([6, 6]))
    assert not torch.allclose(null, last)


def test_times_per_group_equal_times_repeated_per_sample():
    net = randomized(tiny())
    x, c_noise, second, label = inputs(n=6, groups=2)
    each = net(x, c_noise.repeat_interleave(3), second.repeat_interleave(3), label)
    # another batch shape of the same matrix products: a few roundings
    torch.testing.assert_close(net(x, c_noise, second, label), each, rtol=0, atol=1e-12)


def test_samples_do_not_see_each_other():
    net = randomized(tiny())
    x, c_noise, second, label = inputs(n=4, groups=4)
    whole = net(x, c_noise, second, label)
    for n in range(4):
        rows = slice(n, n + 1)
        alone = net(x[rows], c_noise[rows], second[rows], label[rows])
        torch.testing.assert_close(alone, whole[rows], rtol=0, atol=1e-12)


def test_the_output_depends_on_time_second_time_and_label():
    net = randomized(tiny())
    x, c_noise, second, label = inputs()
    base = net(x, c_noise, second, label)
    for changed in (
        net(x, c_noise + 1, second, label),
        net(x, c_noise, second + 1, label),
        net(x, second, c_noise, label),
        net(x, c_noise, second, (label + 1) % 6),
    ):
        assert (changed - base).abs().max() > 1e-3


@pytest.mark.parametrize("second_time", [False, True])
def test_a_net_and_a_flow_map_that_disagree_on_the_second_time_are_caught(second_time):
    config = tiny(second_time=second_time)
    x, c_noise, second, label = inputs()
    with pytest.raises(AssertionError, match="second time"):
        DiT(config).double()(x, c_noise, None if second_time else second, label)


def test_a_net_in_fp32_tells_t_from_r_at_the_smallest_gap_under_bf16_autocast():
    """The condition is what t and r reach the net through: compared with fp64 at t - r = 1.4e-6, and its direction."""
    config = tiny(width=64)
    net = randomized(config, 0.05, torch.float32)
    c_noise = 1000 * torch.tensor([0.994, 0.994 - 1.4e-6], dtype=torch.float64)
    second, label = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        condition = net._condition(c_noise, second, label)
        modulation = net.blocks[0].adaLN_modulation(condition)
    assert condition.dtype == modulation.dtype == torch.float32
    net = net.double()
    exact = net._condition(c_noise, second, label)
    for values, expected in ((condition, exact), (modulation, net.blocks[0].adaLN_modulation(exact))):
        a, b = values[0].double() - values[1].double(), expected[0] - expected[1]
        # differences of 1e-4 in values of order 1, each rounded by 3e-8
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.999


# ---------------------------------------------------------------------------------------------------------------------
# Both branches, recomputation, dropout, precision


def gradients(net, call):
    net.zero_grad()
    call().square().sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


OPTIONS = [{}, {"qk_norm": True}, {"dropout": 0.3}, {"second_time": False}, {"time_embedding": "fourier"}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_pair_equals_two_separate_calls_in_value_and_gradient(options):
    config = tiny(**options)
    net = randomized(config)
    x, c_noise, second, label = inputs()
    second = second if config.second_time else None
    x_r, c_noise_r, key = x.flip(0), 0.9 * c_noise, torch.arange(4)
    args = (x, x_r, c_noise, c_noise_r, second, second, label, key)
    out_t, out_r = net.pair(*args)
    assert out_t.requires_grad
    assert not out_r.requires_grad
    torch.testing.assert_close(out_t, net(x, c_noise, second, label, key), rtol=0, atol=1e-12)
    torch.testing.assert_close(out_r, net(x_r, c_noise_r, second, label, key), rtol=0, atol=1e-12)

    together = gradients(net, lambda: (lambda a, b: a - b)(*net.pair(*args)))
    apart = gradients(net, lambda: (lambda a, b: a - b)(*Backbone.pair(net, *args)))
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_activation_checkpointing_gives_the_same_values_and_gradients(options):
    config = tiny(**options)
    net = randomized(config)
    x, c_noise, second, label = inputs()
    second = second if config.second_time else None
    args = (x, 0.5 * x, c_noise, 0.5 * c_noise, second, second, label, torch.arange(4))
    results = []
    for on in (False, True):
        net.activation_checkpointing = on
        results.append((net.pair(*args), gradients(net, lambda: net.pair(*args)[0])))
    ((out_t, out_r), plain), ((again_t, again_r), recomputed) = results
    assert torch.equal(out_t, again_t)
    assert torch.equal(out_r, again_r)
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_activation_checkpointing_recomputes_the_branch_with_gradient_only(monkeypatch):
    calls = []
    original = base.checkpoint
    monkeypatch.setattr(base, "checkpoint", lambda *a, **k: calls.append(torch.is_grad_enabled()) or original(*a, **k))
    net = DiT(tiny())
    net.activation_checkpointing = True
    x, c_noise, second, label = inputs(dtype=torch.float32)
    net.pair(x, x, c_noise, c_noise, second, second, label)
    assert calls == [True, True], "once per block"
    with torch.no_grad():
        net(x, c_noise, second, label)
    assert len(calls) == 2


def test_dropout_runs_only_with_keys_and_follows_them():
    net = randomized(tiny(dropout=0.4))
    x, c_noise, second, label = inputs()
    key = torch.tensor([5, 2**40, 7, 8])
    base = net(x, c_noise, second, label)
    dropped = net(x, c_noise, second, label, key)
    assert not torch.allclose(base, dropped)
    assert torch.equal(dropped, net(x, c_noise, second, label, key))
    other = net(x, c_noise, second, label, torch.tensor([5, 2**40, 7, 9]))
    torch.testing.assert_close(other[:3], dropped[:3], rtol=0, atol=1e-12)
    assert not torch.allclose(other[3], dropped[3])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pair_under_bf16_autocast_has_the_gradient_of_two_separate_calls(checkpointing):
    """Autocast caches weights it cast: cast first without gradient, they would lose theirs."""
    net = randomized(tiny(), dtype=torch.float32)
    net.activation_checkpointing = checkpointing
    x, c_noise, second, label = inputs(dtype=torch.float32)

    def pair():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out_t, out_r = net.pair(x, 0.5 * x, c_noise, 0.9 * c_noise, second, second, label)
        return out_t.float() - out_r.float()

    def separate():
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            out_r = net(0.5 * x, 0.9 * c_noise, second, label)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x, c_noise, second, label).float() - out_r.float()

    together, apart = gradients(net, pair), gradients(net, separate)
    for name, gradient in together.items():
        assert gradient.abs().max() > 0, name
        # fp32 sums of some 100 terms in another order: a few roundings of the largest; 16 bits would be 4e-3 off
        atol = 5e-6 * apart[name].abs().max().item()
        torch.testing.assert_close(gradient, apart[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_blocks_compiled_one_by_one_share_graphs_and_give_the_same_result(dropout):
    """A graph for each of 28 blocks would pass the compiler's limit of 8, and the rest silently run uncompiled."""
    torch.compiler.reset()
    net = randomized(tiny(depth=10, dropout=dropout), dtype=torch.float32)
    x, c_noise, second, label = inputs(dtype=torch.float32)
    args = (x, 0.5 * x, c_noise, 0.5 * c_noise, second, second, label, torch.arange(4))
    expected = net.pair(*args)
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    for block in net.blocks:  # as compile_blocks does, with a backend that counts
        block.compile(backend=counting, fullgraph=True)
    for step in range(4):
        outputs = net.pair(*args)
        (outputs[0] - outputs[1]).square().sum().backward()
        assert len(graphs) == 1, f"one for both branches, after step {step}"
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for _ in range(3):  # held-out samples: both branches without gradient and without dropout
            net.eval().pair(*args)
    assert len(graphs) == 2
    net.train().pair(*args)
    assert len(graphs) == 2


def test_every_dropout_of_the_net_has_a_mask_of_its_own(monkeypatch):
    """Captured as what each dropout did to its input: two in each of three blocks."""
    masks, original = [], layers.keyed_dropout

    def spy(x, *args, **kwargs):
        out = original(x, *args, **kwargs)
        masks.append(out == 0)
        return out

    monkeypatch.setattr(layers, "keyed_dropout", spy)
    x, c_noise, second, label = inputs()
    randomized(tiny(depth=3, dropout=0.5))(x, c_noise, second, label, torch.arange(4))
    assert len(masks) == 6
    flat = np.stack([mask.flatten().numpy() for mask in masks]).astype(float)
    correlation = np.corrcoef(flat) - np.eye(6)
    assert np.abs(correlation).max() < 4.5 / math.sqrt(flat.shape[1])  # 384 independent coins each


def test_flow_map_of_a_fresh_net_keeps_x_under_euler_fm():
    """G = 0 at initialization: f_{s,t} is the identity, and the loss at initialization is known."""
    f = FlowMap(DiT(tiny()), OTFlowMatching(), "euler_fm", null_label=5)
    x, _, _, label = inputs()
    times = torch.tensor([0.1, 0.2], dtype=torch.float64), torch.tensor([0.9, 0.8], dtype=torch.float64)
    assert torch.equal(f(x, *times, label), x)
    assert torch.equal(f(x, *times, label, guidance_scale=2.0), x)


def test_compiled_blocks_drop_what_plain_ones_drop():
    net = DiT(tiny(dropout=0.5))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, times = torch.randn(4, net.config.channels, net.config.height, net.config.image_width), torch.rand(4).double()
    arguments = (x, times, times, torch.zeros(4, dtype=torch.long), 3 * (2**31 + torch.arange(4)) + 2**62)
    plain = net(*arguments)
    net.compile_blocks()
    # A mask that differs in one element moves the output by 1e-1, another order of sums by 1e-7.
    torch.testing.assert_close(net(*arguments), plain, rtol=0, atol=1e-5)
