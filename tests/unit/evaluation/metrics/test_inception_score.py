"""The Inception score against its definition and known answers."""

import numpy as np
import pytest
import torch

from imm_scale.evaluation.metrics.inception_score import ClassSums, inception_score


def _sums(probabilities: np.ndarray, chunks: int = 1) -> ClassSums:
    sums = ClassSums(probabilities.shape[1])
    for chunk in np.array_split(probabilities, chunks):
        sums.add(torch.from_numpy(chunk))
    return sums


@pytest.mark.parametrize("chunks", [1, 5])
def test_equals_the_definition(chunks):
    logits = np.random.default_rng(0).normal(size=(30, 6)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    divergences = (p * (np.log(p) - np.log(p.mean(0)))).sum(1)
    assert _sums(p, chunks).score == pytest.approx(np.exp(divergences.mean()), rel=1e-12)


def test_known_answers():
    # Sure of each of 4 classes in turn: 4. Never sure: 1. A zero probability counts as 0 log 0 = 0.
    assert _sums(np.tile(np.eye(4), (3, 1))).score == pytest.approx(4.0, rel=1e-12)
    assert _sums(np.full((5, 4), 0.25)).score == pytest.approx(1.0, rel=1e-12)
    score, error = inception_score([_sums(np.eye(4)), _sums(np.full((4, 4), 0.25)), ClassSums(4)])
    assert score == pytest.approx(2.5)
    assert error == pytest.approx(1.5)  # of 4 and 1: standard deviation 3 / sqrt 2, over sqrt 2
