"""Names of methods, backbones, sample spaces and metrics, and the plugins that add to them.

What comes with the package is registered the same way as what does not: by importing a module.
"""

import difflib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from imm_scale.choices import BackboneConfig, Choice, MethodConfig, MetricConfig, SpaceConfig
from imm_scale.errors import UserError

BUILT_IN = (
    *("imm_scale.methods", "imm_scale.models", "imm_scale.data.spaces", "imm_scale.data.tokens.spaces"),
    "imm_scale.evaluation.metrics",
)
ENTRY_POINTS = "imm_scale.plugins"

Class = TypeVar("Class", bound=type)


class Registry:
    """Classes of one kind by name.

    Args:
        kind: in the field's words, for messages.
        section: the config section that chooses one.
        config: what the `Config` of each class derives from.
        parts: attributes that each class must have, its protocol.
    """

    def __init__(self, kind: str, section: str, config: type[Choice], parts: Sequence[str]):
        self.kind, self.section = kind, section
        self._config, self._parts = config, parts
        self._classes: dict[str, type] = {}

    def add(self, name: str, cls: Class) -> Class:
        """Raises UserError for a taken name, or a class that lacks a part of the protocol."""
        existing = self._classes.get(name)
        if existing is not None and (existing.__module__, existing.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UserError(
                f"{cls.__module__} registers the {self.kind} {name!r}, a name of {existing.__module__}: choose another"
            )
        config = getattr(cls, "Config", None)
        if not (isinstance(config, type) and issubclass(config, self._config)):
            raise UserError(
                f"{cls.__module__}: the {self.kind} {name!r} ({cls.__name__}) needs a Config, a frozen dataclass "
                f"derived from imm_scale.choices.{self._config.__name__}"
            )
        missing = [part for part in self._parts if _is_missing(cls, part)]
        if missing:
            raise UserError(f"{cls.__module__}: the {self.kind} {name!r} ({cls.__name__}) lacks {', '.join(missing)}")
        self._classes[name] = cls
        return cls

    def get(self, name: str) -> type:
        """The class of that name. Raises UserError for an unknown one, with the nearest."""
        load_built_in()
        if name not in self._classes:
            nearest = difflib.get_close_matches(name, self._classes, n=1, cutoff=0.5)
            meant = f", did you mean {nearest[0]}?" if nearest else ";"
            raise UserError(
                f"the {self.kind} {name!r} is unknown{meant} there are {', '.join(sorted(self._classes))}. "
                "One of your own is registered by a module: plugins=[MODULE]"
            )
        return self._classes[name]

    def config(self, name: str) -> type[Choice]:
        """The Config of the class of that name."""
        return self.get(name).Config  # type: ignore[attr-defined]

    def name_of(self, cls: type) -> str:
        """The name under which a class is registered."""
        return next(name for name, known in self._classes.items() if known is cls)

    def names(self) -> list[str]:
        """All registered names."""
        load_built_in()
        return list(self._classes)


def _is_missing(cls: type, part: str) -> bool:
    """Not there at all, or still abstract."""
    return not hasattr(cls, part) or getattr(getattr(cls, part), "__isabstractmethod__", False)


METHODS = Registry("method", "method", MethodConfig, ("wrap", "grid", "sample", "loss"))
BACKBONES = Registry("backbone", "model", BackboneConfig, ("Architecture", "architecture"))
SPACES = Registry(
    "sample space", "data.space", SpaceConfig, ("of", "from_fields", "prior", "from_stored", "artifacts", "provenance")
)
METRICS = Registry("metric", "evaluation.metrics", MetricConfig, ("needs", "higher_is_better", "measure"))
REGISTRIES = {registry.section: registry for registry in (METHODS, BACKBONES, SPACES, METRICS)}


def register_method(name: str) -> Callable[[Class], Class]:
    """A class decorator: makes a method of the protocol in `imm_scale.methods.base` known under a name.

    Raises:
        UserError: a taken name, or a class that lacks a part of the protocol.
    """
    return lambda cls: METHODS.add(name, cls)


def register_backbone(name: str) -> Callable[[Class], Class]:
    """A class decorator: makes a backbone of the protocol in `imm_scale.models.base` known under a name.

    Raises:
        UserError: a taken name, or a class that lacks a part of the protocol.
    """
    return lambda cls: BACKBONES.add(name, cls)


def register_space(name: str) -> Callable[[Class], Class]:
    """A class decorator: makes a sample space of the protocol in `imm_scale.data.spaces` known under a name.

    Raises:
        UserError: a taken name, or a class that lacks a part of the protocol.
    """
    return lambda cls: SPACES.add(name, cls)


def register_metric(name: str) -> Callable[[Class], Class]:
    """A class decorator: makes a metric of the protocol in `imm_scale.evaluation.metrics` known under a name.

    Raises:
        UserError: a taken name, or a class that lacks a part of the protocol.
    """
    return lambda cls: METRICS.add(name, cls)


_is_loaded = False


def load_built_in() -> None:
    """Imports what comes with the package and what installed packages offer under the entry point group, once."""
    global _is_loaded
    if not _is_loaded:
        _is_loaded = True  # first, for what is imported asks for names itself
        for module in BUILT_IN:
            importlib.import_module(module)
        load_plugins(entry.value for entry in importlib.metadata.entry_points(group=ENTRY_POINTS))


def load_plugins(modules: Iterable[str]) -> None:
    """Imports modules that register their own. Raises UserError for one that does not import."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"plugins: {module} does not import ({error}): give an installed module, or one on PYTHONPATH"
            ) from error
