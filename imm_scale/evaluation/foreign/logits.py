"""Models that give logits, as scorers: what is shown to them, and how their logits become nats."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from imm_scale import precision
from imm_scale.errors import UserError

Net = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Caller:
    """Calls a net on tokens, on its device and in its precision, at most `batch` sequences at once.

    Attributes:
        net: (N, T) int64 tokens to (N, T, V) logits.
        name: what the user called it, for messages.
    """

    net: Net
    name: str
    device: torch.device
    precision: str
    batch: int

    def __call__(self, token_NT: Tensor) -> list[Tensor]:
        """Logits, (n, T, V) a piece, of the rows in order. Raises UserError for another shape."""
        return [self._piece(piece) for piece in token_NT.split(self.batch)]

    def _piece(self, token_NT: Tensor) -> Tensor:
        with torch.no_grad(), precision.computing(self.precision, self.device):
            logits = self._called(token_NT)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != token_NT.shape:
            given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(
                f"{self.name} gives {given} for tokens of shape {tuple(token_NT.shape)}: a model takes (N, T) tokens "
                "and returns (N, T, V) logits"
            )
        return logits.detach()

    def _called(self, token_NT: Tensor) -> Any:
        """What the net returns. Raises UserError for what it raises, wherever in somebody else's code that is."""
        try:
            return self.net(token_NT.to(self.device))
        except UserError:
            raise
        except Exception as error:  # the net is the user's, and so are its errors, of any kind
            frame = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join(str(error).split())
            raise UserError(
                f"{self.name} raises {type(error).__name__} for tokens of shape {tuple(token_NT.shape)}: {said} "
                f"({frame.filename}:{frame.lineno}). A model takes (N, T) int64 tokens; where memory ran out, use a "
                f"smaller --batch-size than {self.batch}"
            ) from error


@dataclass(frozen=True)
class MaskedLogits:
    """A masked model, a `Scorer`.

    Attributes:
        mask: id of the mask; it is never predicted, whatever logit it has.
        before, after: ids around every sequence, always visible, as [CLS] and [SEP].
    """

    call: Caller
    mask: int
    before: Sequence[int] = ()
    after: Sequence[int] = ()

    def token_scores(self, x_NT: Tensor, visible_NT: Tensor) -> Tensor:
        """(N, T) -log p of every token given the visible ones. Raises UserError for a mask among the tokens."""
        if bool((x_NT == self.mask).any()):
            raise UserError(
                f"token {self.mask} of the data is the mask of {self.call.name}, which is never predicted: name "
                "another id by --mask, or take tokens without it"
            )
        shown_NT = torch.where(visible_NT, x_NT, self.mask)
        pieces = self.call(_surrounded(shown_NT, self.before, self.after))
        start, stop = len(self.before), len(self.before) + x_NT.shape[1]
        rows = [row for piece in pieces for row in piece[:, start:stop]]
        return torch.stack([_scores(row, x, self.call.name, self.mask) for row, x in zip(rows, x_NT, strict=True)])


def _surrounded(token_NT: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    sides = [torch.tensor(ids, dtype=torch.int64).expand(len(token_NT), -1) for ids in (before, after)]
    return torch.cat([sides[0], token_NT, sides[1]], dim=1)


def _scores(logits_TV: Tensor, x_T: Tensor, name: str, banned: int | None = None) -> Tensor:
    """(T,) -log p in fp32, a sequence at a time: all logits of a batch in fp32 would be the pass's peak of memory."""
    vocabulary = logits_TV.shape[1]
    if int(x_T.max()) >= vocabulary:
        raise UserError(
            f"token {int(x_T.max())} of the data is none of {name}'s {vocabulary}: another tokenizer made it"
        )
    logits_TV = logits_TV.float()
    if banned is not None and banned < vocabulary:
        logits_TV = logits_TV.index_fill(1, torch.tensor([banned], device=logits_TV.device), -torch.inf)
    return F.cross_entropy(logits_TV, x_T.to(logits_TV.device), reduction="none").cpu()


@dataclass(frozen=True)
class CausalLogits:
    """A causal model, whose logits at a place are of the token after it; a `CausalScorer`.

    Attributes:
        begin: the id before every sequence; None where there is none, and its first token is not scored.
    """

    call: Caller
    begin: int | None = None

    @property
    def first(self) -> int:
        """The first token with a probability."""
        return 0 if self.begin is not None else 1

    def _begun(self, x_NT: Tensor) -> Tensor:
        return _surrounded(x_NT, [] if self.begin is None else [self.begin], [])

    def token_scores(self, x_NT: Tensor) -> Tensor:
        """(N, T) -log p(x_n | x_{<n}); 0 before `first`."""
        rows = [row for piece in self.call(self._begun(x_NT)[:, :-1]) for row in piece]
        scored_NT = x_NT[:, self.first :]
        scores = [_scores(row, x, self.call.name) for row, x in zip(rows, scored_NT, strict=True)]
        return F.pad(torch.stack(scores), (self.first, 0))

    def next_log_probs(self, x_NT: Tensor) -> Tensor:
        """(N, V) log p of the token after."""
        return torch.cat([piece[:, -1].float().log_softmax(dim=1) for piece in self.call(self._begun(x_NT))])
