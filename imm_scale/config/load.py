"""What a run can be told: how YAML files and overrides become a `Config`, and what is refused.

Files merge from left to right, each after the files it names under `include:`; then come `key=value` overrides.
"""

import dataclasses
import difflib
import os
import signal
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from imm_scale.config.schema import Config
from imm_scale.errors import UserError


@dataclass(frozen=True)
class Entry:
    """One field of the schema."""

    key: str
    type: str
    default: Any
    help: str


@dataclass(frozen=True)
class Loaded:
    """A config and, for each key that was set, where: `file:line` or `command line`."""

    config: Config
    origins: dict[str, str]


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _walk(schema: type, prefix: str) -> Iterator[Entry]:
    hints = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _walk(hint, f"{prefix}{item.name}.")
        else:
            factory = item.default_factory
            default = item.default if factory is dataclasses.MISSING else factory()
            yield Entry(prefix + item.name, _type_name(hint), default, item.metadata["help"])


SCHEMA: dict[str, Entry] = {entry.key: entry for entry in _walk(Config, "")}
_SECTIONS = {key.rpartition(".")[0] for key in SCHEMA} - {""}
_FREE_SECTION = "zero.extra"  # its keys are DeepSpeed's


def nearest_key(key: str) -> str:
    """ ", did you mean X?" for a mistyped key, or a pointer to the list of keys."""
    close = difflib.get_close_matches(key, SCHEMA, n=1, cutoff=0.5)
    same_leaf = [known for known in SCHEMA if known.rpartition(".")[2] == key.rpartition(".")[2]]
    suggestion = next(iter(same_leaf + close), None)
    return f"did you mean {suggestion}?" if suggestion else "`imm-scale explain` lists all keys"


def _settings_of_node(loader: Any, node: Any, prefix: str, source: str) -> Iterator[tuple[str, Any, str]]:
    """(key, value, origin) of each setting in a YAML mapping."""
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        origin = f"{source}:{key_node.start_mark.line + 1}"
        if key in _SECTIONS and isinstance(value_node, yaml.MappingNode):
            yield from _settings_of_node(loader, value_node, f"{key}.", source)
        else:
            yield key, loader.construct_object(value_node, deep=True), origin


def _read_yaml(path: str, seen: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, str]]:
    absolute = os.path.abspath(path)
    if absolute in seen:
        raise UserError(f"{path} includes itself, by way of {' -> '.join((*seen, absolute))}")
    try:
        with open(path) as file:
            loader = yaml.SafeLoader(file.read())
    except OSError as error:
        raise UserError(f"cannot read config {path!r}: {error.strerror}") from error
    try:
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path} must be a mapping of keys to values")
    settings = list(_settings_of_node(loader, node, "", path))
    for key, value, _ in settings:
        if key == "include":
            for included in [value] if isinstance(value, str) else value:
                yield from _read_yaml(os.path.join(os.path.dirname(path), included), (*seen, absolute))
    yield from ((key, value, origin) for key, value, origin in settings if key != "include")


def _parse_override(text: str) -> tuple[str, Any, str]:
    key, _, value = text.partition("=")
    try:
        return key.strip(), yaml.safe_load(value), "command line"
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: the value is not valid YAML ({error})") from error


def _expected(key: str) -> str:
    return SCHEMA[key].type if key in SCHEMA else "a DeepSpeed setting"


