"""Laws of a few tokens, held as tables: everything a profile estimates is a finite sum here, in fp64.

`Joint.token_scores` makes each of them a perfect masked model, so that a pass over their samples can be compared with
the sums.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import xlogy
from torch import Tensor

Floats = NDArray[np.float64]


class Joint:
    """The law of T tokens of a vocabulary of V.

    Args:
        table: probabilities, shape (V,) * T.
    """

    def __init__(self, table: Floats):
        assert np.isclose(table.sum(), 1.0) and table.min() >= 0 and len(set(table.shape)) == 1
        self.table, self.length, self.vocabulary = table, table.ndim, table.shape[0]

    @classmethod
    def uniform_on(cls, sequences: Iterable[Sequence[int]], vocabulary: int) -> "Joint":
        """Equal probabilities for these sequences, all of one length, and none for others."""
        rows = list(sequences)
        table = np.zeros((vocabulary,) * len(rows[0]))
        for row in rows:
            table[tuple(row)] += 1 / len(rows)
        return cls(table)

    def marginal(self, tokens: Iterable[int]) -> Floats:
        """The table summed over all other tokens, which keep an axis of size 1."""
        kept = set(tokens)
        return self.table.sum(axis=tuple(i for i in range(self.length) if i not in kept), keepdims=True)

    def entropy(self, tokens: Iterable[int] | None = None) -> float:
        """H of these tokens together, of all for None, in nats."""
        p = self.table if tokens is None else self.marginal(tokens)
        return -float(xlogy(p, p).sum())

    @property
    def total_correlation(self) -> float:
        """Sum of the tokens' entropies less their joint entropy, in nats."""
        return sum(self.entropy([i]) for i in range(self.length)) - self.entropy()

    def profile(self) -> Floats:
        """(T,) information profile: h_n is the mean of H(x_i | x_S) over sets S of n tokens and i outside."""
        mean_entropy = [self._mean_entropy(n) for n in range(self.length + 1)]
        return np.diff(mean_entropy)  # every set of n + 1 arises n + 1 times from S and i, every S (T - n) times

    def _mean_entropy(self, size: int) -> float:
        return float(np.mean([self.entropy(S) for S in itertools.combinations(range(self.length), size)]))

    def stepwise(self, steps: Sequence[Sequence[int]]) -> Floats:
        """The law, shape (V,) * T, of a sampler whose steps draw these tokens each by itself given earlier steps."""
        law, known = np.ones_like(self.table), list[int]()
        for step in steps:
            given = self.marginal(known)
            for i in step:
                law = law * _ratio(self.marginal([*known, i]), given)
            known += step
        return law

    def cross_entropy(self, law: Floats) -> float:
        """E -log law(x) over this joint, in nats; infinite where the law lacks a sequence."""
        with np.errstate(divide="ignore"):
            logs = np.log(law)
        return -float(np.where(self.table > 0, self.table * logs, 0.0).sum())

    def sample(self, count: int, seed: int) -> Tensor:
        """(count, T) int64 sequences."""
        cells = np.random.default_rng(seed).choice(self.table.size, size=count, p=self.table.ravel())
        return torch.from_numpy(np.stack(np.unravel_index(cells, self.table.shape), axis=1).astype(np.int64))

    def token_scores(self, x_NT: Tensor, visible_NT: Tensor) -> Tensor:
        """(N, T) -log p of every token given the visible others; a `scoring.Scorer`."""
        rows = [self._row(x, visible) for x, visible in zip(x_NT.tolist(), visible_NT.tolist(), strict=True)]
        return -torch.tensor(rows, dtype=torch.float64).log()

    def _row(self, x: Sequence[int], visible: Sequence[bool]) -> list[float]:
        """p of every token given the visible ones; 1 for these."""
        known = [i for i in range(self.length) if visible[i]]
        given = self._probability(x, known)
        return [1.0 if visible[i] else self._probability(x, [*known, i]) / given for i in range(self.length)]

    def _probability(self, x: Sequence[int], tokens: Sequence[int]) -> float:
        kept = set(tokens)
        return float(self.table[tuple(x[i] if i in kept else slice(None) for i in range(self.length))].sum())


def _ratio(part: Floats, whole: Floats) -> Floats:
    """part / whole, 0 where both are 0."""
    return np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)), where=whole > 0)


def four_hands() -> Joint:
    """Two words that name one of four hands of cards ("high card", "two pair", "full house", "straight flush")."""
    return Joint.uniform_on([(i, i) for i in range(4)], 4)


def five_hands() -> Joint:
    """As `four_hands`, with "royal flush", whose second word is that of "straight flush"."""
    return Joint.uniform_on([(0, 0), (1, 1), (2, 2), (3, 3), (4, 3)], 5)


def parity(length: int) -> Joint:
    """Bits with an even sum, all alike."""
    return Joint.uniform_on([x for x in itertools.product(range(2), repeat=length) if sum(x) % 2 == 0], 2)


def copies(length: int, vocabulary: int) -> Joint:
    """One token, drawn uniformly and repeated."""
    return Joint.uniform_on([(token,) * length for token in range(vocabulary)], vocabulary)


def binary_chain(length: int, flip: float) -> Joint:
    """A stationary Markov chain of bits that changes with probability `flip` a step."""
    table = np.empty((2,) * length)
    for x in itertools.product(range(2), repeat=length):
        changes = sum(a != b for a, b in itertools.pairwise(x))
        table[x] = 0.5 * flip**changes * (1 - flip) ** (length - 1 - changes)
    return Joint(table)


def dirichlet(length: int, vocabulary: int, seed: int) -> Joint:
    """A table drawn uniformly from all tables."""
    return Joint(np.random.default_rng(seed).dirichlet(np.ones(vocabulary**length)).reshape((vocabulary,) * length))
