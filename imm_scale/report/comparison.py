"""Few steps of one run over many of another, held against each other only where they were measured alike."""

from collections.abc import Iterable, Sequence
from typing import Any

from imm_scale.evaluation.records import Conditions, differing, samples

_MANY = 10  # times as many steps, at least
_Result = dict[str, Any]  # as it stands in an evaluation file, with its `conditions`


def lines(few: Iterable[_Result], many: Sequence[_Result]) -> list[str]:
    """Each step count of a few-step method beside the flow-matching result of at least ten times as many steps.

    Both have to share every condition of `evaluation.records.conditions`, and to say so. Where samplers, grids or
    averages were tried under the same conditions, the best of each side stands for it.
    """
    return [_ratio(ours, min(_longer(ours, alike), key=_steps_then_value)) for ours, alike in _pairs(few, many)]


def unlike(few: Iterable[_Result], many: Sequence[_Result]) -> list[str]:
    """What `lines` leaves out though both step counts were measured: the closest result, and what it does not share."""
    left_out = []
    for ours in _best(few):
        longer = _longer(ours, many)
        gaps = [differing(ours["conditions"], theirs["conditions"]) for theirs in longer]
        if longer and all(gaps):
            gap, theirs = min(zip(gaps, longer, strict=True), key=lambda pair: len(pair[0]))
            what = "; ".join(_difference(name, ours["conditions"], theirs["conditions"]) for name in gap)
            left_out.append(
                f"{_method(ours)} with {ours['steps']} beside {theirs['steps']} steps is no comparison: {what}"
            )
    return left_out


def _pairs(few: Iterable[_Result], many: Sequence[_Result]) -> list[tuple[_Result, list[_Result]]]:
    pairs = [(ours, [d for d in many if not differing(ours["conditions"], d["conditions"])]) for ours in _best(few)]
    return [(ours, alike) for ours, alike in pairs if _longer(ours, alike)]


def _best(results: Iterable[_Result]) -> list[_Result]:
    """The best of each run, step count and conditions."""
    best: dict[Any, _Result] = {}
    for result in results:
        key = (result.get("run"), result["steps"], tuple(result["conditions"].items()))
        best[key] = min(best.get(key, result), result, key=lambda r: r["mean"])
    return list(best.values())


def _longer(ours: _Result, many: Iterable[_Result]) -> list[_Result]:
    return [theirs for theirs in many if theirs["steps"] >= _MANY * ours["steps"]]


def _steps_then_value(result: _Result) -> tuple[int, float]:
    return result["steps"], result["mean"]


def _ratio(ours: _Result, theirs: _Result) -> str:
    values = f"{ours['mean']:.4f} / {theirs['mean']:.4f}"
    ratio = f" = {ours['mean'] / theirs['mean']:.2f}" if theirs["mean"] > 0 else ""  # rounding can take it to 0
    shared = ours["conditions"]
    notes = [f"{samples(ours)} samples"]
    notes += [f"guidance {shared['guidance']}"] if shared["guidance"] != "1" else []
    notes += [str(shared["precision"])] if shared["precision"] != "fp32" else []
    return (
        f"{_method(ours)} with {ours['steps']} against flow matching with {theirs['steps']} steps: {values}{ratio}"
        f"  ({', '.join([*notes, str(shared['metric'])])})"
    )


def _method(result: _Result) -> str:
    return "IMM" if result["method"] == "imm" else str(result["method"]).replace("_", " ")


def _difference(name: str, ours: Conditions, theirs: Conditions) -> str:
    return f"{name} {ours[name] or 'not recorded'} and {theirs[name] or 'not recorded'}"
