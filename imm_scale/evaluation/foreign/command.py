"""`imm-scale profile`: one held-out pass of somebody's model, and what steps or blocks of several tokens must lose."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from imm_scale import precision, storage
from imm_scale.checkpoint import run_folder
from imm_scale.errors import UserError
from imm_scale.evaluation.foreign import held_out, hugging_face, models, summary
from imm_scale.evaluation.foreign.logits import CausalLogits, MaskedLogits
from imm_scale.evaluation.foreign.models import Chosen
from imm_scale.evaluation.foreign.summary import Document
from imm_scale.evaluation.tokens import causal, profile, scoring
from imm_scale.evaluation.tokens.causal import Rollouts
from imm_scale.evaluation.tokens.parts import Parts

DOCUMENT = "profile.json"
_BLOCK, _ROLLOUTS, _CONTEXTS = 4, 16, 256
_OF_MASKED, _OF_CAUSAL = ("passes", "steps"), ("block", "rollouts", "contexts")


@dataclass(frozen=True)
class Arguments:
    """The command's words; None where a default depends on the data.

    Attributes:
        samples: sequences at most.
        passes, steps: of a masked model: scores a sample, numbers of steps.
        block, rollouts, contexts: of a causal model: longest block, continuations of a prefix, prefixes.
    """

    chosen: Chosen
    data: str
    tokenizer: str | None = None
    length: int | None = None
    samples: int = 1024
    passes: int | None = None
    steps: tuple[int, ...] | None = None
    block: int | None = None
    rollouts: int | None = None
    contexts: int | None = None
    seed: int = 0
    out: str | None = None


def check(arguments: Arguments) -> None:
    """What can be known before a model or data are read. Raises UserError."""
    for name, value in (("samples", arguments.samples), ("batch-size", arguments.chosen.batch)):
        if value < 1:
            raise UserError(f"--{name} {value}: give 1 or more")
    precision.check(arguments.chosen.precision, "--precision")
    models.check(arguments.chosen)
    is_causal = arguments.chosen.kind == "causal"
    for name in _OF_MASKED if is_causal else _OF_CAUSAL:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name}: {_why_not(is_causal)}; leave it out")
    if arguments.rollouts is not None and arguments.rollouts < 1:
        raise UserError(f"--rollouts {arguments.rollouts}: give 1 or more")
    held_out.check(arguments.data, _tokenizer(arguments), arguments.length)
    if arguments.out is not None:
        storage.check_writable(arguments.out)


def _why_not(is_causal: bool) -> str:
    if is_causal:
        return "a causal model has the conditionals of one order alone, and none of tokens in random order"
    return "a masked model's blocks are its steps (--steps), this is for causal ones"


def _tokenizer(arguments: Arguments) -> str | None:
    """What --tokenizer says, else the folder of the model for a text."""
    chosen = arguments.chosen
    is_text = not arguments.data.endswith(held_out.HOLD_TOKENS)
    if arguments.tokenizer is None and is_text and chosen.is_folder and hugging_face.has_tokenizer(chosen.model):
        return chosen.model
    return arguments.tokenizer


def run(arguments: Arguments, device: torch.device, announce: Callable[[str], None]) -> Document:
    """The document, also announced as text, and written to `out`/profile.json. Raises UserError."""
    check(arguments)
    start = time.monotonic()
    x_NT = held_out.read(arguments.data, _tokenizer(arguments), arguments.length, arguments.samples)
    model = models.open_model(arguments.chosen, device)
    found = (
        _of_masked(model, x_NT, arguments) if isinstance(model, MaskedLogits) else _of_causal(model, x_NT, arguments)
    )
    document = {
        **found,
        "model": arguments.chosen.model,
        "data": arguments.data,
        "tokenizer": _tokenizer(arguments),
        "samples": len(x_NT),
        "seed": arguments.seed,
        "precision": arguments.chosen.precision,
        "seconds": time.monotonic() - start,
        "versions": run_folder.versions(),
    }
    announce("\n".join(summary.lines(document)))
    if arguments.out is not None:
        storage.write_text(storage.join(arguments.out, DOCUMENT), json.dumps(document, indent=1))
    return document


def _parts(arguments: Arguments, x_NT: Tensor, rows_at_once: int, **settings: object) -> Parts:
    """Where values are kept: a folder named by all that they depend on."""
    identity = {
        "model": models.identity(arguments.chosen),
        "data": hashlib.sha256(x_NT.numpy().tobytes()).hexdigest(),
        "shape": list(x_NT.shape),
        "seed": arguments.seed,
        "precision": arguments.chosen.precision,
        **settings,
    }
    return Parts(arguments.out, identity, max(1, rows_at_once))


def _of_masked(model: MaskedLogits, x_NT: Tensor, arguments: Arguments) -> Document:
    samples, length = x_NT.shape
    passes = scoring.enough_passes(samples, length) if arguments.passes is None else arguments.passes
    steps = _steps(arguments.steps, length)
    around = {"mask": model.mask, "before": list(model.before), "after": list(model.after)}
    parts = _parts(arguments, x_NT, arguments.chosen.batch, passes=passes, **around)
    scores = scoring.score(model, x_NT, passes, arguments.seed, parts.collect)
    return {**summary.of_masked(scores, steps), "passes": passes, **around}


def _steps(asked: tuple[int, ...] | None, length: int) -> list[int]:
    if asked is None:
        return profile.step_counts(length)
    if not asked or min(asked) < 1 or max(asked) > length:
        raise UserError(f"--steps {','.join(map(str, asked))}: give 1 to {length}, the tokens of a sequence")
    return sorted(set(asked))


def _of_causal(model: CausalLogits, x_NT: Tensor, arguments: Arguments) -> Document:
    plan = Rollouts(
        block=_BLOCK if arguments.block is None else arguments.block,
        contexts=min(_CONTEXTS, len(x_NT)) if arguments.contexts is None else arguments.contexts,
        count=_ROLLOUTS if arguments.rollouts is None else arguments.rollouts,
        seed=arguments.seed,
    )
    causal.prefix_lengths(x_NT.shape[1], plan.block, model.first)  # a block that is too long, before any pass
    batch = arguments.chosen.batch
    one_by_one = _parts(arguments, x_NT, batch, begin=model.begin)
    rolled_out = _parts(arguments, x_NT, batch // plan.count, begin=model.begin, **asdict(plan))
    losses = causal.block_losses(model, x_NT, plan, rolled_out)
    scores = causal.left_to_right(model, x_NT, one_by_one)
    document = summary.of_causal(scores, losses)
    return {**document, "begin": model.begin, "rollouts": plan.count, "contexts": plan.contexts}
