"""A held-out pass of a masked model: samples scored at some numbers of visible tokens, each equally often."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imm_scale import rng
from imm_scale.errors import UserError
from imm_scale.evaluation.tokens.profile import Scores, nodes
from imm_scale.methods.tokens import masking

Collect = Callable[[str, Callable[[int, int], NDArray[np.float64]], int], NDArray[np.float64]]

ENOUGH = 32  # scores at each number of visible tokens, unless told otherwise
FEWEST = 2  # in each half: one has no standard error


class Scorer(Protocol):
    """What a profile needs of a masked model."""

    def token_scores(self, x_NT: Tensor, visible_NT: Tensor) -> Tensor:
        """(N, T) -log p of every token given the visible ones of its row, in nats; of visible tokens anything finite.

        Args:
            x_NT: int64 tokens, (N, T).
            visible_NT: bool, (N, T); of the others the model may know nothing but their places.
        """


class LabelledScorer(Protocol):
    """The same of a model that is told each sample's class."""

    def labelled_scores(self, x_NT: Tensor, visible_NT: Tensor, label_N: Tensor) -> Tensor:
        """As `Scorer.token_scores`, of samples of these classes (N,)."""


def enough_passes(samples: int, length: int) -> int:
    """The fewest scores of each sample that give every number of visible tokens 32, but no more than there are."""
    count = len(nodes(length))
    return min(count, -(-ENOUGH * count // max(samples, 1)))


def places(samples: int, length: int, passes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which sample is scored at how many visible tokens: two (samples * passes,) arrays, pass by pass.

    Each half of the samples (even and odd ones) sees every number equally often, up to one time.

    Raises:
        UserError: too few for standard errors.
    """
    node_M = nodes(length)
    count = len(node_M)
    if not 1 <= passes <= count:
        raise UserError(f"--passes {passes}: sequences of {length} tokens can be scored at 1 to {count} different n")
    if samples // 2 * passes < FEWEST * count:
        fewest = -(-FEWEST * count // max(samples // 2, 1))
        remedy = f"--passes {fewest}" if fewest <= count and samples >= 4 else "more samples, at least 4"
        raise UserError(f"{samples} samples at --passes {passes} score some n less than twice a half: use {remedy}")
    sample_R, pass_R = np.tile(np.arange(samples), passes), np.repeat(np.arange(passes), samples)
    return sample_R, node_M[(sample_R // 2 + pass_R * count // passes) % count]


def visible_of(seed: int, ordinal_N: Tensor, visible_N: Tensor, length: int) -> Tensor:
    """(N, T) bool: n of T tokens, those with the largest of uniforms that are keyed by the (N,) ordinals."""
    return masking.ranks(rng.uniform(seed, "profile", ordinal_N, length)) < visible_N[:, None]


def score(scorer: Scorer, x_NT: Tensor, passes: int, seed: int, collect: Collect) -> Scores:
    """The scores of a pass; arguments as of `score_labelled`."""
    return _score(lambda x_NT, visible_NT, _: scorer.token_scores(x_NT, visible_NT), x_NT, passes, seed, collect)


def score_labelled(
    scorer: LabelledScorer, x_NT: Tensor, label_N: Tensor, passes: int, seed: int, collect: Collect
) -> Scores:
    """The scores of a pass of a model that is told classes.

    Args:
        x_NT: held-out tokens, int64, (N, T).
        label_N: their classes.
        passes: at how many numbers of visible tokens each sample is scored.
        collect: calls what it is given for ranges of rows, and returns the values of all; see `parts.py`.

    Raises:
        UserError: too few samples, or scores that are not finite.
    """
    return _score(
        lambda x, visible, sample: scorer.labelled_scores(x, visible, label_N[sample]), x_NT, passes, seed, collect
    )


def _score(
    scores: Callable[[Tensor, Tensor, Tensor], Tensor], x_NT: Tensor, passes: int, seed: int, collect: Collect
) -> Scores:
    samples, length = x_NT.shape
    sample_R, visible_R = places(samples, length, passes)

    def rows(start: int, stop: int) -> NDArray[np.float64]:
        sample = torch.from_numpy(sample_R[start:stop])
        visible = visible_of(seed, torch.arange(start, stop), torch.from_numpy(visible_R[start:stop]), length)
        return mean_of_masked(scores(x_NT[sample], visible, sample), visible).numpy()

    return Scores(length, sample_R, visible_R, collect("masked", rows, len(sample_R)))


def mean_of_masked(score_NT: Tensor, visible_NT: Tensor) -> Tensor:
    """(N,) fp64 mean over the tokens that are not visible. Raises UserError where it is not finite."""
    masked_NT = ~visible_NT
    total_N = torch.where(masked_NT, score_NT.double().cpu(), 0.0).sum(dim=1)
    mean_N = total_N / masked_NT.sum(dim=1)
    if not torch.isfinite(mean_N).all():
        row = int((~torch.isfinite(mean_N)).nonzero()[0])
        raise UserError(
            f"-log p of a held-out token is {mean_N[row]:g} with {int(visible_NT[row].sum())} tokens visible: "
            "the model gives it no probability, or its logits are not finite; check its weights and the vocabulary"
        )
    return mean_N
