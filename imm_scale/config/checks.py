"""What can be said of a config without a device, a manifest or other ranks."""

import math
import signal
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from imm_scale.choices import ANY_NUMBER, Interval, MetricConfig
from imm_scale.config.keys import Entry, entries, entries_of, flatten, is_known, nearest_key, sections_of
from imm_scale.config.moved import renamed
from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.registry import METRICS


def _check_ranges(entries: Iterable[Entry], values: Mapping[str, Any], where: str = "") -> None:
    """Raises UserError for a number out of its key's range, or a list of another length than its key's."""
    for entry in entries:
        value = values[entry.key]
        problem = problem_of(value, entry)
        if problem is not None:
            raise UserError(f"{where}{entry.key}={value} {problem}")


def problem_of(value: Any, entry: Entry) -> str | None:
    """Why a value cannot stand under a key, None where it can."""
    if isinstance(value, list) and len(value) not in entry.length:
        return f"must have {_count(entry.length)}"
    items = value if isinstance(value, list) else [value]
    numbers = [item for item in items if isinstance(item, int | float) and not isinstance(item, bool)]
    if entry.holds_numbers and any(number not in entry.range for number in numbers):
        each = "each" if isinstance(value, list) else "it"
        return f"is out of range: {each} must be in {entry.range.text}" + ", finite" * (entry.range == ANY_NUMBER)
    return None


def _count(length: Interval) -> str:
    if length.low == length.high:
        return f"{length.low} values"
    return f"{length.low} to {length.high} values" if math.isfinite(length.high) else f"at least {length.low}"


def _sampling(config: Config) -> None:
    low, high = config.sampling.guidance_interval
    if low >= high:
        raise UserError(
            f"sampling.guidance_interval={[low, high]} is empty: give the lower time first, as in [0.1,0.8]; "
            "sampling.guidance_scale=1 is without guidance"
        )
    sampler = config.method.sampler_named(config.sampling.sampler)
    config.method.check_sampler(sampler, (*config.sampling.steps, *config.evaluation.steps))
    config.method.check_guidance(config.sampling.guidance_scale, config.sampling.guidance_interval)
    scale, drop = config.sampling.guidance_scale, getattr(config.method, "label_drop", None)
    if scale != 1.0 and drop == 0.0 and not config.sampling.guide.is_set:
        raise UserError(
            f"sampling.guidance_scale={scale} needs a net that is trained without labels now and then: set "
            "method.label_drop above 0 (0.1, say), or sampling.guidance_scale=1"
        )


def _run(config: Config) -> None:
    name = config.run.name
    if config.run.dir == "" or not name or (config.run.dir is None and {".", ".."} & set(name.split("/"))):
        raise UserError(f"run.name={name!r} and run.dir={config.run.dir!r} make no folder of a run: name it")
    for key in config.run.allow_change:
        if not is_known(key):
            raise UserError(f"run.allow_change={config.run.allow_change}: {key!r} is neither a key nor a section")


def _averages(config: Config) -> None:
    decays = config.ema.decays
    if len(set(decays)) < len(decays):
        raise UserError(f"ema.decays={decays} names an average twice: leave one of them out")
    teacher = config.method.teacher_decay
    if teacher is not None and teacher not in decays:
        raise UserError(
            f"method.teacher_decay={teacher} is none of the averages that are kept, ema.decays={decays}: set "
            f"ema.decays={[*decays, teacher]}"
        )


def _choices(config: Config) -> None:
    for choice in (config.method, config.model, config.data.space):
        choice.validate()
    if config.zero.stage > config.method.MAX_ZERO_STAGE:
        raise UserError(
            f"method.name={config.method.name} cannot be trained at zero.stage={config.zero.stage}: "
            f"{config.method.WHY_NOT_BEYOND}. Use zero.stage={config.method.MAX_ZERO_STAGE} or below"
        )
    size = config.method.group_size
    for key in ("global_batch_size", "micro_batch_size"):
        value = getattr(config.train, key)
        if value % size:
            more = value // size * size + size
            raise UserError(f"train.{key}={value} is not a multiple of {size}, the samples of a group: use {more}")


