"""What can be said of a config without a device, a manifest or other ranks."""

import signal
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from imm_scale.choices import MetricConfig
from imm_scale.config.keys import flatten, nearest_key, sections_of
from imm_scale.config.moved import renamed
from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.registry import METRICS


def _positive(config: Config) -> None:
    values = flatten(config)
    keys = (
        "data.block_samples data.cache_bytes train.global_batch_size train.micro_batch_size "
        "train.max_steps train.log_every train.checkpoint_every train.keep_last train.keep_every optimizer.lr "
        "train.init_step train.holdout_every train.max_consecutive_skips train.step_timeout train.peak_flops "
        "optimizer.reference_images ema.images train.grad_clip sampling.num "
        "sampling.batch_size evaluation.repeats evaluation.num evaluation.compared evaluation.extractor.max_dim "
        "evaluation.extractor.resize sampling.guide.step"
    )
    for key in keys.split():
        if values[key] is not None and values[key] <= 0:
            raise UserError(f"{key}={values[key]} must be above 0")
    for key in ("sampling.steps", "evaluation.steps"):
        if not values[key] or min(values[key]) < 1:
            raise UserError(f"{key}={values[key]} must be a list of step counts of at least 1")
    if len(values["sampling.guidance_interval"]) != 2:
        raise UserError(f"sampling.guidance_interval={values['sampling.guidance_interval']} must be two times")
    if any(not 0.0 < decay < 1.0 for decay in config.ema.decays):
        raise UserError(f"ema.decays={config.ema.decays} must lie between 0 and 1")
    if len(set(config.ema.decays)) < len(config.ema.decays):
        raise UserError(f"ema.decays={config.ema.decays} names an average twice: leave one of them out")
    if config.zero.stage not in (0, 1, 2, 3):
        raise UserError(f"zero.stage={config.zero.stage} does not exist; choose 0, 1, 2 or 3")


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


def _optimizer(config: Config) -> None:
    betas = config.optimizer.betas
    if len(betas) != 2 or any(not 0.0 <= beta < 1.0 for beta in betas):
        raise UserError(f"optimizer.betas={betas} must be two numbers in [0, 1)")
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
    if train.stop_before is not None and train.stop_before < 0:
        raise UserError(f"train.stop_before={train.stop_before} must be 0 or more seconds")
    if train.spike_factor is not None and train.spike_factor <= 1:
        raise UserError(f"train.spike_factor={train.spike_factor} must be above 1: 10 is a beginning")
    if train.max_rewinds < 0:
        raise UserError(f"train.max_rewinds={train.max_rewinds} must be 0 or more")
    steps = train.profile_steps
    if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
        raise UserError(f"train.profile_steps={steps} must be the first and the last step to trace, as in [100,105]")
    if data.holdout < 0 or (data.holdout > 1 and data.holdout % 1):
        raise UserError(f"data.holdout={data.holdout} must be a share below 1 or a whole number of samples")


def _initial_weights(config: Config) -> None:
    train = config.train
    if train.init_from is None:
        for key, unset in (("init_ema", None), ("init_step", None), ("init_allow_change", [])):
            if getattr(train, key) != unset:
                raise UserError(f"train.{key}={getattr(train, key)} does nothing without train.init_from: set it too")
    if train.init_ema is not None and not 0.0 <= train.init_ema < 1.0:
        raise UserError(f"train.init_ema={train.init_ema} must be the decay of an average, or 0 for the raw weights")
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
    _positive(config)
    _going_on(config)
    _initial_weights(config)
    _choices(config)
    for metric in metric_configs(config.evaluation.metrics):
        metric.validate()
    _optimizer(config)
