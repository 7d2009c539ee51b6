"""What the IMM loss may depend on: keys of dropout and label drop, groups, and nothing of how a batch is cut."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imm_scale.errors import UserError
from imm_scale.methods.base import concatenated
from tests.unit.methods.small import BASE, Net, batch, clean, flow_map_of, losses, small_dit, varied

# ---------------------------------------------------------------------------------------------------------------------
# Dropout and label drop


def test_dropout_masks_are_shared_by_both_branches_and_differ_between_samples():
    net = small_dit(dropout=0.5)
    x = clean(1, 1, (2, 4, 4)).expand(4, -1, -1, -1)
    label, time = torch.zeros(4, dtype=torch.long), torch.tensor([300.0], dtype=torch.float64)
    key = BASE.dropout_key(flow_map_of(net), torch.arange(4), seed=0)
    out_t, out_r = net.pair(x, x, time, time, time, time, label, key)
    assert torch.equal(out_t, out_r), "same input, same mask"
    assert len({tuple(row.flatten().tolist()) for row in out_t}) == 4, "but a mask for each sample"
    assert BASE.dropout_key(flow_map_of(small_dit()), torch.arange(4), seed=0) is None
    without, _ = net.pair(x, x, time, time, time, time, label, None)
    assert not torch.allclose(without, out_t)
    torch.testing.assert_close(without[1:], without[:-1], rtol=1e-12, atol=0)


def test_the_objective_gives_both_branches_the_same_dropout_keys_and_new_ones_later():
    net, objective = Net(), BASE
    net.has_dropout = True
    x, label, ordinal = batch(objective, 3)
    for shift in (0, 12):
        losses(objective, flow_map_of(net), x, label, ordinal + shift, seed=0)
    keys = [call[4] for call in net.calls]
    assert torch.equal(keys[0], keys[1])
    assert torch.equal(keys[2], keys[3])
    assert len(set(keys[0].tolist()) | set(keys[2].tolist())) == 24


def dropped_labels(objective, ordinal, seed=0):
    net = Net()
    losses(objective, flow_map_of(net, null_label=77), torch.ones(len(ordinal), 1), 0 * ordinal + 3, ordinal, seed)
    labels = [call[3] for call in net.calls]
    assert torch.equal(labels[0], labels[1]), "one draw for both passes"
    assert set(labels[0].tolist()) <= {3, 77}
    return labels[0] == 77


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_a_share_of_the_labels_is_dropped_sample_by_sample(p):
    n = 20_000
    dropped = dropped_labels(varied(BASE, label_drop=p), torch.arange(n)).double()
    assert abs(dropped.mean().item() - p) < 4.5 * math.sqrt(p * (1 - p) / n)
    of_group = dropped.view(-1, 4)
    # independent inside a group: the number dropped of 4 has the variance of the binomial, within 6 %
    assert of_group.sum(1).var().item() == pytest.approx(4 * p * (1 - p), rel=0.06)


def test_label_drop_is_keyed_by_ordinal_and_seed():
    objective = varied(BASE, label_drop=0.3)
    whole = dropped_labels(objective, torch.arange(400))
    assert torch.equal(dropped_labels(objective, torch.arange(100, 200)), whole[100:200])
    assert not torch.equal(dropped_labels(objective, torch.arange(400, 800)), whole)
    assert not torch.equal(dropped_labels(objective, torch.arange(400), seed=1), whole)
    assert not dropped_labels(varied(BASE, label_drop=0.0), torch.arange(400)).any()


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def test_a_group_is_its_samples_ordinals_divided_by_m():
    assert BASE.group(torch.tensor([8, 9, 10, 11, 2**40 + 3, 2**40 + 1, 2**40, 2**40 + 2])).tolist() == [2, 2**38]


@pytest.mark.parametrize("ordinal", [[0, 1, 2, 3, 4], [0, 1, 2], [2, 3, 4, 5], [0, 1, 4, 5, 2, 3, 6, 7]])
def test_samples_that_are_not_whole_groups_are_refused(ordinal):
    with pytest.raises(UserError, match="whole"):
        BASE.group(torch.tensor(ordinal))


# ---------------------------------------------------------------------------------------------------------------------
# What the loss may depend on

properties = settings(max_examples=25, deadline=None)
GROUPS = 9


@pytest.fixture(scope="module")
def whole_batch():
    """One batch of groups far down the clock, its losses, and everything needed to compute them in parts."""
    objective = varied(BASE, label_drop=0.4)
    x, label, ordinal = batch(objective, GROUPS, first_group=2**33)
    f = flow_map_of(null_label=99)
    return objective, f, x, label, ordinal, losses(objective, f, x, label, ordinal, seed=6)


@properties
@given(cuts=st.sets(st.integers(1, GROUPS - 1)))
def test_losses_do_not_depend_on_how_groups_are_split_into_calls(whole_batch, cuts):
    objective, f, x, label, ordinal, expected = whole_batch
    edges = [0, *sorted(cuts), GROUPS]
    parts = []
    for first, last in itertools.pairwise(edges):
        rows = slice(4 * first, 4 * last)
        parts.append(losses(objective, f, x[rows], label[rows], ordinal[rows], seed=6))
    joined = concatenated(parts)
    torch.testing.assert_close(joined.loss_G, expected.loss_G, rtol=1e-12, atol=0)
    torch.testing.assert_close(joined.t_G, expected.t_G, rtol=1e-12, atol=0)


@properties
@given(data=st.data())
def test_order_of_groups_and_of_particles_inside_them_does_not_matter(whole_batch, data):
    objective, f, x, label, ordinal, expected = whole_batch
    groups = data.draw(st.permutations(range(GROUPS)))
    order = [4 * g + j for g in groups for j in data.draw(st.permutations(range(4)))]
    permuted = losses(objective, f, x[order], label[order], ordinal[order], seed=6)
    torch.testing.assert_close(permuted.loss_G, expected.loss_G[groups], rtol=1e-10, atol=1e-15)
    assert torch.equal(permuted.t_G, expected.t_G[groups])
    (gradient,) = torch.autograd.grad(permuted.loss_G.mean(), f.model.w)
    (whole,) = torch.autograd.grad(expected.loss_G.mean(), f.model.w, retain_graph=True)
    torch.testing.assert_close(gradient, whole, rtol=1e-9, atol=1e-13)


def test_draws_change_with_the_clock_and_with_the_seed(whole_batch):
    objective, f, x, label, ordinal, expected = whole_batch
    for other in (
        losses(objective, f, x, label, ordinal + 4 * GROUPS, seed=6),
        losses(objective, f, x, label, ordinal, seed=7),
        losses(objective, f, x, label, ordinal - 2**35, seed=6),
    ):
        assert not (other.t_G == expected.t_G).any()
        assert not (other.loss_G == expected.loss_G).any()


def test_fp32_data_give_the_loss_of_fp64_data():
    """In fp32 the coefficients of the two branches are off by 3e-8 each: 4 % of t - r where that is 1.4e-6."""
    x, label, ordinal = batch(BASE, 64, shape=(4, 16, 16), dtype=torch.float32)
    f = flow_map_of()
    loss = losses(BASE, f, x, label, ordinal, seed=0).loss_G
    f.model.calls.clear()
    expected = losses(BASE, f, x.double(), label, ordinal, seed=0).loss_G
    torch.testing.assert_close(loss, expected, rtol=4e-2, atol=0)
    assert loss.mean().item() == pytest.approx(expected.mean().item(), rel=1e-4)
