"""What runs were measured at, by modality: runs that differ in their seed alone are one variant."""

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from imm_scale import config as configs
from imm_scale import storage
from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.evaluation import cost_quality
from imm_scale.evaluation.records import Conditions, error_of, guidance
from imm_scale.report.runs import Run, read_run

Modality = Literal["tokens", "images"]
_NLL = "nll_per_token"
_FLOOR, _ALONE = "product_floor_per_token", "nll_one_at_a_time"
# Sections that say where a run lies and how it is measured, not what it is.
_NOT_THE_MODEL = ("seed", "run.", "sampling.", "evaluation.", "wandb.")
_BLOCKS = ("model.blocks", "model.block")


class Measured(NamedTuple):
    """A value, and what of it is above the least there is: None where that is not known."""

    value: float
    excess: float | None


@dataclass(frozen=True)
class Point:
    """A variant at one setting of its sampler, means over its runs.

    Attributes:
        work: multiply-adds of a sample; None where files do not say it.
        error: standard deviation over training seeds, of one run what its file says.
        floor: what steps of independent tokens cost at best, of masked nets.
        by_seed: of each training seed; of a single run, of each sampling seed, none where there is one.
    """

    setting: str
    sequence: float
    refinement: float
    passes: float
    work: float | None
    value: float
    excess: float | None
    error: float | None
    floor: float | None
    by_seed: Mapping[int, Measured]


@dataclass(frozen=True)
class Variant:
    """Runs that differ in their seed alone.

    Attributes:
        family: what it shares with variants that differ in their blocks alone.
        seeds: whose seeds points are told apart by.
    """

    name: str
    config: Config
    family: str
    seeds: Literal["training", "sampling"]
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Column:
    """Variants of one modality, measured alike.

    Attributes:
        under: what they share.
        length: tokens of a sequence; None of images.
        left_out: sentences about results that are not here.
    """

    modality: Modality
    metric: str
    under: Conditions
    length: int | None
    variants: tuple[Variant, ...]
    left_out: tuple[str, ...]

    @property
    def baseline(self) -> Variant:
        """Flow matching among images, a masked net of independent tokens among tokens; else the first."""
        return next((one for one in self.variants if _is_baseline(one.config)), self.variants[0])


def _is_baseline(config: Config) -> bool:
    head = getattr(config.model, "head", None)
    return config.method.name == "flow_matching" or (
        config.method.name == "masked" and head is not None and head.kind == "factorized"
    )


class _Result(NamedTuple):
    """One result, with the run and the evaluation it is of."""

    run: Run
    evaluation: Mapping[str, Any]
    result: Mapping[str, Any]

    @property
    def modality(self) -> Modality:
        return "tokens" if (self.evaluation.get("extractor") or {}).get("kind") == "tokens" else "images"

    @property
    def conditions(self) -> Conditions:
        """What it shares with those it is compared with; drawing the reference by the run's seed is a part of seeds."""
        reference = self.evaluation.get("reference") or {}
        if reference.get("posterior_seed") == self.run.config.seed:
            reference = {**reference, "posterior_seed": "of the run"}
        return cost_quality.setting({**self.evaluation, "reference": reference}, self.result)

    @property
    def setting(self) -> str:
        """All that is chosen of a sampler, in words; the same in runs of other seeds."""
        result = self.result
        parts = [f"{result['steps']} step" + "s" * (result["steps"] != 1), result.get("sampler"), result.get("grid")]
        parts += [result["order"]] if result.get("order") and result.get("sampler") == "unmask" else []
        scale = result.get("guidance_scale")
        parts += [] if scale in (None, 1.0) else [f"guidance {guidance(result)}"]
        interval = self.evaluation.get("guidance_interval")
        parts += [f"in {interval}"] if scale not in (None, 1.0) and interval not in (None, [0.0, 1.0]) else []
        parts += [f"{result['passes']:g} passes"] if result["passes"] != result["steps"] and _is_fixed(result) else []
        parts += [str(self.evaluation["ema"])] if self.evaluation.get("ema") else []
        parts += [f"blocks of {result['block_steps']}"] if result.get("block_steps") else []
        return ", ".join(map(str, parts))


def _is_fixed(result: Mapping[str, Any]) -> bool:
    """Whether a sampler's passes follow from its settings."""
    return result.get("sampler") != "verified"


def read(run_dirs: Sequence[str]) -> list[Column]:
    """The columns that have a result. Raises UserError for folders that are no runs, or nothing measured in them."""
    runs = [read_run(run_dir) for run_dir in dict.fromkeys(run_dirs)]
    results = [_Result(run, e, result) for run in runs for e in run.evaluations for result in e["results"]]
    results = [one for one in results if one.result.get("passes") and one.result.get("measures")]
    if not results:
        raise UserError(f"nothing is measured in {', '.join(run_dirs)}: imm-scale evaluate does it, at several --steps")
    modalities: tuple[Modality, ...] = ("tokens", "images")
    by_modality = [(kind, [one for one in results if one.modality == kind]) for kind in modalities]
    return [_column(kind, those) for kind, those in by_modality if those]


