"""Likelihoods of nets of ours against enumerated laws."""

import itertools

import pytest
import torch

from imm_scale.evaluation.tokens import joints, likelihood
from imm_scale.methods.tokens import schedules
from imm_scale.methods.tokens.token_net import TokenNet
from tests.unit.methods.tokens import toy
from tests.unit.models.heads.laws import all_sequences

ROUNDING = 1e-10  # fp64 sums of a few thousand terms of order 1


def _exact(joint: joints.Joint, vocabulary: int, length: int) -> TokenNet:
    """A masked net that says the conditionals of an enumerated law."""
    table = torch.from_numpy(joint.table).double()

    def states(x_NT):
        rows = []
        for x in x_NT.tolist():
            visible = [slice(None) if token == vocabulary else slice(token, token + 1) for token in x]
            part = table[tuple(visible)]
            marginals = [part.sum(dim=[j for j in range(length) if j != i]) for i in range(length)]
            full = [
                law / law.sum() if len(law) == vocabulary else torch.eye(vocabulary, dtype=torch.float64)[x[i]]
                for i, law in enumerate(marginals)
            ]
            rows.append(torch.stack(full).clamp_min(1e-300).log())
        return torch.stack(rows)

    return TokenNet(toy.Table(states, vocabulary), vocabulary, length)


@pytest.mark.parametrize("sizes", [(4,), (1, 3), (2, 2), (3, 1), (1, 2, 1), (1, 1, 1, 1)])
def test_what_steps_cost_is_the_entropy_and_formula_1(sizes):
    vocabulary, length = 3, 4
    joint = joints.dirichlet(length, vocabulary, seed=1)
    net, x = _exact(joint, vocabulary, length), all_sequences(vocabulary, length)
    counts = torch.tensor([0, *itertools.accumulate(sizes)])
    law = torch.from_numpy(joint.table).double().flatten()
    orders = list(itertools.permutations(range(length)))
    costs = [
        (law * likelihood.of_steps(net, x, toy.no_label(len(x)), counts, torch.tensor(order).expand_as(x))).sum()
        for order in orders
    ]
    expected = joint.entropy() + schedules.excess(joint.profile(), sizes)
    assert float(sum(costs)) / len(orders) == pytest.approx(expected, abs=ROUNDING)


def test_the_scores_of_single_tokens_are_the_law_s_own():
    joint = joints.five_hands()
    net, x = _exact(joint, 5, 2), joint.sample(64, seed=0)
    visible = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    ours = likelihood.MaskedScorer(net, torch.device("cpu")).labelled_scores(x, visible, toy.no_label(len(x)))
    theirs = joint.token_scores(x, visible)
    torch.testing.assert_close(ours[~visible], theirs[~visible].double(), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("kind", ["factorized", "mixture", "autoregressive"])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_blocks_and_single_tokens_of_a_causal_net_are_those_of_enumeration(kind, block):
    vocabulary, length = 2, 4
    head = {"kind": kind, "components": 2 if kind == "mixture" else 1}
    net = toy.token_net(length, vocabulary, causal=True, block=block, head=toy.HeadConfig(**head))
    laws, x = toy.CausalLaws(net), all_sequences(vocabulary, length)
    blocks = likelihood.of_blocks(net, x, toy.no_label(len(x)))
    singles = likelihood.of_next_tokens(net, x, toy.no_label(len(x)))
    for row, ids in enumerate(x.tolist()):
        for number, start in enumerate(range(0, length, block)):
            law = laws.of_block(tuple(ids[:start]))
            expected = -law[tuple(ids[start : start + block])].log()
            assert float(blocks[row, number]) == pytest.approx(float(expected), abs=ROUNDING)
        for place in range(length - block + 1):  # nearer to the end fewer tokens are ahead than a draft has
            expected = -laws.next(tuple(ids[:place]))[ids[place]].log()
            assert float(singles[row, place]) == pytest.approx(float(expected), abs=ROUNDING)
