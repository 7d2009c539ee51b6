"""Small joint laws with known answers, and what heads say of them by enumeration."""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from imm_scale.models.heads import Head, HeadConfig, build

KINDS = {
    "factorized": HeadConfig(),
    "mixture": HeadConfig("mixture", components=3),
    "groups of 2": HeadConfig("mixture", components=3, group=2),
    "chain": HeadConfig("chain", components=3),
    "autoregressive": HeadConfig("autoregressive", depth=2),
    "uniform_conditioned": HeadConfig("uniform_conditioned"),
}


def all_sequences(vocabulary: int, length: int) -> Tensor:
    """(V^k, k), the last token fastest."""
    return torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))


def diagonal(hands: int) -> Tensor:
    """Two cards that are the same, each as likely: four of them are high card, two pair, full house, straight flush."""
    return torch.arange(hands)[:, None].expand(-1, 2)


def even_parity(bits: int) -> Tensor:
    """All rows of bits whose sum is even."""
    rows = all_sequences(2, bits)
    return rows[rows.sum(1) % 2 == 0]


def random_head(config: HeadConfig, width: int, vocabulary: int, seed: int = 0) -> Head:
    """In fp64, with every weight random: the zeros it starts with would hide mistakes."""
    torch.manual_seed(seed)
    head = build(config, width, vocabulary, heads=2).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return head


def states(samples: int, positions: int, width: int, seed: int = 1) -> Tensor:
    """Random fp64 states."""
    return torch.randn(samples, positions, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scores(head: Head, h_KD: Tensor, x_NK: Tensor) -> Tensor:
    """log q of whole sequences (N,), all under the same states."""
    return head.log_prob(h_KD.expand(len(x_NK), -1, -1), x_NK, torch.ones_like(x_NK, dtype=torch.bool))


def divergence(head: Head, h_KD: Tensor, x_NK: Tensor) -> Tensor:
    """KL(uniform on these sequences || head), in nats."""
    return -math.log(len(x_NK)) - scores(head, h_KD, x_NK).mean()


def fitted(head: Head, h_KD: Tensor, x_NK: Tensor, steps: int, lr: float = 0.02) -> Head:
    """The head after so many steps of Adam on the divergence."""
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        divergence(head, h_KD, x_NK).backward()
        optimizer.step()
    return head


class Table(nn.Module):
    """In place of `ComponentStates`: the logits of every component at every position as they stand in a table.

    Of K one-hot states; the head's unembedding is to be the identity.
    """

    def __init__(self, logits_KRV: Tensor):
        super().__init__()
        self.logits_KRV = nn.Parameter(logits_KRV)

    def forward(self, h: Tensor, component: Tensor | None = None) -> Tensor:
        logits = torch.einsum("...k,krv->...rv", h, self.logits_KRV)
        if component is None:
            return logits
        return logits.take_along_dim(component[..., None, None], dim=-2)[..., 0, :]


def tabled(config: HeadConfig, logits_KRV: Tensor) -> tuple[Head, Tensor]:
    """A mixture or chain of these log-probabilities of tokens, and the states (K, K) to give it; weights uniform."""
    positions, _, vocabulary = logits_KRV.shape
    head = build(config, positions, vocabulary, heads=1).double()
    head.states = Table(logits_KRV)
    head.unembed = head.unembed.__class__(vocabulary, vocabulary).double()
    with torch.no_grad():
        head.unembed.weight.copy_(torch.eye(vocabulary))
    return head, torch.eye(positions, dtype=torch.float64)


def mixture_by_em(
    x_NK: Tensor, vocabulary: int, components: int, restarts: int, steps: int = 200
) -> tuple[Tensor, ...]:
    """Weights (R,) and probabilities (K, R, V) of the best mixture of products for uniform data, by EM in fp64."""
    generator = torch.Generator().manual_seed(0)
    onehot_NKV = nn.functional.one_hot(x_NK, vocabulary).double()
    shape = restarts, x_NK.shape[1], components, vocabulary
    p_EKRV = torch.rand(shape, generator=generator, dtype=torch.float64)
    p_EKRV /= p_EKRV.sum(-1, keepdim=True)
    w_ER = torch.full((restarts, components), 1 / components, dtype=torch.float64)
    for _ in range(steps):
        joint_ENR = (w_ER.log()[:, None] + torch.einsum("nkv,ekrv->enr", onehot_NKV, p_EKRV.clamp(1e-300).log())).exp()
        share_ENR = joint_ENR / joint_ENR.sum(-1, keepdim=True)
        w_ER = share_ENR.mean(1).clamp(1e-300)
        p_EKRV = torch.einsum("enr,nkv->ekrv", share_ENR, onehot_NKV)
        p_EKRV /= p_EKRV.sum(-1, keepdim=True).clamp(1e-300)
    best = joint_ENR.sum(-1).clamp(1e-300).log().mean(1).argmax()
    return w_ER[best], p_EKRV[best]


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [part for part in (out if isinstance(out, tuple | list) else [out]) if isinstance(part, torch.Tensor)]
        self.numbers = max([self.numbers, *(part.numel() for part in made)])
        return out