def _column(modality: Modality, results: Sequence[_Result]) -> Column:
    metric = _metric(results)
    having = [one for one in results if metric in one.result["measures"]]
    under = _most_shared(one.conditions for one in having)
    alike = [one for one in having if one.conditions == under]
    lengths = [one.evaluation["tokens"] for one in alike if one.evaluation.get("tokens")]
    return Column(
        modality,
        metric,
        under,
        lengths[0] if lengths else None,
        tuple(_variants(alike, metric)),
        tuple(_left_out(results, having, alike, metric)),
    )


def _metric(results: Sequence[_Result]) -> str:
    """nll@L where a result has it, else what most are measured by."""
    if any(_NLL in one.result["measures"] for one in results):
        return _NLL
    return str(Counter(one.result["metric"] for one in results).most_common(1)[0][0])


def _most_shared(conditions: Iterable[Conditions]) -> Conditions:
    every = list(conditions)
    return max(every, key=every.count)


def _left_out(
    results: Sequence[_Result], having: Sequence[_Result], alike: Sequence[_Result], metric: str
) -> Iterable[str]:
    if len(having) < len(results):
        names = sorted({one.run.name for one in results if metric not in one.result["measures"]})
        yield f"{_count(len(results) - len(having))} of {', '.join(names)} without {metric}"
    if len(alike) < len(having):
        yield f"{_count(len(having) - len(alike))} measured otherwise"
    unknown = sum(one.result["multiply_adds"] is None for one in alike)
    if unknown:
        yield f"{_count(unknown)} of older files without their work: evaluate again to see them in all figures"


def _count(results: int) -> str:
    return f"{results} result" + "s" * (results != 1)


# --- variants ---


def _key(config: Config, without: tuple[str, ...]) -> str:
    flat = configs.flatten(config)
    return repr(sorted((key, repr(value)) for key, value in flat.items() if not key.startswith(without)))


def _variants(results: Sequence[_Result], metric: str) -> list[Variant]:
    groups: dict[str, list[_Result]] = {}
    for one in results:
        groups.setdefault(_key(one.run.config, _NOT_THE_MODEL), []).append(one)
    names = _names([[one.run for one in group] for group in groups.values()])
    return [_variant(name, group, metric) for name, group in zip(names, groups.values(), strict=True)]


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Of each group: the name of its runs without their seeds, and with a folder where names do not tell it apart."""
    names = [re.sub(r"[-_ ]?seed[-_=]?\d+", "", group[0].name) or group[0].name for group in groups]
    return [
        name if names.count(name) == 1 else f"{name} ({storage.name(group[0].dir)})"
        for name, group in zip(names, groups, strict=True)
    ]


def _variant(name: str, results: Sequence[_Result], metric: str) -> Variant:
    config = results[0].run.config
    several = len({one.run.config.seed for one in results}) > 1
    by_setting: dict[str, list[_Result]] = {}
    for one in results:
        by_setting.setdefault(one.setting, []).append(one)
    points = [_point(setting, those, metric, several) for setting, those in by_setting.items()]
    family = _key(config, (*_NOT_THE_MODEL, *_BLOCKS))
    order = sorted(points, key=lambda point: (point.sequence, point.refinement, point.value))
    return Variant(name, config, family, "training" if several else "sampling", tuple(order))


def _point(setting: str, results: Sequence[_Result], metric: str, several: bool) -> Point:
    """Of the results at one setting, one a training seed."""
    by_run = {one.run.config.seed: one.result for one in results}
    measured = {seed: _measured(result, metric) for seed, result in by_run.items()}
    excesses = [one.excess for one in measured.values() if one.excess is not None]
    works = [result["multiply_adds"] for result in by_run.values() if result["multiply_adds"] is not None]
    values = [one.value for one in measured.values()]
    first = next(iter(by_run.values()))
    floors = [result["measures"][_FLOOR]["value"] for result in by_run.values() if _FLOOR in result["measures"]]
    return Point(
        setting=setting,
        sequence=_mean(by_run.values(), "sequence_passes"),
        refinement=_mean(by_run.values(), "refinement_passes"),
        passes=_mean(by_run.values(), "passes"),
        work=statistics.fmean(works) if works else None,
        value=statistics.fmean(values),
        excess=statistics.fmean(excesses) if excesses else None,
        error=statistics.stdev(values) if len(values) > 1 else error_of(first["measures"][metric]),
        floor=statistics.fmean(floors) if floors and metric == _NLL else None,
        by_seed=measured if several else _by_sampling_seed(first, metric),
    )


def _mean(results: Iterable[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(result[key] for result in results)


def _least(result: Mapping[str, Any], metric: str) -> float | None:
    """What no sampler of these weights goes below: a distance of 0, the likelihood of one token at a time."""
    if metric == _NLL:
        alone = result["measures"].get(_ALONE)
        return None if alone is None else float(alone["value"])
    return 0.0 if "frechet" in metric or metric.startswith("FID") else None


def _above(value: float, least: float | None) -> Measured:
    return Measured(value, None if least is None else value - least)


def _measured(result: Mapping[str, Any], metric: str) -> Measured:
    return _above(result["measures"][metric]["value"], _least(result, metric))


def _by_sampling_seed(result: Mapping[str, Any], metric: str) -> dict[int, Measured]:
    seeds, values = result.get("seeds", ()), result["measures"][metric].get("values", ())
    if len(seeds) < 2 or len(seeds) != len(values):
        return {}
    return {seed: _above(value, _least(result, metric)) for seed, value in zip(seeds, values, strict=True)}
