"""A DiT whose branches are an MLP on states of its clean stream: who sees whom, one call against many, kept states."""

from dataclasses import replace

import pytest
import torch

from imm_scale.errors import UserError
from imm_scale.models.block_causal import Cache
from imm_scale.models.dit import DiT, DiTConfig, ModelConfig
from imm_scale.models.streams import CausalBlock
from tests.unit.models.test_streams import ROUNDING, drawn, randomized, rows

NET = DiTConfig(
    16, 2, 2, 2, channels=3, height=8, image_width=4, num_classes=5, blocks=4, branch="mlp", branch_depth=2,
    branch_width=12,
)  # fmt: skip


def test_a_block_depends_on_the_clean_blocks_before_and_on_all_of_itself():
    net, (context, x, c_noise, second, label) = randomized(NET), drawn()
    clean, x = context.x.requires_grad_(), x.requires_grad_()
    out = net(x, c_noise, second, label, context=context._replace(x=clean))
    for j in range(4):
        by_clean, by_x = torch.autograd.grad(rows(out, j).sum(), (clean, x), retain_graph=True)
        for i in range(4):
            assert (rows(by_clean, i).abs().max() > 0) == (i < j), (j, i)
            assert (rows(by_x, i).abs().max() > 0) == (i == j), (j, i)
    # The two patches of a block, columns 0 and 1 against 2 and 3: an MLP of each token would not see the other.
    (by_x,) = torch.autograd.grad(rows(out, 1)[..., :2].sum(), x)
    assert rows(by_x, 1)[..., 2:].abs().max() > 0


def test_times_of_a_block_reach_that_block_alone():
    net, (context, x, c_noise, second, label) = randomized(NET), drawn()
    out = net(x, c_noise, second, label, context=context)
    for times in (c_noise, second):
        times[0, 2] += 1.0
        moved = (net(x, c_noise, second, label, context=context) - out).abs()
        assert (rows(moved, 2)[:2] > 0).any() and rows(moved, 2)[2:].max() == 0.0, "group 0 is samples 0 and 1"
        assert all(rows(moved, j).max() == 0.0 for j in (0, 1, 3))
        times[0, 2] -= 1.0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pair_is_two_calls(checkpointing):
    net, (context, x, c_noise, second, label) = randomized(replace(NET, dropout=0.3)), drawn()
    net.activation_checkpointing = checkpointing
    x_r, times_r, key = x + 0.1, (0.9 * c_noise, 0.9 * second), torch.arange(4) + 7
    out_t, out_r = net.pair(x, x_r, c_noise, times_r[0], second, times_r[1], label, key, context=context)
    alone = net(x, c_noise, second, label, key, context=context)
    torch.testing.assert_close(out_t, alone, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(out_r, net(x_r, *times_r, label, key, context=context), rtol=0, atol=ROUNDING)
    assert not out_r.requires_grad
    whole, single = (torch.autograd.grad(out.square().sum(), list(net.parameters())) for out in (out_t, alone))
    for one, other in zip(whole, single, strict=True):
        assert one.abs().max() > 0, "every weight is used"
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)  # fp64, sums over some hundred terms


