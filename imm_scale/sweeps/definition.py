"""A sweep file and the cells it means: sizes x budgets x grid x variants x seeds over any config keys."""

import dataclasses
import difflib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import UnionType
from typing import Any, get_origin, get_type_hints

import yaml

from imm_scale import build, shipped, storage
from imm_scale import config as configs
from imm_scale.choices import Passes
from imm_scale.config import twice
from imm_scale.config.schema import Config, DataConfig
from imm_scale.data.sample_order import Layout
from imm_scale.errors import UserError
from imm_scale.models.base import Architecture
from imm_scale.planner import flops
from imm_scale.planner.estimate import Data, describe_data, planned_net

DESCRIPTION = "sweep.json"
_BUDGET_UNITS = ("flops", "images")
_INCLUDE = "include"  # of a variant, which is no config key
_PLACE = ("run.dir", "run.name", "wandb.group")  # where a run lives, which does not make it another run


@dataclass(frozen=True)
class SweepFile:
    """What a sweep file may say, as written.

    Attributes:
        name: the sweep's name; the default folder is sweeps/NAME.
        description: a sentence for the report.
        folder: where its runs and results go, a path or any fsspec URL.
        configs: config files every cell starts from, relative to the sweep file.
        settings: config keys set in every cell.
        sizes: {name of a size: config keys it sets}.
        budgets: {"flops": [...]} (training multiply-adds, as in the papers) or {"images": [...]}; steps follow.
        grid: {config key: its values}; cells are the product over all keys.
        variants: {name: config keys it sets}: an axis given as a list, for keys that change together. With
            `include: [files]`, relative to the sweep file, it starts from `configs` with these laid over them.
        seeds: values of `seed`.
        hold_out: {"budgets": n, "sizes": n}: the n largest are kept out of fits and predicted instead.
    """

    name: str
    description: str = ""
    folder: str | None = None
    configs: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    budgets: dict[str, list[float]] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    hold_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: unique in the sweep, and the name of the run's folder.
        factors: what tells it from the others: size, budget, variant, seed, and the keys of the grid.
        held_out: kept out of fits.
        config: resolved.
        forward_flops: multiply-adds of one forward pass of one image.
        training_flops: multiply-adds of the whole training (4 forwards per image for IMM).
    """

    name: str
    factors: dict[str, Any]
    held_out: bool
    config: Config
    net: Architecture
    forward_flops: int
    training_flops: int

    @property
    def run_dir(self) -> str:
        """Folder of the cell's run."""
        return self.config.run_dir

    @property
    def images(self) -> int:
        """Training images of the whole run."""
        return self.config.train.max_steps * self.config.train.global_batch_size

    @property
    def parameters(self) -> int:
        """Parameters of its net."""
        counted = flops.parameters(self.net)
        return counted.total + counted.fixed


@dataclass(frozen=True)
class Sweep:
    """A sweep, resolved."""

    name: str
    description: str
    folder: str
    cells: tuple[Cell, ...]
    factors: tuple[str, ...]

    def cell(self, name: str) -> Cell:
        """Raises UserError, with the nearest name, where there is none."""
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise UserError(f"sweep {self.name} has no cell {name!r}{_nearest(name, [c.name for c in self.cells])}")


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


# --- reading ---


def load(path: str) -> Sweep:
    """The sweep of a file (*.yaml), of a sweep folder that `submit` made, or of a file that comes along, by its name.

    Raises:
        UserError: what cannot be read, unknown keys, empty axes, cells that are the same run twice, bad values.
    """
    if not path.endswith((".yaml", ".yml")) and not is_folder(path):
        path = shipped.find("sweep", path) or path
    if not path.endswith((".yaml", ".yml")):
        return _from_folder(path)
    written = read_file(path)
    return expand(written, path)


