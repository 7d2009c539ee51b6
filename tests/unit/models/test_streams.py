"""A DiT of several blocks: who sees whom, one call against many, all blocks at once against one after another."""

import functools
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from imm_scale.errors import UserError
from imm_scale.models import streams
from imm_scale.models.base import Context
from imm_scale.models.block_causal import Cache
from imm_scale.models.dit import DiT, DiTConfig, ModelConfig

NET = DiTConfig(16, 2, 2, 2, channels=3, height=8, image_width=4, num_classes=5, blocks=4)
ROUNDING = 1e-12  # fp64, values of order 1, some hundred operations


def randomized(config: DiTConfig = NET, dtype: torch.dtype = torch.float64) -> DiT:
    """A net with every weight random: a fresh DiT answers 0."""
    net, generator = DiT(config).to(dtype), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net


def drawn(n: int = 4, groups: int = 2, blocks: int = 4):
    """A clean stream, a branch, its times (G, J) and labels."""
    generator = torch.Generator().manual_seed(0)
    clean, x = torch.randn(2, n, 3, 8, 4, generator=generator, dtype=torch.float64)
    c_noise, second = 1000 * torch.rand(2, groups, blocks, generator=generator, dtype=torch.float64)
    still = torch.zeros(groups, dtype=torch.float64)
    return Context(clean, still, still), x, c_noise, second, torch.arange(n)


def rows(x: torch.Tensor, block: int) -> torch.Tensor:
    """Block `block` of four of x (N, C, 8, W)."""
    return x[:, :, 2 * block : 2 * block + 2]


# ---------------------------------------------------------------------------------------------------------------------
# Who sees whom


