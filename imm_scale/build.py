"""From words to objects: what a config and a manifest say, as the net, the flow map and the objective they mean."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from imm_scale.config.schema import Config
from imm_scale.data.manifest import Codec, Manifest
from imm_scale.errors import UserError
from imm_scale.methods import imm_times, probability_path
from imm_scale.methods.base import Objective
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.flow_matching import FlowMatching
from imm_scale.methods.imm import InductiveMomentMatching
from imm_scale.methods.special_cases import ConsistencyTraining, GenerativeMomentMatching
from imm_scale.models.dit import DiT, DiTConfig, size_config

SPEC_VERSION = 1


@dataclass(frozen=True)
class ModelSpec:
    """All one needs beside the weights to sample: it travels in every checkpoint and exported file."""

    objective: str
    trajectory: str
    parameterization: str
    second_time: str
    sigma_data: float
    time_scale: float
    t_min: float
    t_max: float
    label_drop: float
    net: DiTConfig
    codec: Codec
    class_names: tuple[str, ...]
    version: int = SPEC_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        """Raises UserError for a spec of a newer version."""
        fields: dict[str, Any] = json.loads(text)
        if fields["version"] > SPEC_VERSION:
            raise UserError(
                f"the weights were written by a newer imm-scale (spec version {fields['version']}); update it"
            )
        fields["net"] = DiTConfig(**fields["net"])
        fields["codec"] = Codec(
            **{**fields["codec"], "mean": tuple(fields["codec"]["mean"]), "std": tuple(fields["codec"]["std"])}
        )
        fields["class_names"] = tuple(fields["class_names"])
        return cls(**fields)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.net.channels, self.net.height, self.net.image_width


def model_spec(config: Config, manifest: Manifest) -> ModelSpec:
    """Raises UserError where the net does not fit the manifest's latents."""
    flow_map, objective = config.flow_map, config.objective
    return ModelSpec(
        objective=objective.name,
        trajectory=flow_map.trajectory,
        parameterization=flow_map.parameterization,
        second_time=flow_map.second_time,
        sigma_data=flow_map.sigma_data,
        time_scale=flow_map.time_scale,
        t_min=objective.t_min,
        t_max=resolved_t_max(config),
        label_drop=objective.label_drop,
        net=net_config(config, manifest.latent_shape, manifest.num_classes),
        codec=manifest.codec,
        class_names=tuple(manifest.class_names),
    )


def net_config(config: Config, latent_shape: tuple[int, int, int], num_classes: int) -> DiTConfig:
    """The net for latents of (C, H, W). Raises UserError where it does not fit them."""
    model = config.model
    channels, height, width = latent_shape
    given = {key: getattr(model, key) for key in ("width", "depth", "heads", "patch_size")}
    return size_config(
        model.size,
        **{key: value for key, value in given.items() if value is not None},
        channels=channels,
        height=height,
        image_width=width,
        num_classes=num_classes,
        mlp_ratio=model.mlp_ratio,
        qk_norm=model.qk_norm,
        dropout=model.dropout,
        attention=model.attention,
        time_embedding=config.flow_map.time_embedding,
        second_time=config.flow_map.second_time != "none",
    )


def resolved_t_max(config: Config) -> float:
    if config.objective.t_max is not None:
        return config.objective.t_max
    return 1.0 if config.objective.name == "flow_matching" else imm_times.T_MAX[config.flow_map.trajectory]


def resolved_min_gap(config: Config) -> float:
    gap = config.objective.min_gap
    return imm_times.default_min_gap(config.precision) if gap is None else gap


def flow_map(spec: ModelSpec, seed: int = 0) -> FlowMap:
    """A freshly initialized flow map; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DiT(spec.net)
    return FlowMap(
        net,
        probability_path.build(spec.trajectory),
        spec.parameterization,
        spec.second_time,
        spec.sigma_data,
        spec.time_scale,
        net.null_label if spec.label_drop > 0 else None,
    )


def objective(config: Config) -> Objective:
    """The training loss the config names."""
    o = config.objective
    common: dict[str, Any] = {
        "t_min": o.t_min,
        "t_max": resolved_t_max(config),
        "label_drop": o.label_drop,
        "dropout": config.model.dropout > 0,
        "particles": o.particles,
    }
    if o.name == "flow_matching":
        return FlowMatching(**common)
    kinds: dict[str, type[InductiveMomentMatching]] = {
        "imm": InductiveMomentMatching,
        "consistency": ConsistencyTraining,
        "gmmn": GenerativeMomentMatching,
    }
    return kinds[o.name](
        **common,
        k=o.k,
        min_gap=resolved_min_gap(config),
        mapping=o.mapping,
        eta_max=o.eta_max,
        eta_min=o.eta_min,
        kernel=o.kernel,
        a=o.a,
        b=o.b,
        weight_factors=tuple(o.weight_factors),
    )
