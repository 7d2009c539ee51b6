"""What a profile found, as a JSON document, and as lines of text."""

from collections.abc import Iterable, Sequence
from typing import Any

from imm_scale.evaluation.tokens import profile
from imm_scale.evaluation.tokens.causal import BlockLoss, LeftToRight
from imm_scale.evaluation.tokens.estimates import Estimate
from imm_scale.evaluation.tokens.profile import Profile, ScheduleCost, Scores
from imm_scale.methods.tokens import schedules

Document = dict[str, Any]
SCHEMA_VERSION = 1
_SHOWN = 8  # sizes of a schedule in a line


def of_masked(scores: Scores, steps: Sequence[int]) -> Document:
    """Profile, schedules and floor; sums in nats a sequence, the profile in nats a token."""
    estimated = Profile(scores)
    costs = profile.schedule_costs(scores, steps)
    fitted_T = estimated.fitted()
    return {
        "schema": SCHEMA_VERSION,
        "kind": "masked",
        "length": scores.length,
        "profile": [{"visible": int(n), **_as_dict("nll", estimated.at(int(n)))} for n in estimated.nodes_M],
        **_as_dict("nll_one_at_a_time", estimated.nll),
        **_as_dict("fall", estimated.fall),
        "alarm": profile.alarm(estimated),
        "schedules": [
            {**_cost(cost), "bound": schedules.bound(fitted_T, cost.steps) if cost.kind == "uniform" else None}
            for cost in costs
        ],
        "floor": [{"steps": steps, **_as_dict("nll", nll)} for steps, nll in profile.floor(costs).items()],
    }


def of_causal(scores: LeftToRight, losses: Sequence[BlockLoss]) -> Document:
    """Profile from left to right and losses of blocks; sums in nats a block, the profile in nats a token."""
    stop = scores.first + scores.score_NT.shape[1]
    places = range(scores.first, stop)
    return {
        "schema": SCHEMA_VERSION,
        "kind": "causal",
        "length": stop,
        "profile": [{"visible": n, **_as_dict("nll", scores.at(n, n + 1))} for n in places],
        **_as_dict("nll_one_at_a_time", Estimate(*(len(places) * number for number in scores.nll))),
        "blocks": [
            {"block": loss.block, **_as_dict("lower", loss.lower), **_as_dict("upper", loss.upper)} for loss in losses
        ],
    }


def _as_dict(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_error": estimate.error}


def _cost(cost: ScheduleCost) -> Document:
    return {
        "steps": cost.steps,
        "kind": cost.kind,
        "sizes": list(cost.sizes),
        **_as_dict("nll", cost.nll),
        **_as_dict("excess", cost.excess),
    }


# --- text ---


def lines(document: Document) -> list[str]:
    """The tables of a document, in nats a token."""
    what = f"{document['samples']:,} sequences of {document['length']} tokens"
    head = [f"{document['model']} on {document['data']}: a {document['kind']} model, {what}", ""]
    tail = _of_masked(document) if document["kind"] == "masked" else _of_causal(document)
    return [*head, *tail]


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of words, right-aligned in columns."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in table]


def sizes_in_words(sizes: Sequence[int]) -> str:
    """As 1-2-2-3; of long ones the first, middle and last."""
    words = list(map(str, sizes))
    if len(words) <= _SHOWN:
        return "-".join(words)
    return "-".join([*words[: _SHOWN // 2], "..", *words[-_SHOWN // 2 + 1 :]])


def estimate(row: Document, name: str, by: int = 1) -> str:
    """A number of a row and its error, divided."""
    return f"{row[name] / by:.4f} +- {row[f'{name}_error'] / by:.4f}"


def chosen_places(document: Document) -> list[Document]:
    """Rows of the profile at 0, 1, 2, 4, 8, .. and the last; JSON has all."""
    rows = document["profile"]
    last = rows[-1]["visible"]
    wanted = {0, last, *(2**i for i in range(last.bit_length()))}
    return [min(rows, key=lambda row: abs(row["visible"] - n)) for n in sorted(wanted)]


def _profile(document: Document, title: str) -> list[str]:
    unique = {row["visible"]: row for row in chosen_places(document)}
    cells = [(f"{n}", estimate(row, "nll")) for n, row in unique.items()]
    return columns([(title, "nats a token"), *cells])


def _of_masked(document: Document) -> list[str]:
    length = document["length"]
    total = estimate(document, "nll_one_at_a_time", length)
    cells = [
        (
            f"{row['steps']}",
            row["kind"],
            estimate(row, "nll", length),
            estimate(row, "excess", length),
            "" if row["bound"] is None else f"{row['bound'] / length:.4f}",
            sizes_in_words(row["sizes"]),
        )
        for row in document["schedules"]
    ]
    alarm = [] if document["alarm"] is None else ["", f"warning: {document['alarm']}"]
    return [
        *_profile(document, "visible"),
        "",
        f"one token at a time, in random order: {total} nats a token",
        "",
        *columns([("steps", "sizes", "nll@L a token", "excess", "bound", "tokens a step"), *cells]),
        "",
        "Best sizes are the floor. Their excess is in the data as this net knows it: no training for so few steps",
        "removes it where the tokens of a step are drawn independently.",
        *alarm,
    ]


def _of_causal(document: Document) -> list[str]:
    scored = len(document["profile"])
    cells = [
        (f"{row['block']}", *(estimate(row, bound, row["block"]) for bound in ("lower", "upper")))
        for row in document["blocks"]
    ]
    return [
        *_profile(document, "before it"),
        "",
        f"from left to right: {estimate(document, 'nll_one_at_a_time', scored)} nats a token",
        "",
        *columns([("block", "at least", "at most"), *cells]),
        "",
        "What blocks lose whose tokens are drawn independently, given all before the block, in nats a token. The upper",
        "bound holds for any data, the lower one where the data has the model's law; both close with more --rollouts",
        f"(here {document['rollouts']}).",
        "Random orders and nll@L are left out: a causal model has no such conditionals.",
    ]
