"""Likelihoods of samples: of a head that draws by a student they bound what the student draws."""

import itertools

import numpy as np
import pytest
import torch

from imm_scale.evaluation import records
from imm_scale.evaluation.tokens import likelihood
from imm_scale.models.heads import HeadConfig
from imm_scale.models.heads.base import positions
from tests.unit.methods.tokens import toy

T, V, GRID = 2, 3, 64


@pytest.fixture(scope="module")
def net():
    return toy.token_net(T, V, causal=False, seed=3, head=HeadConfig("uniform_conditioned"))


def _law_of_the_student(net, x_XT):
    """(X,) the mean over a grid of both uniforms of the product it draws from."""
    head, points = net.model.head, (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    grid_PT = torch.cartesian_prod(points, points)
    h_TD = net.model(torch.full((1, T), net.mask), torch.zeros(1, dtype=torch.int64))[0]
    states = head.student_states(h_TD.expand(len(grid_PT), T, -1), grid_PT, positions(grid_PT))
    return torch.stack([head.unembed(states, x.expand(len(grid_PT), T)).sum(dim=1).exp().mean() for x in x_XT])


@torch.no_grad()
def test_of_a_student_the_likelihood_is_a_bound(net):
    """-log of a mean over uniforms is at most -log p of the teacher + the mean of -log over those that it gives x."""
    x = torch.tensor(list(itertools.product(range(V), repeat=T)))
    law = _law_of_the_student(net, x)
    assert law.sum().item() == pytest.approx(1.0, abs=1e-6), "products of every u add up to 1; fp32 inside the embedder"
    draws, rank, label = 400, torch.tensor([[0, 1]]), torch.zeros(1, dtype=torch.int64)
    uniform = likelihood.uniforms(0, torch.arange(draws), T)
    counts = torch.tensor([0, T])
    for row, q in zip(x, law, strict=True):
        many = row.expand(draws, T)
        bound = likelihood.of_steps(net, many, label.expand(draws), counts, rank.expand(draws, T), uniform)
        teacher = likelihood.of_steps(net, row[None], label, counts, rank)
        error = bound.std() / draws**0.5
        assert bound.mean() > -q.log() - 4 * error and bound.mean() > teacher[0]


def test_what_samples_contributed_lies_beside_the_evaluation(tmp_path):
    run, step = str(tmp_path), 7
    for steps, kept in ((2, {"nll": np.arange(3.0)}), (1, {"nll": np.ones(3)}), (4, None)):
        url = records.evaluation_url(f"{run}/evaluations", step, {"steps": steps})
        if kept is not None:
            records.write_values(url, kept)
        records.storage.write_text(url, f'{{"schema_version": 2, "step": {step}, "results": [{{"steps": {steps}}}]}}')
    found = records.read_values(run, step)
    assert [result["steps"] for result, _ in found] == [1, 2], "without the one that kept none"
    np.testing.assert_array_equal(found[1][1]["nll"], np.arange(3.0))
    assert records.read_values(run, step + 1) == []