def _nested(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _check_key(key: str, origin: str) -> None:
    if key in SCHEMA or key.startswith(f"{_FREE_SECTION}."):
        return
    if key in _SECTIONS:
        raise UserError(f"{origin}: {key} is a section; give its keys, as in {key}.{_first_leaf(key)}=...")
    raise UserError(f"{origin}: unknown key {key!r}; {nearest_key(key)}")


def _first_leaf(section: str) -> str:
    return next(key for key in SCHEMA if key.startswith(f"{section}.")).removeprefix(f"{section}.")


def load(files: Sequence[str] = (), overrides: Sequence[str] = ()) -> Loaded:
    """Merges files from left to right, then overrides, over the defaults, and validates the result.

    Raises:
        UserError: unreadable file, unknown key (with its file, line and nearest valid key), wrong type or value.
    """
    settings = [setting for path in files for setting in _read_yaml(path)]
    settings += [_parse_override(text) for text in overrides]
    node: Any = OmegaConf.structured(Config)
    origins: dict[str, str] = {}
    for key, value, origin in settings:
        _check_key(key, origin)
        try:
            node = OmegaConf.merge(node, _nested(key, value))
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{origin}: {key}={value!r} does not fit {_expected(key)}: {reason}") from error
        origins[key] = origin
    config: Config = OmegaConf.to_object(node)  # type: ignore[assignment]
    validate(config)
    return Loaded(config, origins)


def is_override(word: str) -> bool:
    """Whether a word is key=value: a path may hold = too, behind a slash."""
    key, equals, _ = word.partition("=")
    return bool(equals) and "/" not in key


def split_words(words: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """(config files, key=value overrides, other words) of a command line."""
    files = [word for word in words if word.endswith((".yaml", ".yml"))]
    overrides = [word for word in words if word not in files and is_override(word)]
    return files, overrides, [word for word in words if word not in files and word not in overrides]


def load_words(words: Sequence[str]) -> Loaded:
    """The config of `imm-scale train WORD...`. Raises UserError."""
    files, overrides, others = split_words(words)
    if others:
        raise UserError(f"{others[0]!r} is neither a config file (*.yaml) nor an override (key=value)")
    return load(files, overrides)


def settings_of(overrides: Sequence[str]) -> dict[str, Any]:
    """{dotted key: value} of key=value words. Raises UserError for a value that is not YAML."""
    return {key: value for key, value, _ in map(_parse_override, overrides)}


def changed(config: Config, settings: Mapping[str, Any], origin: str) -> Config:
    """A config with other values under some keys, validated; for many variants of one config much faster than `load`.

    Args:
        settings: {dotted key: value}.
        origin: where they stand, for messages.

    Raises:
        UserError: unknown key, wrong type or value.
    """
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        _check_key(key, origin)
        *sections, leaf = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = value
    try:
        node = OmegaConf.merge(OmegaConf.structured(config), nested)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        reason = str(error).splitlines()[0]
        raise UserError(f"{origin}: {key}={settings.get(key)!r} does not fit {_expected(key)}: {reason}") from error
    made: Config = OmegaConf.to_object(node)  # type: ignore[assignment]
    try:
        validate(made)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    return made


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def from_yaml(text: str) -> Config:
    """The config a run folder was started with."""
    merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text))
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def flatten(config: Config) -> dict[str, Any]:
    """{dotted key: value}."""

    def walk(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for item in dataclasses.fields(value):
            child = getattr(value, item.name)
            if dataclasses.is_dataclass(child):
                yield from walk(child, f"{prefix}{item.name}.")
            else:
                yield prefix + item.name, child

    return dict(walk(config, ""))


def _positive(config: Config) -> None:
    values = flatten(config)
    keys = (
        "data.block_samples data.cache_bytes objective.particles train.global_batch_size train.micro_batch_size "
        "train.max_steps train.log_every train.checkpoint_every train.keep_last train.keep_every optimizer.lr "
        "train.holdout_every train.max_consecutive_skips train.step_timeout train.peak_flops "
        "optimizer.reference_images ema.images flow_map.sigma_data flow_map.time_scale train.grad_clip sampling.num "
        "sampling.batch_size evaluation.repeats evaluation.num evaluation.compared evaluation.extractor.max_dim "
        "evaluation.extractor.resize"
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
    if not 0.0 <= config.objective.label_drop < 1.0:
        raise UserError(f"objective.label_drop={config.objective.label_drop} must be in [0, 1)")
    if config.zero.stage not in (0, 1, 2, 3):
        raise UserError(f"zero.stage={config.zero.stage} does not exist; choose 0, 1, 2 or 3")


_CONSISTENCY = ((1, "energy"), (1, "pseudo_huber"))


def _objective(config: Config) -> None:
    objective, flow_map, train = config.objective, config.flow_map, config.train
    if flow_map.parameterization == "euler_fm" and flow_map.trajectory != "ot_fm":
        raise UserError(
            f"flow_map.parameterization=euler_fm needs flow_map.trajectory=ot_fm, not {flow_map.trajectory}: "
            "use flow_map.parameterization=simple_edm, which fits any trajectory"
        )
    if objective.name == "flow_matching" and objective.particles != 1:
        raise UserError(
            f"objective.particles={objective.particles}: flow matching has no groups; set objective.particles=1"
        )
    for key in ("global_batch_size", "micro_batch_size"):
        value = getattr(train, key)
        if value % objective.particles:
            below, step = value // objective.particles * objective.particles, objective.particles
            raise UserError(f"train.{key}={value} is not a multiple of objective.particles={step}: use {below + step}")
    if objective.k < 0:
        raise UserError(f"objective.k={objective.k} makes the step longer than the range: use at least 0, 10 to 15")
    if objective.name == "consistency" and (objective.particles, objective.kernel) not in _CONSISTENCY:
        raise UserError(
            f"objective.name=consistency with particles={objective.particles} and kernel={objective.kernel}: "
            "it is the case of objective.particles=1 and objective.kernel=energy or pseudo_huber"
        )
    _times(config)


def _times(config: Config) -> None:
    objective = config.objective
    t_max = 1.0 if objective.t_max is None else objective.t_max
    if not 0.0 <= objective.t_min < t_max <= 1.0:
        raise UserError(f"times must satisfy 0 <= t_min={objective.t_min} < t_max={t_max} <= 1")
    if objective.t_max == 1.0 and objective.name != "flow_matching":
        raise UserError("objective.t_max=1 has no finite eta: use 0.994 on ot_fm, 0.996 on vp_cosine (null does)")
    factors = objective.weight_factors
    if "dlog_snr_dt" in factors and "sigmoid" not in factors and objective.t_min == 0.0:
        raise UserError(
            f"objective.weight_factors={factors}: without sigmoid the weight is infinite at t = 0; "
            "set objective.t_min above 0 (0.006, say)"
        )


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


def validate(config: Config) -> None:
    """Everything that can be said without a device, a manifest or other ranks. Raises UserError."""
    _positive(config)
    _going_on(config)
    _objective(config)
    _optimizer(config)


def explain(key: str, loaded: Loaded) -> str:
    """What a key means, its type, default, current value and where that came from. A section explains all its keys."""
    if key in _SECTIONS:
        return "\n\n".join(explain(known, loaded) for known in SCHEMA if known.startswith(f"{key}."))
    if key not in SCHEMA:
        raise UserError(f"unknown key {key!r}; {nearest_key(key)}")
    entry = SCHEMA[key]
    current = flatten(loaded.config)[key]
    origin = loaded.origins.get(key, "default")
    return (
        f"{key}\n  {entry.help}\n  type     {entry.type}\n  default  {_show(entry.default)}"
        f"\n  current  {_show(current)}  ({origin})"
    )


def overview(loaded: Loaded) -> str:
    """A line per key: current value and meaning."""
    values = flatten(loaded.config)
    return "\n".join(f"{key}={_show(values[key])}\n    {entry.help}" for key, entry in SCHEMA.items())


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
