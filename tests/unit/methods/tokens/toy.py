"""Nets over a few tokens of a small vocabulary, whose laws can be enumerated in fp64."""

from functools import cache
from typing import Any

import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from imm_scale import rng
from imm_scale.methods.base import Steps
from imm_scale.methods.tokens.token_net import TokenNet
from imm_scale.models.heads import HeadConfig, build
from imm_scale.models.token_transformer import TokenArchitecture, TokenTransformer
from tests.unit.models.heads.laws import all_sequences

WIDTH = 8
ALPHA = 1e-4  # of a chi^2 test; seeds are fixed, so that one that passed passes again


def architecture(length: int, vocabulary: int, causal: bool, **settings: Any) -> TokenArchitecture:
    """Two blocks of width 8."""
    sizes = {"width": WIDTH, "depth": 2, "heads": 2, "num_classes": 2, **settings}
    return TokenArchitecture(length=length, vocabulary=vocabulary, causal=causal, **sizes)


def token_net(length: int, vocabulary: int, causal: bool, seed: int = 0, **settings: Any) -> TokenNet:
    """In fp64, with every weight random: the zeros it starts with would hide mistakes."""
    torch.manual_seed(seed)
    net = TokenTransformer(architecture(length, vocabulary, causal, **settings)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.25 * torch.randn_like(p))
    return TokenNet(net, vocabulary, length)


def steps(samples: Tensor, times: Tensor | None = None, seed: int = 0, **more: Any) -> Steps:
    """For samples of these numbers (N,), with uniforms keyed as sampling does."""
    times = torch.tensor([1.0, 0.0], dtype=torch.float64) if times is None else times
    return Steps(times, uniform=lambda stream, count: rng.uniform(seed, "tokens", samples, count, stream), **more)


def masks(net: TokenNet, samples: int) -> Tensor:
    """(N, T) of nothing known."""
    return torch.full((samples, net.length), net.mask)


def no_label(samples: int) -> Tensor:
    """(N,) of class 0."""
    return torch.zeros(samples, dtype=torch.int64)


def chi_square(drawn_NT: Tensor, law: Tensor, vocabulary: int) -> float:
    """The p-value of sequences (N, T) under a law of all of them, (V^T,) in their order."""
    place = vocabulary ** torch.arange(drawn_NT.shape[1] - 1, -1, -1)
    counts = torch.bincount((drawn_NT * place).sum(dim=1), minlength=len(law)).double()
    assert counts[law == 0].sum() == 0, "drawn, and impossible"
    there = law > 0
    return float(chisquare(counts[there], len(drawn_NT) * law[there]).pvalue)


class CausalLaws:
    """What a causal net says, by calling it on whole prefixes and its head on every block."""

    def __init__(self, net: TokenNet):
        self.net, self.block = net, int(net.model.config.block)
        self.vocabulary, self.length = net.mask, net.length
        self.of_block = cache(self._of_block)

    @torch.no_grad()
    def state(self, known: tuple[int, ...]) -> Tensor:
        """(1, B, D) states ahead of these tokens."""
        before = torch.tensor([[self.net.mask, *known]])
        return self.net.model.states_ahead(self.net.model(before, no_label(1))[:, -1])

    @torch.no_grad()
    def _of_block(self, known: tuple[int, ...]) -> Tensor:
        """(V,) * b, the joint law of the next block, cut at the end."""
        size = min(self.block, self.length - len(known))
        x = torch.zeros(self.vocabulary**size, self.block, dtype=torch.int64)
        x[:, :size] = all_sequences(self.vocabulary, size)
        inside = (torch.arange(self.block) < size).expand(len(x), -1)
        q = self.net.model.head.log_prob(self.state(known).expand(len(x), -1, -1), x, inside).exp()
        return q.view((self.vocabulary,) * size)

    def next(self, known: tuple[int, ...]) -> Tensor:
        """(V,) the law of the next token."""
        return self.of_block(known).reshape(self.vocabulary, -1).sum(dim=1)

    def draft(self, seen: tuple[int, ...], given: tuple[int, ...]) -> Tensor:
        """(V,) of the token after those given, in the block that begins where the net has seen this much."""
        law = self.of_block(seen)[given].reshape(self.vocabulary, -1).sum(dim=1)
        return law / law.sum()

    def sequences(self, known: tuple[int, ...] = ()) -> Tensor:
        """(V^T,) the law of one token at a time; of those that begin otherwise 0."""
        laws = torch.zeros(self.vocabulary**self.length, dtype=torch.float64)
        for row, x in enumerate(all_sequences(self.vocabulary, self.length).tolist()):
            if tuple(x[: len(known)]) == known:
                laws[row] = torch.stack([self.next(tuple(x[:n]))[x[n]] for n in range(len(known), self.length)]).prod()
        return laws

    def rounds(self, known: tuple[int, ...] = ()) -> float:
        """Expected rounds of verified decoding after these tokens, the last of which the net has not seen."""
        if len(known) == self.length:
            return 0.0
        seen = known[:-1]
        return 1.0 + self._after(seen, known[len(seen) :])

    def _after(self, seen: tuple[int, ...], kept: tuple[int, ...]) -> float:
        """Rounds that follow once so much of a draft is kept: min(p, q) keeps a token, p - q draws another one."""
        known = seen + kept
        if len(known) == self.length:
            return 0.0
        p = self.next(known)
        if len(kept) == self.block:
            return sum(float(p[y]) * self.rounds((*known, y)) for y in range(self.vocabulary))
        q, total = self.draft(seen, kept), 0.0
        for y in range(self.vocabulary):
            total += float(torch.minimum(p, q)[y]) * self._after(seen, (*kept, y))
            total += float((p - q).clamp_min(0)[y]) * self.rounds((*known, y))
        return total


class Table(nn.Module):
    """A net that looks states up: what `states` says of tokens (N, T), given to a product head as its logits."""

    def __init__(self, states: Any, vocabulary: int):
        super().__init__()
        self._states = states
        self.has_dropout = False
        self.head = build(HeadConfig(), vocabulary, vocabulary, heads=1).double()
        with torch.no_grad():
            self.head.unembed.weight.copy_(torch.eye(vocabulary))

    def forward(self, x_NT: Tensor, label: Tensor, target: Any = None, scored: Any = None, *more: Any) -> Any:
        """States (N, T, V), or what the head makes of a target (N, T)."""
        h = self._states(x_NT)
        return h if target is None else self.head(h, target, scored)
