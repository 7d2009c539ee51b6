"""The law that a net of poker hands samples from, by enumeration of all pairs of tokens.

Legend: X all sequences, T = 2 tokens, K words, P points of a grid of uniforms.
"""

import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imm_scale.checkpoint.export import load_net
from imm_scale.methods.tokens import masking
from imm_scale.models.heads.base import prefix_of

_GRID = 64  # midpoints of a uniform, whose quarters decide among four words


def law(run_dir: str, steps: int) -> NDArray[np.float64]:
    """(K, K) probabilities of both tokens, drawn in 1 or 2 passes in random order by the newest checkpoint."""
    _, loaded = load_net(run_dir)
    net: Any = loaded
    words = net.mask
    x_XT = torch.tensor(list(itertools.product(range(words), repeat=2)))
    counts = masking.visible_counts("uniform", steps, 2).tolist()
    orders = [torch.tensor(rank).expand_as(x_XT) for rank in ((0, 1), (1, 0))]
    of_orders = [_of_order(net, x_XT, counts, rank_XT) for rank_XT in orders]
    return np.asarray(torch.stack(of_orders).mean(dim=0)).reshape(words, words)


def divergence(probabilities: NDArray[np.float64]) -> float:
    """KL in nats from the hands, the diagonal in equal parts, to a law (K, K)."""
    hands = np.diag(probabilities)
    return float(-np.log(len(hands) * hands).mean())


def validity(probabilities: NDArray[np.float64]) -> float:
    """Probability that both tokens name one hand; (K, K)."""
    return float(np.trace(probabilities))


@torch.no_grad()
def _of_order(net: Any, x_XT: Tensor, counts: list[int], rank_XT: Tensor) -> Tensor:
    """(X,) fp64 probabilities of all sequences, their tokens drawn in this order."""
    label, total = torch.zeros(len(x_XT), dtype=torch.int64), torch.ones(len(x_XT), dtype=torch.float64)
    for first, last in itertools.pairwise(counts):
        h_XTD = net.model(torch.where(rank_XT < first, x_XT, net.mask), label)
        total *= _of_step(net.model.head, h_XTD, x_XT, (rank_XT >= first) & (rank_XT < last))
    return total


def _of_step(head: Any, h_XTD: Tensor, x_XT: Tensor, scored_XT: Tensor) -> Tensor:
    """(X,) fp64 q(x^S); of a student the mean over a grid of its uniforms."""
    if not head.takes_uniforms:
        return head.log_prob(h_XTD, x_XT, scored_XT).double().exp()
    prefix = prefix_of(scored_XT)
    rows = zip(prefix.take(h_XTD), prefix.take(x_XT), prefix.scored, prefix.order_NK, strict=True)
    return torch.stack([_of_student(head, *row) for row in rows])


def _of_student(head: Any, h_TD: Tensor, x_T: Tensor, scored_T: Tensor, position_T: Tensor) -> Tensor:
    """q of the scored tokens of one prefix, which stand first: a mean over uniforms, which are all it depends on."""
    points = (torch.arange(_GRID, dtype=torch.float64) + 0.5) / _GRID
    uniform_PT = torch.cartesian_prod(points, points)
    many = len(uniform_PT)
    states_PTD = head.student_states(h_TD.expand(many, 2, -1), uniform_PT, position_T.expand(many, 2))
    log_prob_PT = head.unembed(states_PTD, x_T.expand(many, 2)).double()
    return log_prob_PT.masked_fill(~scored_T, 0.0).sum(dim=1).exp().mean()
