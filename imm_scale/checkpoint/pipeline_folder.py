"""A model as a folder that diffusers loads with imm_scale nowhere near: `DiffusionPipeline.from_pretrained(FOLDER)`.

    model_index.json                 the pipeline's class and components
    pipeline.py                      the samplers
    transformer/                     flow_map_transformer.py, config.json, diffusion_pytorch_model.safetensors
    vae/                             the autoencoder, where one was given
    imm_scale.json                   the model's spec and what its weights are, for `read`

The two .py files are those of `standalone/`, byte for byte.
"""

import importlib.resources
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from typing import Any

from imm_scale import build, storage
from imm_scale.build import ModelSpec
from imm_scale.data import codec as codecs
from imm_scale.data.spaces import Latents
from imm_scale.errors import UserError
from imm_scale.methods.base import FlowMapMethod
from imm_scale.models.dit import DiTConfig
from imm_scale.models.layers import time_frequencies
from imm_scale.registry import METHODS, SPACES

INDEX = "model_index.json"
RECORD = "imm_scale.json"
TRANSFORMER = "transformer"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# The oldest diffusers that loads a pipeline with code of its own from a folder; see [project.optional-dependencies].
_DIFFUSERS_VERSION = "0.34.0"
_STANDALONE = "imm_scale.checkpoint.standalone"
# What the standalone code knows: of each setting its values, or None for any.
_NET = dict.fromkeys(("width", "depth", "heads", "patch_size", "mlp_ratio", "qk_norm", "second_time", "guidance"))
_NET |= dict.fromkeys(("channels", "height", "image_width", "num_classes", "time_embedding"))
_NET |= dict.fromkeys(("dropout", "attention"))  # of which samples do not depend
_CODEC: dict[str, Any] = dict.fromkeys(("weights_hash", "channels", "factor", "mean", "std"))
_CODEC |= dict.fromkeys(("image_size", "image_width"))  # follow from height, width and factor
_CODEC |= dict.fromkeys(("moments", "scale", "shift"))  # how shards hold the samples
_CODEC |= {"kind": ("pixels", "vae"), "pixel_range": ("signed", "unit")}
_FLOW_MAP = {
    "parameterization": ("identity", "simple_edm", "euler_fm", "velocity", "epsilon"),
    "trajectory": ("ot_fm", "vp_cosine"),
    "second_time": ("s", "t_minus_s", "none"),
    "time_input": ("t", "ddpm_step"),
    "time_scale": None,
}
_UNIFORM_STEPS = (1, *range(3, 17))  # step counts looked at


def check(spec: ModelSpec) -> None:
    """Raises UserError for a model that the pipeline's code does not know, naming what it is of the model."""
    unknown = _unknown(spec)
    if unknown:
        raise UserError(
            f"a diffusers pipeline has no code for {' nor for '.join(unknown)}, so it cannot be exported as one: "
            "leave --format diffusers out, a .safetensors file holds any model"
        )


def _unknown(spec: ModelSpec) -> list[str]:
    unknown = []
    if type(spec.net) is DiTConfig:
        unknown += _unknown_settings("model", spec.net, _NET)
    else:
        unknown.append(f"the backbone {build.describe_net(spec.net)['name']!r}")
    if type(spec.space) is Latents:
        unknown += _unknown_settings("codec", spec.space.codec, _CODEC)
    else:
        unknown.append(f"the sample space {SPACES.name_of(type(spec.space))!r}")
    method: Any = METHODS.get(spec.method.name)
    same = issubclass(method, FlowMapMethod) and all(
        getattr(method, name) is getattr(FlowMapMethod, name) for name in ("wrap", "grid", "sample")
    )
    if not same or any(build.method(spec).default_grid(steps) != "uniform" for steps in _UNIFORM_STEPS):
        return [*unknown, f"the method {spec.method.name!r}"]
    return unknown + _unknown_settings("method.flow_map", spec.method.flow_map, _FLOW_MAP)


def _unknown_settings(section: str, settings: Any, known: Mapping[str, Collection[Any] | None]) -> list[str]:
    """Settings of a dataclass, as "section.key=value", that the standalone code would not heed."""
    values, defaults = asdict(settings), {field.name: field.default for field in fields(settings)}
    new = [key for key in values if key not in known and values[key] != defaults[key]]
    other = [key for key, choices in known.items() if choices is not None and values[key] not in choices]
    return [f"{section}.{key}={values[key]}" for key in (*new, *other)]


def transformer_config(spec: ModelSpec) -> dict[str, Any]:
    """The arguments of `FlowMapTransformer` for a model that `check` lets pass."""
    net, space, method, flow_map = spec.net, spec.space, spec.method, spec.method.flow_map
    fourier = net.time_embedding != "positional"
    return {
        **{key: getattr(net, key) for key in ("width", "depth", "heads", "patch_size", "mlp_ratio", "qk_norm")},
        **{key: getattr(net, key) for key in ("channels", "height", "image_width", "num_classes")},
        "unconditional": method.label_drop > 0,
        "trajectory": flow_map.trajectory,
        "parameterization": flow_map.parameterization,
        "second_time": flow_map.second_time,
        "time_scale": flow_map.time_scale,
        "time_input": flow_map.time_input,
        "frequencies": time_frequencies(net.time_embedding).tolist() if fourier else None,
        "largest_guidance": method.guidance.largest if net.guidance else None,
        "t_min": method.t_min,
        "t_max": method.t_max,
        "two_step_grid": build.method(spec).default_grid(2),
        "sigma_data": space.sigma_data,
        "mean": list(space.codec.mean),
        "std": list(space.codec.std),
        "codec": space.codec.kind,
        "pixel_range": space.codec.pixel_range,
    }


def files(spec: ModelSpec, origin: dict[str, Any], has_vae: bool) -> dict[str, str]:
    """{path in the folder: text} of all but weights, in the order to write them: `RECORD` last.

    Args:
        origin: what the weights are, as JSON takes it.
        has_vae: whether the folder has an autoencoder of its own.
    """
    version = {"_diffusers_version": _DIFFUSERS_VERSION}
    config = {"_class_name": "FlowMapTransformer", **version, **transformer_config(spec)}
    index = {
        "_class_name": ["pipeline", "FlowMapPipeline"],
        **version,
        "transformer": ["flow_map_transformer", "FlowMapTransformer"],
        "vae": ["diffusers", "AutoencoderKL"] if has_vae else [None, None],
        "guide": [None, None],
    }
    record = {"spec": json.loads(spec.to_json()), "weights": origin}
    code = importlib.resources.files(_STANDALONE)
    return {
        "pipeline.py": code.joinpath("pipeline.py").read_text(),
        f"{TRANSFORMER}/flow_map_transformer.py": code.joinpath("flow_map_transformer.py").read_text(),
        f"{TRANSFORMER}/config.json": _json(config),
        INDEX: _json(index),
        RECORD: _json(record),
    }


def write_vae(spec: ModelSpec, vae: str, out: str) -> None:
    """Copies the autoencoder of a model's latents, config and weights, into OUT/vae.

    Raises:
        UserError: a model that has none, or weights other than those that encoded its data.
    """
    if spec.space.codec.kind != "vae":
        raise UserError(f"--vae {vae}: this model draws pixels, which no autoencoder decodes: leave it out")
    codec = codecs.open_codec(spec.space.codec, vae)
    assert isinstance(codec, codecs.VAECodec)
    for name in ("config.json", WEIGHTS):
        with open(os.path.join(codec.folder, name), "rb") as file:
            storage.write_bytes(storage.join(out, "vae", name), file.read())


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2) + "\n"
