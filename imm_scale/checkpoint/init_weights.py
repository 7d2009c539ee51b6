"""Starting from weights that are there: what fits, what it means, and what is new in a net of another shape."""

import logging
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from imm_scale import config as configs
from imm_scale.build import ModelSpec
from imm_scale.checkpoint import export
from imm_scale.config.schema import TrainConfig
from imm_scale.errors import UserError
from imm_scale.models.base import Architecture, Backbone
from imm_scale.preflight import PreparedRun

log = logging.getLogger("imm_scale")

_OF_THE_DATA = ("data.codec", "data.space.name", "data.latent_shape")  # no setting can bring them

Differences = dict[str, tuple[Any, Any]]  # {config key: (there, here)}


def check(prepared: PreparedRun) -> None:
    """Whether the weights of `train.init_from`, if it is set, fit a run and mean what it trains; none of them is read.

    Raises:
        UserError: nothing there, weights that do not fit, or that mean something else where `train.init_allow_change`
            does not say so.
    """
    train = prepared.config.train
    if train.init_from is None:
        return
    if export.is_export(train.init_from) and (train.init_ema is not None or train.init_step is not None):
        raise UserError(
            f"train.init_from={train.init_from} is an export, which holds one set of weights: leave out train.init_ema "
            "and train.init_step, or name the run"
        )
    source, _ = export.read_spec(train.init_from, train.init_ema, train.init_step)
    with torch.device("meta"):
        weights, net = source.net.build().state_dict(), prepared.spec.net.build()
    _adapted(net, weights, source, prepared)


def load(net: Any, prepared: PreparedRun) -> None:
    """Puts the weights of `train.init_from`, if it is set, into a fresh net, and logs what is new in it.

    Raises:
        UserError: as `check`.
    """
    train = prepared.config.train
    if train.init_from is None:
        return
    source, weights = export.read(train.init_from, train.init_ema, train.init_step)
    weights, notes = _adapted(net.model, weights, source, prepared)
    export.put(net, weights, train.init_from)
    log.info("starts from the weights of %s", export.read_spec(train.init_from, train.init_ema, train.init_step)[1])
    for note in notes:
        log.info("%s: %s", train.init_from, note)


def _adapted(
    net: Backbone, weights: dict[str, Tensor], source: ModelSpec, prepared: PreparedRun
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights as the net takes them, and sentences on what is new. Raises UserError."""
    here, train = prepared.spec, prepared.config.train
    if type(source.net) is not type(here.net):
        raise UserError(
            f"train.init_from={train.init_from} holds another net: {type(source.net).__name__} there, "
            f"{type(here.net).__name__} here. Take model.name and its keys from there"
        )
    null_is_trained = getattr(source.method, "label_drop", 1.0) > 0
    made, notes = net.adapted(weights, source.net, here.space.classes_of(source.space), null_is_trained)
    _check_shapes(net, made, source, prepared)
    differing = _differences(source, here)
    allowed = set(_allowed(differing, train))
    refused = {key: pair for key, pair in differing.items() if key not in allowed}
    if refused:
        raise UserError(_refusal(refused, train))
    changed = [f"{key} was {differing[key][0]} and is {differing[key][1]}, as allowed" for key in sorted(allowed)]
    normalization = [] if "data.space.name" in differing else here.space.notes_on(source.space)
    return made, [*notes, *normalization, *changed]


def _check_shapes(net: Backbone, weights: dict[str, Tensor], source: ModelSpec, prepared: PreparedRun) -> None:
    needed = {name: list(value.shape) for name, value in net.state_dict().items()}
    held = {name: list(value.shape) for name, value in weights.items()}
    for name in sorted(needed.keys() | held.keys()):
        if needed.get(name) != held.get(name):
            differing = {**dict(_nets(source, prepared.spec)), **_data(source, prepared.spec)}
            keys = ", ".join(f"{key} {there} there, {here} here" for key, (there, here) in differing.items())
            raise UserError(
                f"train.init_from={prepared.config.train.init_from} holds another net: {name} is "
                f"{held.get(name, 'missing')} there and {needed.get(name, 'missing')} here "
                f"({keys or 'other weights'}). Take these from there"
            )


def _nets(source: ModelSpec, here: ModelSpec) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Settings of the architecture that differ and may not; the data's part of it is the space's to compare."""
    net: Architecture = here.net
    for name in (field.name for field in fields(net) if field.name not in net.MAY_DIFFER | net.OF_THE_DATA):
        yield from _unlike(f"model.{name}", getattr(source.net, name), getattr(net, name))


def _unlike(key: str, there: Any, here: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """A value, or those of a section, key by key."""
    if is_dataclass(there) and type(there) is type(here):
        for field in fields(there):
            yield from _unlike(f"{key}.{field.name}", getattr(there, field.name), getattr(here, field.name))
    elif there != here:
        yield key, (there, here)


def _data(source: ModelSpec, here: ModelSpec) -> Differences:
    """What the samples make of the architecture, which no key sets."""
    net: Architecture = here.net
    pairs = {name: (getattr(source.net, name), getattr(net, name)) for name in sorted(net.OF_THE_DATA - net.MAY_DIFFER)}
    return {f"{name} of the data": pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _differences(source: ModelSpec, here: ModelSpec) -> Differences:
    """What the same weights mean there and here, where that is not the same."""
    method = {f"method.{key}": pair for key, pair in here.method.unlike(source.method).items()}
    return {**method, **dict(_nets(source, here)), **here.space.unlike(source.space)}


def _allowed(differing: Differences, train: TrainConfig) -> Iterator[str]:
    parts = [configs.renamed(key) for key in train.init_allow_change]
    return (key for key in differing if any(key == part or key.startswith(f"{part}.") for part in parts))


def _refusal(refused: Differences, train: TrainConfig) -> str:
    lines = "\n".join(f"  {key}: {there} there, {here} here" for key, (there, here) in refused.items())
    keys = ["data.codec" if key.startswith("data.codec.") else key for key in refused]
    settings = [f"{key}={refused[key][0]}" for key in keys if key not in _OF_THE_DATA]
    remedy = f"Train as they were trained ({' '.join(settings)})" if settings else "Take data encoded as theirs were"
    return (
        f"train.init_from={train.init_from} fits this net, but its weights mean something else:\n{lines}\n"
        f"{remedy}, or start from them nevertheless: train.init_allow_change=[{','.join(dict.fromkeys(keys))}]"
    )