def test_a_pair_in_bf16_has_the_gradient_of_two_calls():
    """Autocast caches weights it cast: cast first without gradient, they would lose theirs."""
    net, (context, x, c_noise, second, label) = randomized(NET, torch.float32), drawn()
    context, x, weights = context._replace(x=context.x.float()), x.float(), list(net.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out_t, out_r = net.pair(x, 0.5 * x, c_noise, 0.9 * c_noise, second, second, label, context=context)
    together = torch.autograd.grad((out_t.float() - out_r.float()).square().sum(), weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out_t = net(x, c_noise, second, label, context=context)
    apart = torch.autograd.grad((out_t.float() - out_r.float()).square().sum(), weights)
    for one, other in zip(together, apart, strict=True):
        assert one.abs().max() > 0
        # fp32 sums in another order: a few roundings of the largest; 16 bits would be 4e-3 off
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_replicas_of_a_branch_share_one_clean_stream():
    """Three times the samples, replica after replica: as three calls with the same context, whose passes are one's."""
    net, (context, x, c_noise, second, label) = randomized(NET), drawn()
    xs, times = [x, x + 0.1, x - 0.2], [(c_noise, second), (0.5 * c_noise, second), (c_noise, 0.3 * second)]
    c_noises, seconds = (torch.cat(parts) for parts in zip(*times, strict=True))
    passes = []
    net.blocks[0].register_forward_hook(lambda block, args, out: passes.append(len(args[0])))
    branch = torch.cat(xs), c_noises, seconds, label.repeat(3)
    out_t, out_r = net.pair(branch[0], branch[0], c_noises, c_noises, seconds, seconds, branch[3], context=context)
    assert passes == [4], "one clean pass of the four samples, for both branches of all twelve"
    expected = torch.cat([net(y, *t, label, context=context) for y, t in zip(xs, times, strict=True)])
    for out in (out_t, out_r, net(*branch, context=context)):
        torch.testing.assert_close(out, expected, rtol=0, atol=ROUNDING)


def test_blocks_one_after_another_are_all_of_them_at_once():
    """Kept keys, values and states against one pass under a mask; the transformer runs on what is new alone."""
    net, (context, x, c_noise, second, label) = randomized(NET), drawn(groups=1)
    at_once, runs = net(x, c_noise, second, label, context=context), []
    net.blocks[0].register_forward_hook(lambda block, args, out: runs.append(args[0].shape[1]))
    for stretches in ([1, 1, 1], [2, 1], [3], [1, 2]):  # of how many blocks become known between calls
        cache, known = Cache(), 0
        runs.clear()
        for new in (0, *stretches):
            since = context._replace(x=context.x[:, :, 2 * known : 2 * (known + new)])
            known += new
            block = rows(x, known), c_noise[:, known], second[:, known], label, cache
            first, again = net.next_block(*block, since), net.next_block(*block)
            torch.testing.assert_close(first, rows(at_once, known), rtol=0, atol=ROUNDING)
            assert torch.equal(again, first) and cache.blocks == known
        assert runs == [2 * new for new in (1, *stretches)], "tokens, those of the learned block first"
    cache = Cache()
    assert net.starts(cache)
    net.next_block(rows(x, 2), c_noise[:, 2], second[:, 2], label, cache, context._replace(x=context.x[:, :, :4]))
    assert cache.blocks == 2 and not net.starts(cache), "known blocks and the learned one in one call"


def test_branches_are_drawn_as_zero_at_first_and_the_transformer_as_without():
    torch.manual_seed(3)
    net = DiT(NET)
    assert {type(block) for block in net.blocks} == {CausalBlock}
    torch.manual_seed(3)
    plain = DiT(replace(NET, branch="transformer", branch_depth=None, branch_width=None))
    assert {n: p.shape for n, p in net.blocks.named_parameters()} == {
        n: p.shape for n, p in plain.blocks.named_parameters()
    }
    context, x, c_noise, second, label = drawn()
    out = net.double()(x, c_noise, second, label, context=context)
    assert out.abs().max() == 0.0


def test_compiled_blocks_give_the_same_result():
    torch.compiler.reset()
    net, (context, x, c_noise, second, label) = randomized(replace(NET, depth=10), torch.float32), drawn()
    context, x, graphs = context._replace(x=context.x.float()), x.float(), []
    expected = net(x, c_noise, second, label, context=context)

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    for block in net.blocks:  # as compile_blocks does, with a backend that counts
        block.compile(backend=counting, fullgraph=True)
    out = net(x, c_noise, second, label, context=context)
    assert len(graphs) == 1, "one for all ten"
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)  # fp32 over ten blocks of random weights


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"blocks": 1}, r"model\.branch=mlp.*model\.blocks=1.*set model\.blocks above 1"),
        ({"branch": "lstm"}, r"model\.branch='lstm'.*transformer, mlp"),
        ({"branch": "transformer"}, r"model\.branch_depth=2 is of model\.branch=mlp"),
        ({"branch_width": 0}, r"model\.branch_width=0"),
    ],
)
def test_what_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        replace(NET, **settings)


def test_a_config_that_has_nothing_to_branch_from_is_refused():
    ModelConfig(branch="mlp", blocks=4).validate()
    with pytest.raises(UserError, match=r"model\.branch=mlp.*set model\.blocks above 1"):
        ModelConfig(branch="mlp").validate()
