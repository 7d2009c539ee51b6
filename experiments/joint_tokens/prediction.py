"""What the information profile says of a product head in L steps beside what it has, on the same samples and orders.

sum_l k_l h_{n_l}, h_n the mean of -log p over all tokens that are masked where n are visible. The step itself scores
k_l of them, so that the two differ by which happen to be drawn first, and in the mean over orders by nothing.
"""

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments import common
from imm_scale.checkpoint.export import load_net
from imm_scale.evaluation.tokens import held_out, likelihood
from imm_scale.evaluation.tokens.profile import Profile, Scores
from imm_scale.evaluation.tokens.scoring import mean_of_masked
from imm_scale.methods.tokens import masking, schedules

Pair = tuple[NDArray[np.float64], NDArray[np.float64]]
_ORDERS = 4  # of each sample: with one the two differ by half a percent by chance
_NESTED = 2  # of those that are scored at every number of visible tokens


class Prediction:
    """The newest checkpoint of a run with a product head, on all held-out sequences."""

    def __init__(self, run_dir: str):
        config = common.config_of(run_dir)
        spec, loaded = load_net(run_dir)
        space: Any = spec.space
        self._net: Any = loaded
        self._held = held_out.read(config, space, None)
        self._scorer = likelihood.MaskedScorer(self._net, torch.device("cpu"))

    def in_steps(self, steps: int) -> Pair:
        """(N,) nats of each sequence in so many equal steps as predicted, and as they are; means over orders."""
        number, length = self._held.ids_NT.shape
        counts = masking.visible_counts("uniform", steps, length)
        pairs = []
        for seed in range(_ORDERS):
            rank_NT = likelihood.orders("random", seed, torch.arange(number), length)
            measured_N = likelihood.of_steps(self._net, self._held.ids_NT, self._held.label_N, counts, rank_NT)
            pairs.append((self._predicted(counts, rank_NT), measured_N))
        predicted, measured = (torch.stack(values).mean(dim=0).numpy() for values in zip(*pairs, strict=True))
        return predicted, measured

    def _predicted(self, counts: Tensor, rank_NT: Tensor) -> Tensor:
        total_N = torch.zeros(len(rank_NT), dtype=torch.float64)
        for first, last in itertools.pairwise(counts.tolist()):
            total_N += (last - first) * self._mean_score(rank_NT < first)
        return total_N

    def best_and_equal(self, step_counts: Sequence[int]) -> dict[int, Pair]:
        """{L: (N,) nats of each sequence in L steps of the best sizes, and of equal ones}, as predicted.

        The best sizes are those of the half of the sequences that the sequence itself is not in.
        """
        score_NT, length = self._score_table, self._scores.length
        parity_N = np.arange(len(score_NT)) % 2
        fitted = [Profile(self._scores.half(half)).fitted() for half in (1, 0)]
        chosen = [schedules.best_schedules(profile_T, max(step_counts)) for profile_T in fitted]
        found = {}
        for steps in step_counts:
            best_2T = np.stack([schedules.step_weights(one.sizes(steps), length) for one in chosen])
            equal_T = schedules.step_weights(schedules.sizes_of("uniform", length, steps), length)
            found[steps] = ((score_NT * best_2T[parity_N]).sum(axis=1), score_NT @ equal_T)
        return found

    @property
    def _scores(self) -> Scores:
        """All sequences at every number of visible tokens."""
        number, length = self._held.ids_NT.shape
        sample_R, visible_R = np.repeat(np.arange(number), length), np.tile(np.arange(length), number)
        return Scores(length, sample_R, visible_R, self._score_table.ravel())

    @cached_property
    def _score_table(self) -> NDArray[np.float64]:
        """(N, T) the same by sequence and number of visible tokens, which are nested: sizes differ by little else."""
        number, length = self._held.ids_NT.shape
        orders = [likelihood.orders("random", seed, torch.arange(number), length) for seed in range(_NESTED)]
        of_orders = [torch.stack([self._mean_score(rank_NT < n) for n in range(length)], dim=1) for rank_NT in orders]
        return np.asarray(torch.stack(of_orders).mean(dim=0))

    def _mean_score(self, visible_NT: Tensor) -> Tensor:
        score_NT = self._scorer.labelled_scores(self._held.ids_NT, visible_NT, self._held.label_N)
        return mean_of_masked(score_NT, visible_NT)
