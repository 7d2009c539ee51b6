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
from imm_scale.evaluation.tokens.profile import Profile, Scores, between, nodes
from imm_scale.evaluation.tokens.scoring import mean_of_masked
from imm_scale.methods.tokens import masking, schedules

Pair = tuple[NDArray[np.float64], NDArray[np.float64]]
KINDS = {"uniform": "equal", "cosine": "cosine", "best": "best"}  # of step sizes, and what the page calls them
BySizes = dict[str, NDArray[np.float64]]  # (N,) nats of each sequence by kind
_ORDERS = 4  # of each sample: with one the two differ by half a percent by chance
_AT_ONCE = 64  # sequences of a pass


class Prediction:
    """The newest checkpoint of a run with a product head, on all held-out sequences.

    Args:
        nested: orders in which each sequence is scored at every number of visible tokens.
    """

    def __init__(self, run_dir: str, nested: int):
        self._nested = nested
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

    def in_sizes(self, step_counts: Sequence[int]) -> dict[int, BySizes]:
        """{L: (N,) nats of each sequence in L steps of equal, cosine and best sizes}, as predicted.

        The best sizes are those of the half of the sequences that the sequence itself is not in.
        """
        score_NT = self.one_at_a_time
        length, parity_N = score_NT.shape[1], np.arange(len(score_NT)) % 2
        chosen = [Profile(self.scores.half(half)).best_sizes(step_counts) for half in (1, 0)]
        found = {}
        for steps in step_counts:
            equal_T, cosine_T = (
                schedules.step_weights(schedules.sizes_of(kind, length, steps), length)
                for kind in ("uniform", "cosine")
            )
            best_2T = np.stack([schedules.step_weights(sizes[steps], length) for sizes in chosen])
            found[steps] = {
                "uniform": score_NT @ equal_T,
                "cosine": score_NT @ cosine_T,
                "best": (score_NT * best_2T[parity_N]).sum(axis=1),
            }
        return found

    @cached_property
    def one_at_a_time(self) -> NDArray[np.float64]:
        """(N, T) nats of a token given so many others; their sum over T is a sequence's, one token a pass."""
        return np.asarray(self._score_table @ between(self.scores.length).T)

    @property
    def alone(self) -> float:
        """Nats of a sequence, one token a pass."""
        return float(self.one_at_a_time.sum(axis=1).mean())

    @property
    def scores(self) -> Scores:
        """All sequences at every number of visible tokens, of long ones at the profile's."""
        number, length = self._held.ids_NT.shape
        node_M = nodes(length)
        sample_R, visible_R = np.repeat(np.arange(number), len(node_M)), np.tile(node_M, number)
        return Scores(length, sample_R, visible_R, self._score_table.ravel())

    @cached_property
    def _score_table(self) -> NDArray[np.float64]:
        """(N, M) the same by sequence and number of visible tokens, which are nested: sizes differ by little else."""
        number, length = self._held.ids_NT.shape
        total_NM = np.zeros((number, len(nodes(length))))
        for seed in range(self._nested):
            rank_NT = likelihood.orders("random", seed, torch.arange(number), length)
            total_NM += np.stack([self._mean_score(rank_NT < n) for n in nodes(length)], axis=1)
        return total_NM / self._nested

    def _mean_score(self, visible_NT: Tensor) -> Tensor:
        held = self._held
        parts = zip(*(whole.split(_AT_ONCE) for whole in (held.ids_NT, visible_NT, held.label_N)), strict=True)
        return mean_of_masked(torch.cat([self._scorer.labelled_scores(*part) for part in parts]), visible_NT)