def _offload(config: Config) -> None:
    if config.zero.offload == "optimizer" and config.zero.stage == 0:
        raise UserError("zero.offload=optimizer needs zero.stage of at least 1: at stage 0 nothing is partitioned")
    if config.zero.offload == "parameters" and config.zero.stage != 3:
        raise UserError(
            f"zero.offload=parameters needs zero.stage=3: at stage {config.zero.stage} every rank computes with whole "
            "weights. Use zero.stage=3 or zero.offload=optimizer"
        )


def _going_on(config: Config) -> None:
    """Stopping, guards and what is held out."""
    train, data = config.train, config.data
    for name in train.stop_signals:
        if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
            raise UserError(
                f"train.stop_signals={train.stop_signals}: {name} is no signal that can be caught; use names such as "
                "SIGTERM, SIGUSR1 or SIGINT"
            )
    steps = train.profile_steps
    if steps and (len(steps) != 2 or steps[0] > steps[1]):
        raise UserError(f"train.profile_steps={steps} must be the first and the last step to trace, as in [100,105]")
    if data.latent_shape is not None and len(data.latent_shape) == 2:
        raise UserError(
            f"data.latent_shape={data.latent_shape} must be channels, height and width, or one number, the length of "
            "sequences of tokens"
        )
    if data.holdout and data.holdout_manifest is not None:
        raise UserError(
            f"data.holdout={data.holdout:g} and data.holdout_manifest={data.holdout_manifest} both say which samples "
            "are held out: set one of them"
        )
    if data.holdout > 1 and data.holdout % 1:
        raise UserError(f"data.holdout={data.holdout} must be a share below 1 or a whole number of samples")


def _initial_weights(config: Config) -> None:
    train = config.train
    if train.init_from is None:
        for key, unset in (("init_ema", None), ("init_step", None), ("init_allow_change", [])):
            if getattr(train, key) != unset:
                raise UserError(f"train.{key}={getattr(train, key)} does nothing without train.init_from: set it too")
    known = flatten(config)
    for key in map(renamed, train.init_allow_change):
        if key not in known and key not in sections_of(known):
            raise UserError(f"train.init_allow_change: unknown key {key!r}; {nearest_key(key, known)}")


def metric_configs(metrics: Sequence[Any]) -> list[MetricConfig]:
    """The settings of each metric in `evaluation.metrics`: a name, or a mapping with a name and keys of its own.

    Raises:
        UserError: an unknown metric or key, or a value of another type.
    """
    return [_metric_config({"name": metric} if isinstance(metric, str) else metric) for metric in metrics]


def _metric_config(settings: Any) -> MetricConfig:
    if not isinstance(settings, Mapping) or "name" not in settings:
        raise UserError(f"evaluation.metrics: {settings!r} is neither a name nor a mapping with a name")
    config = METRICS.config(str(settings["name"]))
    try:
        metric_config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config), dict(settings)))
    except OmegaConfBaseException as error:
        has = ", ".join(flatten(config()))
        raise UserError(
            f"evaluation.metrics: {settings}: {str(error).splitlines()[0]}; {settings['name']} has {has}"
        ) from error
    return metric_config


def validate(config: Config) -> None:
    """Everything that can be said without a device, a manifest or other ranks. Raises UserError."""
    _check_ranges(entries(config).values(), flatten(config))
    _run(config)
    _going_on(config)
    _initial_weights(config)
    _choices(config)
    _averages(config)
    _offload(config)
    _sampling(config)
    for metric in metric_configs(config.evaluation.metrics):
        _check_ranges(entries_of(metric), flatten(metric), f"evaluation.metrics: {metric.name}: ")
        metric.validate()