def read_file(path: str) -> SweepFile:
    """What a sweep file says, its keys and shapes checked."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            document = twice.load(file.read(), path)
    except OSError as error:
        raise UserError(f"cannot read sweep {path!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no YAML: it is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} must be a mapping with the keys of a sweep: {', '.join(_FILE_KEYS)}")
    for key in document:
        if key not in _FILE_KEYS:
            near = _nearest(str(key), _FILE_KEYS) or f"; a sweep has {', '.join(_FILE_KEYS)}"
            raise UserError(f"{path}: unknown key {key!r}{near}")
    document.setdefault("name", os.path.splitext(os.path.basename(path))[0])
    written = SweepFile(**{key: value for key, value in document.items() if value is not None})
    _check_shapes(written, path)
    return written


_FILE_KEYS = [item.name for item in dataclasses.fields(SweepFile)]


def _check_shapes(written: SweepFile, path: str) -> None:
    hints = get_type_hints(SweepFile)
    for item in dataclasses.fields(SweepFile):
        value = getattr(written, item.name)
        expected = get_origin(hints[item.name]) or str
        expected = str if expected is UnionType else expected
        if value is not None and not isinstance(value, expected):
            raise UserError(f"{path}: {item.name}={value!r} must be a {_TYPE_NAMES[expected]}")
    for axis in ("sizes", "budgets", "grid", "variants"):
        for key, values in getattr(written, axis).items():
            expected = dict if axis in ("sizes", "variants") else list
            if not isinstance(values, expected):
                raise UserError(f"{path}: {axis}.{key}={values!r} must be a {_TYPE_NAMES[expected]}")
            if values == []:
                raise UserError(f"{path}: {axis}.{key} is empty: give it at least one value or leave it out")
    _check_files(written, path)
    if not written.seeds:
        raise UserError(f"{path}: seeds is empty: give at least one seed or leave it out")
    _check_budgets(written, path)


def _check_files(written: SweepFile, path: str) -> None:
    for name, settings in written.variants.items():
        files = settings.get(_INCLUDE, [])
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            raise UserError(f"{path}: variants.{name}.{_INCLUDE}={files!r} must be a list of config files")


_TYPE_NAMES: dict[Any, str] = {dict: "mapping", list: "list", str: "text"}


def _check_budgets(written: SweepFile, path: str) -> None:
    if len(written.budgets) > 1 or any(unit not in _BUDGET_UNITS for unit in written.budgets):
        raise UserError(f"{path}: budgets={written.budgets} must be in one unit: flops: [...] or images: [...]")
    for unit, values in written.budgets.items():
        for value in values:
            # PyYAML reads 1e9 (no point) as text.
            if not re.fullmatch(r"[0-9.]+(e[+-]?[0-9]+)?", str(value)) or float(value) <= 0:
                raise UserError(f"{path}: budgets.{unit}: {value!r} must be a number above 0")
    for key, count in written.hold_out.items():
        if key not in ("budgets", "sizes"):
            raise UserError(f"{path}: hold_out.{key} is unknown; give budgets or sizes")
        if not isinstance(count, int) or not 0 <= count < max(1, len(_levels(written, key))):
            raise UserError(f"{path}: hold_out.{key}={count!r} must leave some of {len(_levels(written, key))} in")


def _levels(written: SweepFile, axis: str) -> list[Any]:
    if axis == "budgets":
        return sorted(float(value) for values in written.budgets.values() for value in values)
    return list(written.sizes)


# --- cells ---


def expand(written: SweepFile, source: str) -> Sweep:
    """All cells of a sweep file, files being relative to `source`. Raises UserError as `load`."""
    folder = written.folder or f"sweeps/{written.name}"
    start = _start(written.configs, source, "configs")  # first, for it may name plugins
    starts = {
        name: _start([*written.configs, *settings[_INCLUDE]], source, f"variants.{name}.{_INCLUDE}")
        for name, settings in written.variants.items()
        if _INCLUDE in settings
    }
    common = _flat(written.settings)
    choices = [_Choice(c.factors, {**common, **c.settings}) for c in _choices(written, source)]
    cells = [_cell(written, folder, c, starts.get(c.factors.get("variant", ""), start), source) for c in choices]
    cells = _hold_out(written, cells)
    _refuse_duplicates(cells, source)
    return Sweep(written.name, written.description, folder, tuple(cells), tuple(cells[0].factors))


def _start(files: Sequence[str], source: str, where: str) -> Config:
    """The config that files mean. Raises UserError that says where the sweep file names them."""
    try:
        return configs.unfinished([os.path.normpath(os.path.join(os.path.dirname(source), name)) for name in files])
    except UserError as error:
        raise UserError(f"{source}: {where}: {error}") from error


@dataclass(frozen=True)
class _Choice:
    """One value of every axis."""

    factors: dict[str, Any]
    settings: dict[str, Any]


def _choices(written: SweepFile, source: str) -> Iterator[_Choice]:
    axes: list[list[_Choice]] = []
    if written.sizes:
        axes.append([_Choice({"size": n}, _flat(s)) for n, s in written.sizes.items()])
    for unit, values in written.budgets.items():
        axes.append([_Choice({f"budget_{unit}": float(value)}, {}) for value in values])
    for key, values in written.grid.items():
        axes.append([_Choice({key: v}, _flat({key: v})) for v in values])
    if written.variants:
        axes.append([_Choice({"variant": n}, _flat(_without_files(s))) for n, s in written.variants.items()])
    axes.append([_Choice({"seed": seed}, {"seed": seed}) for seed in written.seeds])
    for chosen in itertools.product(*axes):
        factors = {key: value for choice in chosen for key, value in choice.factors.items()}
        yield _Choice(factors, {key: value for choice in chosen for key, value in choice.settings.items()})


def _without_files(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != _INCLUDE}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of settings that may be nested by section."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) and configs.is_section(key) else {key: value}
    return flat


def _cell(written: SweepFile, folder: str, choice: _Choice, base: Config, source: str) -> Cell:
    name = "-".join(_name_part(key, value) for key, value in choice.factors.items())
    where = f"{source}: cell {name}"
    place = {"run.name": f"{written.name}/{name}", "run.dir": _run_dir(folder, name), "wandb.group": written.name}
    budget = next(((unit, choice.factors[f"budget_{unit}"]) for unit in written.budgets), None)
    if budget is not None and "train.max_steps" in choice.settings:
        raise UserError(f"{source}: train.max_steps follows from budgets; leave one of them out")
    config = configs.changed(base, {**choice.settings, **place}, where)
    try:
        net = net_of(config)
        if budget is not None:
            config = dataclasses.replace(
                config, train=dataclasses.replace(config.train, max_steps=_steps(config, net, *budget))
            )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return _priced(name, choice.factors, config, net)


def _priced(name: str, factors: dict[str, Any], config: Config, net: Architecture, held_out: bool = False) -> Cell:
    step = _step_multiply_adds(config, net)
    forward = flops.forward_multiply_adds(net)
    return Cell(name, factors, held_out, config, net, forward, step * config.train.max_steps)


def step_passes(config: Config) -> Passes:
    """What a step costs as one rank takes it: a sweep means the same cells on any machine."""
    return _passes(config, net_of(config))


def _passes(config: Config, net: Architecture) -> Passes:
    train = config.train
    layout = Layout(train.global_batch_size, config.method.group_size, 1, train.micro_batch_size)
    return flops.step_passes(config.method, net, layout.alignment)


def _step_multiply_adds(config: Config, net: Architecture) -> int:
    return flops.training_multiply_adds(net, _passes(config, net), config.train.global_batch_size)


def _name_part(key: str, value: Any) -> str:
    """An axis' value as a part of a cell's name: letters that are safe in paths and shells."""
    if key in ("size", "variant"):
        text = str(value)
    elif key.startswith("budget_"):
        text = f"{key.removeprefix('budget_')}{value:.4g}".replace("e+", "e")
    elif key == "seed":
        text = f"seed{value}"
    else:
        text = f"{key.rpartition('.')[2]}={value}"
    return re.sub(r"[^A-Za-z0-9._=]+", "_", text).strip("_") or "_"


def _steps(config: Config, net: Architecture, unit: str, budget: float) -> int:
    batch = config.train.global_batch_size
    per_step = _step_multiply_adds(config, net) if unit == "flops" else batch
    steps = round(budget / per_step)
    if steps < 1:
        raise UserError(f"budgets.{unit}={budget:g} is less than one step of {per_step:g}: raise it or shrink the size")
    return steps


@lru_cache(maxsize=16)
def _data(
    manifest: str | None, shape: tuple[int, ...] | None, classes: int | None, vocabulary: int | None = None
) -> Data:
    """Read once for all cells."""
    known = DataConfig(manifest, latent_shape=list(shape or []) or None, num_classes=classes, vocabulary=vocabulary)
    return describe_data(Config(data=known))


def net_of(config: Config) -> Architecture:
    """The net a config means, by data.latent_shape and data.num_classes or by the manifest. Raises UserError."""
    shape = config.data.latent_shape
    known = (None if shape is None else tuple(shape), config.data.num_classes, config.data.vocabulary)
    data = _data(config.data.manifest, *known)
    return planned_net(config, data)


def _hold_out(written: SweepFile, cells: Sequence[Cell]) -> list[Cell]:
    budgets = set(_levels(written, "budgets")[-count:] if (count := written.hold_out.get("budgets", 0)) else [])
    by_flops = sorted({(cell.forward_flops, cell.factors["size"]) for cell in cells} if written.sizes else [])
    sizes = {size for _, size in by_flops[-count:]} if (count := written.hold_out.get("sizes", 0)) else set()

    def is_out(cell: Cell) -> bool:
        budget = next((v for key, v in cell.factors.items() if key.startswith("budget_")), None)
        return budget in budgets or cell.factors.get("size") in sizes

    return [dataclasses.replace(cell, held_out=is_out(cell)) for cell in cells]


def identity(cell: Cell) -> dict[str, Any]:
    """What makes a cell the run it is: its config, but for where it is written."""
    return {key: value for key, value in configs.flatten(cell.config).items() if key not in _PLACE}


def _refuse_duplicates(cells: Sequence[Cell], source: str) -> None:
    seen: dict[str, str] = {}
    names: set[str] = set()
    for cell in cells:
        key = json.dumps(identity(cell), sort_keys=True)
        if key in seen:
            raise UserError(f"{source}: cells {seen[key]} and {cell.name} are the same run: remove one of the values")
        if cell.name in names:
            raise UserError(f"{source}: two cells are named {cell.name}: their values differ too little to be told")
        seen[key] = cell.name
        names.add(cell.name)


# --- the sweep's folder ---


def write(sweep: Sweep) -> None:
    """Writes sweep.json and a config per cell; cells of the same sweep may be added to a folder, none may change.

    Raises:
        UserError: the folder holds another sweep, or other settings under a cell's name.
    """
    url = storage.join(sweep.folder, DESCRIPTION)
    old = _from_folder(sweep.folder) if storage.exists(url) else None
    old_cells = _compatible(old, sweep) if old is not None else []
    for cell in sweep.cells:
        storage.write_text(config_url(sweep.folder, cell.name), configs.to_yaml(cell.config))
    entries = [
        {"name": c.name, "factors": c.factors, "held_out": c.held_out, "net": build.describe_net(c.net)}
        for c in (*sweep.cells, *old_cells)
    ]
    document = {"name": sweep.name, "description": sweep.description, "cells": entries}
    storage.write_text(url, json.dumps(document, indent=1))


def _run_dir(folder: str, cell: str) -> str:
    return storage.join(folder, "runs", cell)


def config_url(folder: str, cell: str) -> str:
    """Where a cell's resolved config lies in the sweep's folder."""
    return storage.join(folder, "cells", f"{cell}.yaml")


def _compatible(old: Sweep, new: Sweep) -> list[Cell]:
    """The cells of the old sweep that the new one has not."""
    if old.name != new.name:
        raise UserError(
            f"{new.folder} holds the sweep {old.name!r}, not {new.name!r}: give one of them another name or folder"
        )
    before = {cell.name: cell for cell in old.cells}
    for cell in new.cells:
        was = identity(before[cell.name]) if cell.name in before else identity(cell)
        now = identity(cell)
        changed = [f"{key}: {was[key]} -> {now[key]}" for key in now if was[key] != now[key]]
        if changed:
            raise UserError(
                f"{new.folder} holds another sweep under the same name: cell {cell.name} has {'; '.join(changed)}. "
                "Give the changed sweep another name or folder"
            )
    names = {cell.name for cell in new.cells}
    return [cell for cell in old.cells if cell.name not in names]


def is_folder(path: str) -> bool:
    """Whether a folder holds a sweep."""
    return storage.exists(storage.join(path, DESCRIPTION))


def _from_folder(folder: str) -> Sweep:
    if not is_folder(folder):
        raise UserError(
            f"{folder} is neither a sweep file (*.yaml) nor the folder of a sweep (it has no {DESCRIPTION}) nor a "
            f"shipped sweep: {shipped.known('sweep', folder)}"
        )
    document = json.loads(storage.read_text(storage.join(folder, DESCRIPTION)))
    cells = []
    for entry in document["cells"]:
        name = entry["name"]
        config = configs.from_yaml(storage.read_text(config_url(folder, name)))
        # The folder may have been moved since it was made.
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=_run_dir(folder, name)))
        cells.append(_priced(name, entry["factors"], config, build.read_net(entry["net"]), entry["held_out"]))
    return Sweep(document["name"], document["description"], folder, tuple(cells), tuple(cells[0].factors))
