"""What the net asks of a device: products, casts, copies from the host, random numbers, counted by operator."""

from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from imm_scale.models import base, dit
from imm_scale.models.dit import DiT, DiTConfig
from imm_scale.models.layers import Attention, Block, TimeEmbedder, time_frequencies
from imm_scale.planner.flops import forward_multiply_adds

aten = torch.ops.aten
N, WIDTH, DEPTH = 4, 16, 3


def tiny(**overrides) -> DiTConfig:
    fields = {"width": WIDTH, "depth": DEPTH, "heads": 2, "patch_size": 2, "channels": 3, "height": 4, "image_width": 6}
    return DiTConfig(**{**fields, "num_classes": 5, **overrides})


def randomized(module: nn.Module) -> nn.Module:
    """Every weight random: DiT starts from zeros, which hide mistakes."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def pair_inputs(device: str = "cpu") -> tuple[Tensor, ...]:
    x, t = torch.randn(N, 3, 4, 6, device=device), torch.rand(2, dtype=torch.float64, device=device)
    s, label = torch.zeros_like(t), torch.zeros(N, dtype=torch.long, device=device)
    return x, 0.5 * x, 1000 * t, 900 * t, s, s, label, torch.arange(N, device=device)


class Recorder(TorchDispatchMode):
    """Every operator that runs, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def products_of(self, width: int) -> list[tuple[int, int, int]]:
        """(rows, inner, columns) of the matrix products one of whose sides is `width`."""
        factors = [args[-2:] for func, args, _ in self.calls if func in (aten.mm.default, aten.addmm.default)]
        shapes = [(a.shape[0], a.shape[1], b.shape[1]) for a, b in factors]
        return [shape for shape in shapes if width in shape]


# ---------------------------------------------------------------------------------------------------------------------
# Both branches at once


def test_a_block_projects_the_conditions_of_both_branches_in_one_product():
    """Forward once per block with the rows of both; backward twice per block with those that have a gradient."""
    net = randomized(DiT(tiny()))
    with Recorder() as forward:
        out_t, out_r = net.pair(*pair_inputs())
    assert forward.products_of(6 * WIDTH) == [(2 * N, WIDTH, 6 * WIDTH)] * DEPTH
    loss = (out_t - out_r).square().sum()
    with Recorder() as backward:
        loss.backward()
    into_condition, into_weight = (N, 6 * WIDTH, WIDTH), (6 * WIDTH, N, WIDTH)
    assert Counter(backward.products_of(6 * WIDTH)) == {into_condition: DEPTH, into_weight: DEPTH}


def test_a_pair_embeds_its_times_in_one_pass_and_takes_one_silu_for_all_blocks():
    net = randomized(DiT(tiny()))
    with Recorder() as forward:
        net.pair(*pair_inputs())
    counts = Counter(func for func, _, _ in forward.calls)
    assert counts[aten.cos.default] == 2, "one for t and r, one for s"
    assert counts[aten.silu.default] == 3, "one in each embedder and one for all adaLN"


def compiled_casts(call) -> list[Counter]:
    """Of each compiled graph, forward and backward, how often each tensor of some shape is cast to 16 bits."""
    casts_by_graph: list[Counter] = []

    def counting(graph, _):
        casts = [n for n in graph.graph.nodes if n.target == aten._to_copy.default]
        cast = [n for n in casts if n.meta["val"].dtype == torch.bfloat16]
        casts_by_graph.append(Counter(tuple(n.meta["val"].shape) for n in cast))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=counting, bw_compiler=counting, partition_fn=min_cut_rematerialization_partition)
    call(backend)
    return casts_by_graph


