"""From names to objects: the sample space, the backbone and the method that a config and a manifest mean."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from omegaconf import OmegaConf

from imm_scale.config.schema import Config
from imm_scale.data.manifest import Manifest
from imm_scale.data.spaces import SampleSpace
from imm_scale.errors import UserError
from imm_scale.methods.base import Method
from imm_scale.models.base import Architecture
from imm_scale.registry import BACKBONES, METHODS, SPACES, Registry

SPEC_VERSION = 2


@dataclass(frozen=True)
class ModelSpec:
    """All one needs beside the weights to sample: it travels in every checkpoint and exported file.

    Attributes:
        method: with nothing left open (`MethodConfig.resolved`).
    """

    method: Any
    net: Any
    space: Any

    def to_json(self) -> str:
        """Every part by its name, with the module that registered it."""
        return json.dumps(
            {
                "version": SPEC_VERSION,
                "method": _part(METHODS, METHODS.get(self.method.name), asdict(self.method)),
                "backbone": describe_net(self.net),
                "space": _part(SPACES, type(self.space), self.space.to_fields()),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        """Raises UserError for a spec of a newer version, or of a plugin that is not there."""
        fields: dict[str, Any] = json.loads(text)
        if fields["version"] > SPEC_VERSION:
            raise UserError(
                f"the weights were written by a newer imm-scale (spec version {fields['version']}); update it"
            )
        if fields["version"] == 1:
            fields = _from_version_1(fields)
        method, backbone, space = (fields[part] for part in ("method", "backbone", "space"))
        config = _class_of(METHODS, method).Config
        return cls(
            OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config), method["config"])),
            read_net(backbone),
            _class_of(SPACES, space).from_fields(space["config"]),
        )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample as the net sees it, such as (C, H, W)."""
        return self.space.shape


def _part(registry: Registry, cls: type, config: dict[str, Any]) -> dict[str, Any]:
    return {"name": registry.name_of(cls), "module": cls.__module__, "config": config}


def _backbone_of(net: Architecture) -> type:
    return next(cls for cls in map(BACKBONES.get, BACKBONES.names()) if cls.Architecture is type(net))  # type: ignore[attr-defined]


def _class_of(registry: Registry, part: Mapping[str, Any]) -> Any:
    try:
        return registry.get(part["name"])
    except UserError as error:
        raise UserError(
            f"the weights belong to the {registry.kind} {part['name']!r}, which the module {part['module']} registers: "
            f"plugins=[{part['module']}]"
        ) from error


def _from_version_1(old: Mapping[str, Any]) -> dict[str, Any]:
    """What version 0.1 wrote: one method of four around a DiT on latents."""
    flow_map = {key: old[key] for key in ("trajectory", "parameterization", "second_time", "time_scale")}
    method = {"name": old["objective"], "flow_map": flow_map, **{k: old[k] for k in ("t_min", "t_max", "label_drop")}}
    net = old["net"]
    space = {
        "sigma_data": old["sigma_data"],
        "shape": [net["channels"], net["height"], net["image_width"]],
        "codec": old["codec"],
        "num_classes": net["num_classes"],
        "class_names": old["class_names"],
    }
    return {
        "method": {"name": old["objective"], "config": method},
        "backbone": {"name": "dit", "config": net},
        "space": {"name": "latents", "config": space},
    }


def space(config: Config, manifest: Manifest) -> SampleSpace:
    """The sample space of a data set."""
    return SPACES.get(config.data.space.name).of(config.data.space, manifest)  # type: ignore[attr-defined]


def model_spec(config: Config, manifest: Manifest) -> ModelSpec:
    """Raises UserError where the net does not fit the manifest's samples."""
    where = space(config, manifest)
    return ModelSpec(config.method.resolved(config.precision), architecture(config, where), where)


def architecture(config: Config, where: SampleSpace) -> Any:
    """The net for a sample space. Raises UserError where it does not fit, or cannot be told what the method tells."""
    backbone: Any = BACKBONES.get(config.model.name)
    if not config.method.tells_guidance:
        return backbone.architecture(config.model, where, config.method.has_second_time)
    if not backbone.CAN_TAKE_GUIDANCE:
        raise UserError(
            f"model.name={config.model.name} cannot be told its guidance, as method.guidance.kind=condition wants: use "
            "method.guidance.kind=fixed, or model.name=dit"
        )
    return backbone.architecture(config.model, where, config.method.has_second_time, guidance=True)


def method(spec: ModelSpec) -> Method:
    """The method of a model."""
    instance: Method = METHODS.get(spec.method.name)(spec.method)
    return instance


def net(spec: ModelSpec, seed: int = 0) -> Any:
    """A freshly initialized net, as the method wraps it; the same weights for the same seed. Raises UserError."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = spec.net.build()
    return method(spec).wrap(backbone, spec.space)


def describe_net(net: Architecture) -> dict[str, Any]:
    """An architecture as plain values, for `read_net`."""
    return _part(BACKBONES, _backbone_of(net), asdict(net))


def read_net(fields: Mapping[str, Any]) -> Any:
    """The architecture `describe_net` described, or version 0.1, which knew the DiT alone. Raises UserError."""
    part: Mapping[str, Any] = fields if "config" in fields else {"name": "dit", "config": fields}
    return _class_of(BACKBONES, part).Architecture(**part["config"])
