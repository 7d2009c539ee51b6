"""Speculative decoding of a causal net's own blocks: the law of its next-token predictions, in fewer passes.

The head drafts B tokens, one pass of the net scores them all, and each is kept with probability min(1, p / q); the
first that is not is drawn from what q lacks of p (Leviathan et al., arXiv 2211.17192). p is what the head says of the
next token alone, q what it says of a token given those before it in its draft.

Legend: N samples, T tokens, B tokens of a draft, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imm_scale.methods.base import Steps
from imm_scale.methods.tokens.blocks import known_prefix, read_prompt
from imm_scale.methods.tokens.token_net import TokenNet
from imm_scale.models.heads.unembedding import inverse_cdf

_DRAFT, _ACCEPT, _CORRECT = range(3)  # streams of uniforms


@dataclass
class Acceptance:
    """What verified decoding came to.

    Attributes:
        passes: of the net over the sequences, counted for each sample, (N,).
        drawn: tokens that were drawn, (N,).
        drafted, accepted: by place in the draft, (B,).
    """

    passes: Tensor
    drawn: Tensor
    drafted: Tensor
    accepted: Tensor

    @property
    def tokens_a_pass(self) -> float:
        """Over all samples."""
        return float(self.drawn.sum() / self.passes.sum())


class _Draft(NamedTuple):
    """Tokens (N, B) after those the net has seen, and the log-probabilities (N, B, V) they were drawn by."""

    tokens: Tensor
    log_q: Tensor


@torch.no_grad()
def verified(net: TokenNet, start: Tensor, label: Tensor, steps: Steps) -> Tensor:
    """Ids (N, T) of `start` (N, T), which may begin with a prompt; labels (N,)."""
    return decode(net, start, label, steps)[0]


@torch.no_grad()
def decode(net: TokenNet, start: Tensor, label: Tensor, steps: Steps) -> tuple[Tensor, Acceptance]:
    """As `verified`, and what it came to."""
    decoder = _Decoder(net, start, label, steps)
    while not decoder.is_finished:
        decoder.round()
    return decoder.x, decoder.acceptance


class _Decoder:
    """The state of all samples: how many tokens the net has seen and are known, and its state after the last seen."""

    def __init__(self, net: TokenNet, start: Tensor, label: Tensor, steps: Steps):
        assert steps.uniform is not None, "tokens are drawn by uniforms"
        self._net: Any = net.model
        self._mask, self._length, self._block = net.mask, net.length, int(self._net.config.block)
        self._label, self._rows = label, torch.arange(len(start), device=start.device)
        self._uniforms = [steps.uniform(stream, self._length) for stream in range(3)]
        self.x, self._known = start.clone(), known_prefix(net, start)
        self._cache = self._net.empty_cache(len(start))
        # The last known token is left to the first round's pass, as each round leaves one.
        self._seen = (self._known - 1).clamp_min(0)
        self._h = read_prompt(net, self.x, self._seen, label, self._cache)
        zeros = torch.zeros(self._block, dtype=torch.int64, device=start.device)
        drawn = self._length - self._known
        self.acceptance = Acceptance((drawn > 0).long(), drawn, zeros, zeros.clone())

    @property
    def is_finished(self) -> bool:
        return bool((self._known >= self._length).all())

    def round(self) -> None:
        """Drafts, scores in one pass, keeps what is accepted, and draws one token more."""
        draft = self._draft()
        place = self._seen[:, None] + torch.arange(self._block + 1, device=self.x.device)
        inside = place.clamp_max(self._length - 1)
        states = self._net.states_kept(draft.tokens, place[:, 1:], self._label, self._cache)
        states = torch.cat([self._h[:, None], states], dim=1)
        log_p = self._next(states, place)
        kept = self._kept(draft, log_p, inside)
        following = self._following(draft, log_p, kept, inside)
        self._take(draft, kept, following, states)

    def _draft(self) -> _Draft:
        """B tokens; the first is the known one that the net has not seen, where there is one."""
        ahead = self._net.states_ahead(self._h)
        head = self._net.head
        state = head.begin(ahead, self._inside(self._seen))
        tokens, log_q = [], []
        for j in range(self._block):
            place = (self._seen + j).clamp_max(self._length - 1)
            log_q.append(head.conditional(state, j))
            drawn = inverse_cdf(log_q[-1], self._uniforms[_DRAFT][self._rows, place])
            tokens.append(torch.where(self._seen + j < self._known, self.x[self._rows, place], drawn))
            state = head.observe(state, j, tokens[-1])
        return _Draft(torch.stack(tokens, dim=1), torch.stack(log_q, dim=1))

    def _inside(self, place: Tensor) -> Tensor:
        """(..., B) which of the tokens from each place (...) on there are: as in training, a last block is cut."""
        return place[..., None] + torch.arange(self._block, device=place.device) < self._length

    def _next(self, states_NJD: Tensor, place_NJ: Tensor) -> Tensor:
        """(N, J, V) log p of the token at each place, whose state has seen those before."""
        ahead = self._net.states_ahead(states_NJD).flatten(0, 1)
        state = self._net.head.begin(ahead, self._inside(place_NJ).flatten(0, 1))
        return self._net.head.conditional(state, 0).unflatten(0, states_NJD.shape[:2])

    def _kept(self, draft: _Draft, log_p: Tensor, inside: Tensor) -> Tensor:
        """(N,) how many tokens of the draft stay; a known one always does."""
        chosen = draft.tokens[..., None]
        ratio = (log_p[:, :-1].gather(2, chosen) - draft.log_q.gather(2, chosen))[..., 0].exp()
        u = self._uniforms[_ACCEPT].gather(1, inside[:, :-1])
        place = self._seen[:, None] + torch.arange(self._block, device=self.x.device)
        is_known, is_wanted = place < self._known[:, None], place < self._length
        accepted = is_known | (u < ratio)
        stays = (accepted & is_wanted).long().cumprod(dim=1)
        tried = torch.cat([torch.ones_like(stays[:, :1]), stays[:, :-1]], dim=1).bool() & is_wanted & ~is_known
        self.acceptance.drafted += tried.sum(dim=0)
        self.acceptance.accepted += (tried & accepted).sum(dim=0)
        return stays.sum(dim=1)

    def _following(self, draft: _Draft, log_p: Tensor, kept: Tensor, inside: Tensor) -> Tensor:
        """(N,) the token after those that stay: of what p has more than q, or of p after a whole draft."""
        p = log_p[self._rows, kept].exp()
        none = p.new_full((len(p), 1, p.shape[1]), -torch.inf)
        q = torch.cat([draft.log_q, none], dim=1)[self._rows, kept].exp()
        residual = (p - q).clamp_min(0.0)
        # Rounding may leave nothing where p and q agree, and then refusal had probability 0 but for the same rounding.
        residual = torch.where(residual.sum(dim=1, keepdim=True) > 0, residual, p)
        place = inside[self._rows, kept]
        return inverse_cdf(residual.log(), self._uniforms[_CORRECT][self._rows, place])

    def _take(self, draft: _Draft, kept: Tensor, following: Tensor, states: Tensor) -> None:
        place = torch.arange(self._length, device=self.x.device)
        offset = place - self._seen[:, None]
        drafted = draft.tokens.gather(1, offset.clamp(0, self._block - 1))
        self.x = torch.where((offset >= 0) & (offset < kept[:, None]), drafted, self.x)
        self.x = torch.where(offset == kept[:, None], following[:, None], self.x)
        running, known = self._known < self._length, (self._seen + kept + 1).clamp_max(self._length)
        self.acceptance.passes += running.long()
        self._seen = torch.where(running, self._seen + kept, self._seen).clamp_max(self._length - 1)
        self._known = torch.where(running, known, self._known)
        self._h = states[self._rows, torch.where(running, kept, 0)]
