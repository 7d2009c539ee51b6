"""Networks as feature extractors: a TorchScript or ONNX file, named by its sha256.

They compute in fp32, in whatever precision samples are drawn.
"""

import dataclasses
import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from imm_scale import storage
from imm_scale.config.schema import ExtractorConfig
from imm_scale.errors import UserError
from imm_scale.evaluation.extractors import (
    Extractor,
    Flat,
    Output,
    Preprocessing,
    identity_hash,
    identity_of,
    preprocessing,
)
from imm_scale.precision import computing

# The Inception network of published FIDs (Heusel et al., arXiv 1706.08500), 2015-12-05, as TorchScript: the file
# inception-2015-12-05.pt that StyleGAN2-ADA and EDM measure with. It resizes inside and takes 0..255.
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
_INCEPTION_FEATURES = {"return_features": True}
_INCEPTION_PROBABILITIES = {"no_output_bias": True}
_INCEPTION_INPUT = Preprocessing(channels=3, dtype="uint8")
INCEPTION_IDENTITY = identity_of(
    _INCEPTION_INPUT, kind="torchscript", sha256=INCEPTION_SHA256, arguments=_INCEPTION_FEATURES
)
STANDARD_ID = identity_hash(INCEPTION_IDENTITY)  # of the one extractor whose Frechet distance is called FID
# Channels of spatial features that sFID compares: 7 of 17 x 17 places are 2,023 numbers, about the 2,048 of FID
# (Nash et al., arXiv 2103.03841; guided-diffusion's evaluations/evaluator.py takes the first 7 of mixed_6/conv).
SPATIAL_CHANNELS = 7


_OF_FLAT = ("kind", "max_dim")  # keys that latents and pixels read


def check(config: ExtractorConfig, typed: Collection[str] = ()) -> None:
    """Before anything is read, or a job waits in a queue.

    Args:
        typed: keys that were given for this command. One that only chooses another kind than a run's config has takes
            leave of what stands there.

    Raises:
        UserError: a network without its file and sha256, or keys that do nothing with latents and pixels.
    """
    if config.kind not in ("latents", "pixels"):
        _file_of(config)
        return
    kind_is_typed = "evaluation.extractor.kind" in typed
    for item in dataclasses.fields(config):
        key, value = f"evaluation.extractor.{item.name}", getattr(config, item.name)
        is_set = item.name not in _OF_FLAT and value != getattr(ExtractorConfig(), item.name)
        if is_set and (key in typed or not kind_is_typed):
            raise UserError(
                f"{key}={value} does nothing with evaluation.extractor.kind={config.kind}: leave it out, or set "
                "evaluation.extractor.kind=torchscript or onnx"
            )


def _file_of(config: ExtractorConfig) -> tuple[str, str]:
    """File and sha256 of a network. Raises UserError where one is missing."""
    if config.file is None or config.sha256 is None:
        raise UserError(
            f"evaluation.extractor.kind={config.kind} needs evaluation.extractor.file and .sha256 (of that file)"
        )
    return config.file, config.sha256


def open_extractor(config: ExtractorConfig, device: torch.device) -> Extractor:
    """The extractor the config names.

    Raises:
        UserError: a network without its file and sha256, a file with another one, or a package that is missing.
    """
    if config.kind in ("latents", "pixels"):
        if config.spatial is not None:
            raise UserError(
                f"evaluation.extractor.spatial={config.spatial} names an output of a network; {config.kind} have none"
            )
        return Flat("latents" if config.kind == "latents" else "pixels", config.max_dim)
    return _open_network(config, preprocessing(config), device)


def _open_network(config: ExtractorConfig, preprocess: Preprocessing, device: torch.device) -> "Network":
    """Raises UserError for a missing file or sha256, another sha256, or a missing package."""
    file, expected = _file_of(config)
    try:
        data = storage.read_bytes(file)
    except FileNotFoundError as error:
        raise UserError(f"evaluation.extractor.file={file} does not exist; nothing is downloaded") from error
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != expected.lower():
        raise UserError(f"evaluation.extractor.file={file} has sha256 {sha256}, not {expected}: it is another network")
    if config.kind == "torchscript" and sha256 == INCEPTION_SHA256:
        if config.spatial is not None:
            raise UserError(
                f"evaluation.extractor.spatial={config.spatial}: {config.file} gives no features with places; take a "
                "network that has mixed_6/conv of Inception as a second output"
            )
        return Inception(data, config, device)
    return {"torchscript": TorchScript, "onnx": Onnx}[config.kind](data, config, preprocess, device)


def identity(config: ExtractorConfig) -> dict[str, Any]:
    """Of the extractor the config names, without its file."""
    if config.kind in ("latents", "pixels"):
        return {"kind": config.kind, "max_dim": config.max_dim}
    if config.kind == "torchscript" and (config.sha256 or "").lower() == INCEPTION_SHA256:
        return INCEPTION_IDENTITY
    keys = ["kind", "sha256", "features", "logits", *(["spatial"] if config.spatial is not None else [])]
    settings = {key: getattr(config, key) for key in keys}
    return identity_of(preprocessing(config), arguments=dict(config.arguments), **settings)


def name_of(config: ExtractorConfig) -> str:
    """What values measured by it are called after."""
    if config.kind in ("latents", "pixels"):
        return config.kind
    return os.path.basename(config.file or "").partition(".")[0]