def test_compiled_branches_share_the_weights_that_were_cast():
    """And the backward pass casts none of them again; adaLN's, which stay in fp32, are never cast."""
    torch.compiler.reset()
    block = randomized(Block(WIDTH, 2, 4.0, False, 0.0, "sdpa"))
    x, condition = torch.randn(N, 6, WIDTH), torch.randn(N, WIDTH, requires_grad=True)

    def call(backend):
        compiled = torch.compile(block, backend=backend, fullgraph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out_t, _ = compiled(x, condition, None, 0.5 * x, 0.5 * condition.detach())
        out_t.square().sum().backward()

    forward, backward = compiled_casts(call)
    plain = [layer.weight for layer in block.modules() if type(layer) is nn.Linear]
    assert len(plain) == 4
    for weight in plain:
        assert forward[tuple(weight.shape)] == 1, weight.shape
    for weight in block.parameters():
        assert backward[tuple(weight.shape)] == 0, weight.shape
        assert weight.grad.dtype == torch.float32 and weight.grad.abs().max() > 0


def test_tokens_are_laid_out_one_after_the_other():
    """A convolution puts channels first; left so, every norm of every block would copy what it reads."""
    net = randomized(DiT(tiny()))
    x, _, t, _, s, _, label, _ = pair_inputs()
    seen = []
    for block in net.blocks:
        block.norm1.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_contiguous()))
    net(x, t, s, label)
    assert seen == [True] * DEPTH


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize(("width", "heads"), [(72, 1), (144, 2), (64, 1), (128, 2)])
def test_attention_is_one_fused_kernel_at_heads_of_72_and_64_and_copies_nothing(width, heads):
    """72 at XL, 64 at S, B and L."""
    attention = Attention(width, heads, False, "sdpa")
    x = torch.randn(2, 8, width)
    with Recorder() as recorder, torch.autocast("cpu", dtype=torch.bfloat16):
        attention(x)
    names = [func.overloadpacket.__name__ for func, _, _ in recorder.calls]
    fused = names.index("_scaled_dot_product_flash_attention_for_cpu")
    before = names[len(names) - 1 - names[::-1].index("unbind") : fused]
    assert not {"clone", "_to_copy", "copy_", "contiguous"} & {*before}, "queries, keys and values are views"
    assert "clone" not in names[fused:], "so is what the projection reads"


# ---------------------------------------------------------------------------------------------------------------------
# Copies from the host, and buffers


def test_a_pass_takes_nothing_from_the_host():
    """On the meta device a tensor of the CPU among an operator's arguments is a copy that a GPU would wait for."""
    for embedding in ("positional", "fourier"):
        net = DiT(tiny(dropout=0.1, qk_norm=True, time_embedding=embedding)).to("meta")
        with Recorder() as recorder:
            out_t, out_r = net.pair(*pair_inputs("meta"))
            (out_t - out_r).square().sum().backward()
        for func, args, kwargs in recorder.calls:
            devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            assert devices <= {"meta"}, func


@pytest.mark.parametrize("kind", ["positional", "fourier"])
def test_frequencies_keep_fp64_through_casts_of_the_module_and_stay_out_of_its_weights(kind):
    embedder = TimeEmbedder(8, kind)
    names = {name for name, _ in embedder.named_parameters()}
    assert set(embedder.state_dict()) == names == {f"mlp.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    for cast in (embedder.half, embedder.bfloat16, embedder.float, lambda: embedder.to(torch.float16)):
        cast()
        frequencies = embedder.frequency_bits.view(torch.float64)
        assert torch.equal(frequencies, time_frequencies(kind))
    assert embedder.to("meta").frequency_bits.device.type == "meta"
    if kind == "positional":
        expected = torch.tensor([10000.0 ** (-i / 128) for i in range(128)], dtype=torch.float64)
        torch.testing.assert_close(frequencies, expected, rtol=1e-14, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The meta device


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_passes_run_on_the_meta_device(autocast, checkpointing):
    with torch.device("meta"):
        net = DiT(tiny(dropout=0.1))
    net.activation_checkpointing = checkpointing
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out_t, out_r = net.pair(*pair_inputs("meta"))
    (out_t.float() - out_r.float()).square().sum().backward()
    assert out_t.shape == out_r.shape == (N, 3, 4, 6)
    assert all(p.grad.shape == p.shape for p in net.parameters())


@pytest.mark.parametrize("second_time", [False, True])
def test_operations_counted_on_the_meta_device_are_those_of_the_closed_form(second_time):
    config = dit.size_config("DiT-B/4", second_time=second_time)
    with torch.device("meta"):
        net = DiT(config)
        x, t, label = torch.empty(2, 4, 32, 32), torch.empty(2, dtype=torch.float64), torch.empty(2, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, t, t if second_time else None, label)
    assert counter.get_total_flops() == 2 * 2 * forward_multiply_adds(config)


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers


def test_the_net_draws_nothing_from_torchs_generators(monkeypatch):
    """So recomputation keeps no generator's state; an attention kernel draws only where it is given a dropout."""
    original, options = base.checkpoint, []
    monkeypatch.setattr(base, "checkpoint", lambda *a, **k: options.append(k) or original(*a, **k))
    net = randomized(DiT(tiny(dropout=0.3, qk_norm=True)))
    net.activation_checkpointing = True
    inputs, before = pair_inputs(), torch.get_rng_state()
    with Recorder() as recorder:
        out_t, out_r = net.pair(*inputs)
        (out_t - out_r).square().sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    seeded = {func for func, _, _ in recorder.calls if torch.Tag.nondeterministic_seeded in func.tags}
    assert seeded <= {aten._scaled_dot_product_flash_attention_for_cpu.default}
    dropouts = [args[3:4] for func, args, _ in recorder.calls if func in seeded]
    assert all(given in ((), (0.0,)) for given in dropouts)
    assert options and all(given["preserve_rng_state"] is False for given in options)
