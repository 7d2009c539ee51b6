"""MODEL of `imm-scale profile`: a callable of a module, or a Hugging Face folder, as a scorer."""

import hashlib
import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imm_scale.errors import UserError
from imm_scale.evaluation.foreign import hugging_face
from imm_scale.evaluation.foreign.logits import Caller, CausalLogits, MaskedLogits


@dataclass(frozen=True)
class Chosen:
    """What the user says of the model.

    Attributes:
        model: MODULE:CALLABLE or a folder.
        mask, begin: ids, where the model or its tokenizer has none or another is meant.
        causal: that a callable is a causal model; of a folder its config says so.
        batch: sequences at once.
    """

    model: str
    mask: int | None
    begin: int | None
    causal: bool
    precision: str
    batch: int

    @property
    def is_folder(self) -> bool:
        """Whether it is a Hugging Face folder."""
        return hugging_face.is_folder(self.model)

    @property
    def kind(self) -> str:
        """masked or causal. Raises UserError for what is neither a folder nor MODULE:CALLABLE."""
        if not self.is_folder:
            if ":" not in self.model:
                raise UserError(f"{self.model} is no folder here: give one, or MODULE:CALLABLE as my_models:net")
            return "causal" if self.causal else "masked"
        found = hugging_face.kind(self.model)
        if self.causal and found == "masked":
            raise UserError(f"--causal: {self.model} is a masked model by its config.json; leave --causal out")
        return found


def check(chosen: Chosen) -> None:
    """Raises UserError for flags that the kind of model does not have, and for ids that are none."""
    for name, one in (("mask", chosen.mask), ("begin", chosen.begin)):
        if one is not None and one < 0:
            raise UserError(f"--{name} {one}: ids are 0 or more")
    if os.path.exists(os.path.join(chosen.model, "config.yaml")):
        raise UserError(f"{chosen.model} is a run of imm-scale, whose profile imm-scale evaluate {chosen.model} writes")
    if chosen.kind == "causal" and chosen.mask is not None:
        raise UserError(f"--mask {chosen.mask}: a causal model has no mask; leave it out")
    if chosen.kind == "masked" and chosen.begin is not None:
        raise UserError(f"--begin {chosen.begin} is for a causal model: leave it out, or add --causal")


def open_model(chosen: Chosen, device: torch.device) -> MaskedLogits | CausalLogits:
    """The model as a scorer. Raises UserError."""
    check(chosen)
    net = _folder_net(chosen, device) if chosen.is_folder else _callable_net(chosen.model, device)
    call = Caller(net, chosen.model, device, chosen.precision, chosen.batch)
    tokenizer = hugging_face.tokenizer(chosen.model) if _has_tokenizer(chosen) else None
    if chosen.kind == "causal":
        return CausalLogits(call, _first_of(chosen.begin, getattr(tokenizer, "bos_token_id", None)))
    mask = _first_of(chosen.mask, getattr(net, "mask_id", None), getattr(tokenizer, "mask_token_id", None))
    if mask is None:
        raise UserError(f"{chosen.model} does not say which id is its mask: give --mask ID")
    return MaskedLogits(call, mask, _one(tokenizer, "cls_token_id"), _one(tokenizer, "sep_token_id"))


def _has_tokenizer(chosen: Chosen) -> bool:
    return chosen.is_folder and hugging_face.has_tokenizer(chosen.model)


def _first_of(*ids: int | None) -> int | None:
    return next((one for one in ids if one is not None), None)


def _one(tokenizer: Any, name: str) -> tuple[int, ...]:
    found = getattr(tokenizer, name, None)
    return () if found is None else (int(found),)


def _folder_net(chosen: Chosen, device: torch.device) -> Callable[[Tensor], Tensor]:
    model = hugging_face.load(chosen.model, chosen.precision, device)

    def net(token_NT: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=token_NT).logits
        return logits

    return net


def _callable_net(name: str, device: torch.device) -> Any:
    """The callable; a module moves to the device. Raises UserError where there is none."""
    module_name, _, attribute = name.partition(":")
    try:
        net = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise UserError(
            f"{name}: {module_name} does not import ({error}): give an installed module, or one on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise UserError(f"{name}: {module_name} has no {attribute}") from error
    if not callable(net) or inspect.isclass(net):
        raise UserError(f"{name} is {type(net).__name__}: give a function of tokens, or a module that is made already")
    return net.to(device).eval() if isinstance(net, torch.nn.Module) else net


def identity(chosen: Chosen) -> str:
    """A hash of a folder's weights and config, or of the file a callable is from; its weights only the scores know."""
    digest = hashlib.sha256(chosen.model.encode())
    for path in _files(chosen):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _files(chosen: Chosen) -> list[str]:
    if chosen.is_folder:
        names = sorted(os.listdir(chosen.model))
        return [os.path.join(chosen.model, name) for name in names if name.endswith((".safetensors", ".json"))]
    found = importlib.import_module(chosen.model.partition(":")[0]).__file__
    return [found] if found is not None else []