class Network(ABC):
    """What both kinds share: preprocessing, checking outputs, and the identity."""

    takes: Literal["latents", "images"] = "images"

    def __init__(self, config: ExtractorConfig, preprocess: Preprocessing, device: torch.device):
        self._preprocess, self._device = preprocess, device
        self._features, self._logits, self._spatial = config.features, config.logits, config.spatial
        self._channel_axis = 1 if config.layout == "nchw" else 3
        self.name = name_of(config)
        self.identity = identity(config)

    @abstractmethod
    def _run(self, images: Tensor) -> Any:
        """The network's outputs: a tensor, several, or several by name."""

    def _pick(self, outputs: Any, name: str) -> Tensor:
        """One of a network's outputs, by name or number."""
        chosen: Any = None
        if isinstance(outputs, dict):
            chosen = outputs.get(name)
        elif isinstance(outputs, Tensor):
            chosen = outputs if name == "0" else None
        elif name.isdecimal() and int(name) < len(outputs):
            chosen = outputs[int(name)]
        if not isinstance(chosen, Tensor):
            have = (
                ", ".join(outputs) if isinstance(outputs, dict) else 1 if isinstance(outputs, Tensor) else len(outputs)
            )
            raise UserError(f"{self.name} has no output {name!r} (it has {have}): see evaluation.extractor.features")
        return chosen

    def __call__(self, samples: Tensor) -> Output:
        outputs = self._run(self._preprocess(samples))
        features = self._pick(outputs, self._features).flatten(1).double().cpu()
        logits = None if self._logits is None else self._pick(outputs, self._logits).double().cpu().softmax(dim=1)
        return Output(features, logits, None if self._spatial is None else self._places(outputs, self._spatial))

    def _places(self, outputs: Any, name: str) -> Tensor:
        """(N, S) fp64: the first channels of an output with places, at all of them."""
        places = self._pick(outputs, name)
        if places.dim() != 4:
            shape = "x".join(map(str, places.shape))
            raise UserError(f"evaluation.extractor.spatial={name}: a {shape} output of {self.name} has no places")
        few = places.narrow(self._channel_axis, 0, min(SPATIAL_CHANNELS, places.shape[self._channel_axis]))
        return few.flatten(1).double().cpu()


class TorchScript(Network):
    """A scripted or traced module of images, whose output is a tensor, a tuple, a list or a dict of tensors."""

    def __init__(self, data: bytes, config: ExtractorConfig, preprocess: Preprocessing, device: torch.device):
        super().__init__(config, preprocess, device)
        self._arguments = dict(config.arguments)
        self._module = _load_torchscript(data, config.file or "", device)

    @torch.no_grad()
    def _compute(self, images: Tensor, arguments: Mapping[str, Any]) -> Any:
        with computing("fp32", self._device):
            return self._module(images.to(self._device), **arguments)

    def _run(self, images: Tensor) -> Any:
        try:
            return self._compute(images, self._arguments)
        except RuntimeError as error:
            shape = "x".join(str(n) for n in images.shape)
            first = str(error).strip().splitlines()[-1]
            raise UserError(
                f"{self.name} does not take a {images.dtype} input of {shape} ({first}): see "
                "evaluation.extractor.{resize,channels,layout,dtype,arguments}"
            ) from error


def _load_torchscript(data: bytes, name: str, device: torch.device) -> Any:
    """Code inside the file runs in TorchScript's interpreter, not in Python's: nothing is unpickled."""
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        file.write(data)
        file.flush()
        try:
            return torch.jit.load(file.name, map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{name} is no TorchScript file ({str(error).splitlines()[0]})") from error


class Inception(TorchScript):
    """The network of published FIDs and Inception scores, fed and asked as they were."""

    def __init__(self, data: bytes, config: ExtractorConfig, device: torch.device):
        super().__init__(data, config, _INCEPTION_INPUT, device)
        self.name = "inception"
        self.identity = INCEPTION_IDENTITY

    def __call__(self, samples: Tensor) -> Output:
        images = self._preprocess(samples).to(self._device)
        features = self._compute(images, _INCEPTION_FEATURES).double().cpu()
        return Output(features, self._compute(images, _INCEPTION_PROBABILITIES).double().cpu())


class Onnx(Network):
    """An ONNX graph with one input of images, run by onnxruntime."""

    def __init__(self, data: bytes, config: ExtractorConfig, preprocess: Preprocessing, device: torch.device):
        super().__init__(config, preprocess, device)
        try:
            import onnxruntime
            from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, InvalidProtobuf
        except ImportError as error:
            raise UserError(f"an ONNX extractor needs onnxruntime ({error}): pip install 'imm-scale[onnx]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            providers = _providers(device, onnxruntime.get_available_providers())
            self._session = onnxruntime.InferenceSession(data, options, providers=providers)
        except (Fail, InvalidGraph, InvalidProtobuf) as error:
            raise UserError(f"{config.file} is no ONNX network: {error}") from error
        self._input = self._session.get_inputs()[0].name
        self._names = [output.name for output in self._session.get_outputs()]

    def _run(self, images: Tensor) -> Any:
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument

        try:
            outputs = self._session.run(None, {self._input: images.numpy()})
        except (Fail, InvalidArgument) as error:
            raise UserError(f"{self.name} does not take images of {tuple(images.shape)}: {error}") from error
        tensors = [torch.from_numpy(np.asarray(output)) for output in outputs]
        named = dict(zip(self._names, tensors, strict=True))
        return {**named, **{str(i): tensor for i, tensor in enumerate(tensors)}}


def _providers(device: torch.device, available: Sequence[str]) -> list[Any]:
    """onnxruntime's: this rank's GPU, without its default of tf32, where it is built for GPUs; then the CPU."""
    cuda = ("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0})
    return [*([cuda] if device.type == "cuda" and cuda[0] in available else []), "CPUExecutionProvider"]