def by_hand(blocks: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = blocks * size
    clean, branch = torch.zeros(tokens, tokens, dtype=bool), torch.zeros(tokens, 2 * tokens, dtype=bool)
    for i in range(tokens):
        for j in range(tokens):
            clean[i, j] = j // size <= i // size
            branch[i, j] = j // size < i // size
            branch[i, tokens + j] = j // size == i // size
    return clean, branch


@pytest.mark.parametrize(("blocks", "size"), [(1, 4), (2, 3), (4, 2), (6, 1)])
def test_masks_are_those_written_out(blocks, size):
    masks = streams.training_masks(blocks, size, torch.device("cpu"))
    clean, branch = by_hand(blocks, size)
    assert torch.equal(masks.clean, clean) and torch.equal(masks.branch, branch)
    # What later blocks see of earlier ones in sampling is the lower part of the same.
    for known in range(blocks - 1):
        later = streams.known_masks(blocks - known, size, known, torch.device("cpu"))
        assert torch.equal(later.clean, clean[known * size :]) and later.branch is None
    assert streams.known_masks(1, size, 2, torch.device("cpu")) == (None, None), "one block sees all before it"


def test_the_same_rule_drives_masks_that_skip_blocks():
    """What a GPU runs, on the CPU: flex attention under the rule equals dense attention under its mask."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, t, 2, 8, generator=generator) for t in (8, 16, 16))
    rule = streams.branch_sight(2, 8)
    dense = streams.attend_masked(q, k, v, streams._mask(rule, 8, 16, torch.device("cpu")), "sdpa")
    mask = create_block_mask(rule, None, None, 8, 16, "cpu")
    sparse = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)  # fp32 sums in another order
    torch.testing.assert_close(streams.attend_masked(q, k, v, mask, "sdpa"), dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "compiles", "works", "skips"),
    [
        ("cpu", True, True, False),
        ("cuda", False, True, False),
        ("cuda", True, False, False),
        ("cuda", True, True, True),
    ],
)
def test_only_a_gpu_that_compiles_and_runs_it_skips_what_masks_hide(device, compiles, works, skips, monkeypatch):
    tried = []
    monkeypatch.setattr(streams.fusion, "gpu_compiles", lambda: compiles)
    monkeypatch.setattr(streams, "flex_works", lambda where: tried.append(where) or works)
    streams.takes_block_masks.cache_clear()
    assert [streams.takes_block_masks(torch.device(device)) for _ in range(3)] == 3 * [skips]
    assert len(tried) == (device == "cuda" and compiles), "chosen once"
    streams.takes_block_masks.cache_clear()


def test_a_kernel_that_fails_is_said(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(streams, "_compiled_flex_attention", lambda: fails)
    with pytest.warns(UserWarning, match=r"masks are dense.*no kernel image\)"):
        assert not streams.flex_works(torch.device("cpu"))


def test_block_masks_are_made_once_where_they_are_taken(monkeypatch):
    monkeypatch.setattr(streams, "takes_block_masks", lambda device: True)
    masks = streams.training_masks(2, 8, torch.device("cpu"))
    assert isinstance(masks.branch, BlockMask) and streams.training_masks(2, 8, torch.device("cpu")) is masks
    streams._block_masks.cache_clear()
    clean, branch = by_hand(2, 8)
    for mask, dense in zip(masks, (clean, branch), strict=True):
        assert torch.equal(
            mask.mask_mod(None, None, *torch.meshgrid(*map(torch.arange, dense.shape), indexing="ij")), dense
        )


@pytest.mark.parametrize(
    ("head_width", "dtype", "fits"),
    [
        (72, torch.bfloat16, True),  # of XL
        (16, torch.float16, True),
        (8, torch.bfloat16, False),
        (192, torch.bfloat16, False),
        (72, torch.float32, False),
        (64, torch.float64, False),
    ],
)
def test_heads_that_no_kernel_fits_see_by_a_dense_mask(head_width, dtype, fits):
    assert streams.suits_block_masks(head_width, dtype) == fits


def test_a_block_depends_on_the_clean_blocks_before_and_on_itself():
    net, (context, x, c_noise, second, label) = randomized(), drawn()
    clean, x = context.x.requires_grad_(), x.requires_grad_()
    out = net(x, c_noise, second, label, context=context._replace(x=clean))
    for j in range(4):
        by_clean, by_x = torch.autograd.grad(rows(out, j).sum(), (clean, x), retain_graph=True)
        for i in range(4):
            assert (rows(by_clean, i).abs().max() > 0) == (i < j), (j, i)
            assert (rows(by_x, i).abs().max() > 0) == (i == j), (j, i)


def test_times_of_a_block_reach_that_block_alone():
    net, (context, x, c_noise, second, label) = randomized(), drawn()
    out = net(x, c_noise, second, label, context=context)
    c_noise[0, 2] += 1.0
    moved = (net(x, c_noise, second, label, context=context) - out).abs()
    assert (rows(moved, 2)[:2] > 0).any() and rows(moved, 2)[2:].max() == 0.0, "group 0 is samples 0 and 1"
    assert all(rows(moved, j).max() == 0.0 for j in (0, 1, 3))


# ---------------------------------------------------------------------------------------------------------------------
# One call against several


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pair_is_two_calls(checkpointing):
    net, (context, x, c_noise, second, label) = randomized(replace(NET, dropout=0.3)), drawn()
    net.activation_checkpointing = checkpointing
    x_r, times_r, key = x + 0.1, (0.9 * c_noise, 0.9 * second), torch.arange(4) + 7
    x = x.requires_grad_()
    out_t, out_r = net.pair(x, x_r, c_noise, times_r[0], second, times_r[1], label, key, context=context)
    alone = net(x, c_noise, second, label, key, context=context)
    torch.testing.assert_close(out_t, alone, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(out_r, net(x_r, *times_r, label, key, context=context), rtol=0, atol=ROUNDING)
    assert not out_r.requires_grad
    weights = (x, *net.parameters())
    whole, single = (torch.autograd.grad(out.square().sum(), weights) for out in (out_t, alone))
    for one, other in zip(whole, single, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pair_in_bf16_has_the_gradient_of_two_calls(checkpointing):
    """Autocast caches weights it cast: cast first without gradient, they would lose theirs."""
    net, (context, x, c_noise, second, label) = randomized(dtype=torch.float32), drawn()
    net.activation_checkpointing = checkpointing
    context, x, weights = context._replace(x=context.x.float()), x.float(), list(net.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out_t, out_r = net.pair(x, 0.5 * x, c_noise, 0.9 * c_noise, second, second, label, context=context)
    together = torch.autograd.grad((out_t.float() - out_r.float()).square().sum(), weights)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out_r = net(0.5 * x, 0.9 * c_noise, second, label, context=context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out_t = net(x, c_noise, second, label, context=context)
    apart = torch.autograd.grad((out_t.float() - out_r.float()).square().sum(), weights)
    for one, other in zip(together, apart, strict=True):
        assert one.abs().max() > 0
        # fp32 sums in another order: a few roundings of the largest; 16 bits would be 4e-3 off
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_blocks_one_after_another_are_all_of_them_at_once():
    """The layout of training is that of sampling: clean keys and values kept, or all in one pass under a mask."""
    net, (context, x, c_noise, second, label) = randomized(), drawn(groups=1)
    at_once = net(x, c_noise, second, label, context=context)
    for stretches in ([1, 1, 1], [2, 1], [3], [1, 2]):  # of how many blocks become known between calls
        cache, known = Cache(), 0
        out = net.next_block(rows(x, 0), c_noise[:, 0], second[:, 0], label, cache)
        torch.testing.assert_close(out, rows(at_once, 0), rtol=0, atol=ROUNDING)
        for new in stretches:
            since = context._replace(x=context.x[:, :, 2 * known : 2 * (known + new)])
            known += new
            block = rows(x, known), c_noise[:, known], second[:, known], label, cache
            first, again = net.next_block(*block, since), net.next_block(*block)
            torch.testing.assert_close(first, rows(at_once, known), rtol=0, atol=ROUNDING)
            torch.testing.assert_close(again, first, rtol=0, atol=ROUNDING)
            assert cache.blocks == known


def test_a_net_of_one_block_is_the_plain_net():
    """Same class of blocks, same names and shapes, and so the same bits: nothing of the streams is there."""
    plain, cut = DiT(replace(NET, blocks=1)), DiT(NET)
    assert {type(block) for block in plain.blocks} == {streams.Block}
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in cut.named_parameters()}
    torch.manual_seed(3)
    first = DiT(replace(NET, blocks=1)).state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(value, first[name]) for name, value in DiT(NET).state_dict().items())


def test_the_first_block_is_the_plain_net_on_its_rows():
    """It sees nothing before it, so a DiT of these rows, whose positions are the same, answers the same."""
    net, (context, x, c_noise, second, label) = randomized(), drawn()
    small = DiT(replace(NET, blocks=1, height=2)).double()
    small.load_state_dict(net.state_dict())
    alone = small(rows(x, 0), c_noise[:, 0], second[:, 0], label)
    torch.testing.assert_close(rows(net(x, c_noise, second, label, context=context), 0), alone, rtol=0, atol=ROUNDING)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("blocks", [3, 8])
def test_blocks_that_are_not_whole_rows_are_refused(blocks):
    with pytest.raises(UserError, match=rf"model\.blocks={blocks}.*4 x 2 patches.*divisor of 4"):
        replace(NET, blocks=blocks)


def test_a_net_of_blocks_is_not_told_its_guidance():
    with pytest.raises(UserError, match=r"model\.blocks=4.*guidance"):
        replace(NET, guidance=True)


def test_weights_of_one_block_start_a_net_of_four_and_not_the_reverse():
    plain = replace(NET, blocks=1)
    weights = DiT(plain).state_dict()
    made, notes = DiT(NET).adapted(weights, plain, list(range(5)), True)
    assert made.keys() == weights.keys() and len(notes) == 1 and "in 1 blocks, and are in 4 here" in notes[0]
    with pytest.raises(UserError, match=r"model\.blocks=4.*model\.blocks=1"):
        DiT(plain).adapted(weights, NET, list(range(5)), True)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled


def test_compiled_blocks_of_streams_share_graphs_and_give_the_same_result():
    """One graph for all blocks but the last, which ends the clean stream: none for each of ten, and none anew."""
    torch.compiler.reset()
    net = randomized(replace(NET, depth=10, dropout=0.3), torch.float32)
    context, x, c_noise, second, label = drawn()
    context, x = context._replace(x=context.x.float()), x.float()
    args = (x, 0.9 * x, c_noise, 0.9 * c_noise, second, 0.9 * second, label, torch.arange(4))
    expected = net.pair(*args, context=context)
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    for block in net.blocks:  # as compile_blocks does, with a backend that counts
        block.compile(backend=counting, fullgraph=True)
    for step in range(3):
        outputs = net.pair(*args, context=context)
        (outputs[0] - outputs[1]).square().sum().backward()
        assert len(graphs) == 2, f"after step {step}"
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)  # fp32 over ten blocks of random weights


def test_another_attention_kernel_is_said_not_to_serve_masks():
    assert any("model.blocks=4" in said for said in ModelConfig(attention="xformers", blocks=4).cautions(False))
    assert ModelConfig(blocks=4).cautions(True) == []


def _call_in_all_ways() -> None:
    net, (context, x, c_noise, second, label) = randomized(), drawn(groups=1)
    net.compile_blocks()
    out_t, _ = net.pair(x, x, c_noise, c_noise, second, second, label, context=context)
    out_t.sum().backward()
    with torch.no_grad():
        at_once, cache = net(x, c_noise, second, label, context=context), Cache()
        for j in range(4):
            since = context._replace(x=rows(context.x, j - 1)) if j else None
            block = rows(x, j), c_noise[:, j], second[:, j], label, cache
            for given in (since, None):  # the first call of a block carries the one before it
                out = net.next_block(*block, given)
            torch.testing.assert_close(out, rows(at_once, j), rtol=0, atol=ROUNDING)


def test_all_ways_a_block_is_called_are_compiled(monkeypatch):
    """Training, a held-out loss and sampling in one process: beyond its limit torch would run blocks uncompiled."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        _call_in_all_ways()
    assert counters["stats"]["unique_graphs"] > 8
