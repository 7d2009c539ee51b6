"""A Hugging Face folder on this machine: its net and its tokenizer, from safetensors alone.

Nothing is fetched, nothing is unpickled, and no code that comes with a model is run.
"""

import json
import os
from typing import Any

import torch

from imm_scale import precision
from imm_scale.errors import UserError

_KINDS = {"ForMaskedLM": "masked", "ForCausalLM": "causal", "LMHeadModel": "causal"}
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_SHOWN = 3  # weights named in a message


def is_folder(name: str) -> bool:
    """Whether there is a folder of that name."""
    return os.path.isdir(name)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"models in Hugging Face folders need transformers ({error}): pip install 'imm-scale[hf]'"
        ) from error
    return transformers


def _described(folder: str, file: str) -> dict[str, Any]:
    """A JSON file of the folder. Raises UserError where there is none."""
    try:
        with open(os.path.join(folder, file), encoding="utf-8") as opened:
            found = json.load(opened)
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {file}: name a folder written by save_pretrained") from error
    except ValueError as error:
        raise UserError(f"{os.path.join(folder, file)} is no JSON ({error}): get it again") from error
    return dict(found)


def kind(folder: str) -> str:
    """masked or causal, by the class that config.json names. Raises UserError for others."""
    architectures = _described(folder, "config.json").get("architectures") or []
    for ending, found in _KINDS.items():
        if architectures and architectures[0].endswith(ending):
            return found
    raise UserError(f"{folder}: its config.json names {architectures}, and no model {' or '.join(_KINDS)}")


def load(folder: str, computed: str, device: torch.device) -> Any:
    """The model in evaluation mode, on the device, in fp32 or the precision it computes in.

    Raises:
        UserError: no transformers, no safetensors, or weights that the folder lacks and that would be random.
    """
    masked = kind(folder) == "masked"
    if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
        raise UserError(
            f"{folder} has no .safetensors, and other files are not unpickled: convert it where you trust it"
        )
    transformers = _transformers()
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    dtype = precision.HALF.get(computed, torch.float32)
    try:
        model, info = auto.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **_LOCAL
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: transformers cannot load it{_own_code(folder)}: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        shown = ", ".join(missing[:_SHOWN])
        raise UserError(
            f"{folder} lacks {len(missing)} weights ({shown}), as a model without its head does: save it with its head"
        )
    return model.to(device).eval()


def _own_code(folder: str) -> str:
    if "auto_map" not in _described(folder, "config.json"):
        return ""
    return " without the Python code in it, which is not run (import the model yourself, and give MODULE:CALLABLE)"


def tokenizer(folder: str) -> Any:
    """The tokenizer of a folder. Raises UserError where there is none."""
    _described(folder, "tokenizer_config.json")
    try:
        return _transformers().AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: transformers cannot load its tokenizer: {error}") from error


def has_tokenizer(folder: str) -> bool:
    """Whether the folder has a tokenizer beside the model."""
    return os.path.isfile(os.path.join(folder, "tokenizer_config.json"))
