"""Where a diffusers AutoencoderKL lies, and loading it whole or not at all."""

import hashlib
import json
import os
import re
from typing import Any

import torch

from imm_scale.errors import UserError, explain_lfs_pointer

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_CONFIG = "config.json"
_CLASS = "AutoencoderKL"
_SHOWN = 3  # tensors named in a message


def local_folder(name: str) -> str:
    """The folder on this machine with the weights that FOLDER, OWNER/NAME, or either with :SUBFOLDER means.

    Raises:
        UserError: no such folder, name or weights.
    """
    base, _, inside = (name, "", "") if os.path.isdir(name) else name.partition(":")
    if not os.path.isdir(base) and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        base = _from_hub(base, inside)
    folder = os.path.join(base, inside) if inside else base
    if not os.path.isfile(os.path.join(folder, _WEIGHTS)):
        raise UserError(
            f"no {os.path.join(folder, _WEIGHTS)}: --vae must name a folder written by AutoencoderKL.save_pretrained"
            + ("" if inside else f"; where that lies inside a pipeline, as {name}:vae")
        )
    return folder


def _from_hub(name: str, inside: str) -> str:
    """The local copy of a model on the hub, or of one folder of it, downloaded where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = [f"{inside}/{file}" if inside else file for file in ("config.json", _WEIGHTS)]
    try:
        return str(snapshot_download(name, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        cause = "no network, or HF_HUB_OFFLINE is set, and its cache has no copy" if offline else type(error).__name__
        raise UserError(
            f"{name} is no folder here, and it cannot be had from the hub ({cause}): check the name and "
            "the network, or download it elsewhere and name its folder"
        ) from error


def weights_hash(folder: str) -> str:
    """sha256 of the weights."""
    with open(os.path.join(folder, _WEIGHTS), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(folder: str) -> Any:
    """The model in fp32, with every tensor from its file.

    Raises:
        UserError: diffusers missing, a model of another class, or files that are damaged or do not belong together.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(f"the vae codec needs diffusers ({error}): pip install 'imm-scale[vae]'") from error
    _check_config(os.path.join(folder, _CONFIG))
    weights = os.path.join(folder, _WEIGHTS)
    _check_weights(weights)
    options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}  # as is, and without warnings
    try:
        model, report = AutoencoderKL.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = "; ".join(lines[:2]) or type(error).__name__
        raise UserError(
            f"{folder} holds no {_CLASS} that can be loaded ({reason}): its {_CONFIG} and {_WEIGHTS} are damaged or do "
            "not belong together, copy both again"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:  # diffusers draws them at random, and goes on
        raise UserError(
            f"{weights} lacks {len(missing)} tensors of the {_CLASS} that {_CONFIG} describes, such as "
            f"{', '.join(missing[:_SHOWN])}: the two do not belong together, copy both again"
        )
    return model


def _check_config(path: str) -> None:
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except FileNotFoundError as error:
        raise UserError(f"no {path}: --vae must name a folder written by {_CLASS}.save_pretrained") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): copy it again") from error
    kind = config.get("_class_name", _CLASS) if isinstance(config, dict) else None
    if kind != _CLASS:
        said = f"is of class {kind}" if kind else "describes no model"
        raise UserError(f"{path} {said}: --vae must name a folder written by {_CLASS}.save_pretrained")


def _check_weights(path: str) -> None:
    with open(path, "rb") as file:
        pointer = explain_lfs_pointer(file.read(64))
    if pointer is not None:
        raise UserError(f"{path} is {pointer}")
