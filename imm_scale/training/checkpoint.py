"""Checkpoints of any world, for any world: every rank writes the slices it owns, a reader takes what it needs.

step-00001000/
  rank-00000.safetensors   flat fp32 slices, keyed "state/parameter"
  rank-00000.json          parameter, shape and offset of each, and the sha256 of the file beside it
  meta.json                counters, config, model spec, versions
  COMMITTED                written last: names and sha256 of all files; without it the folder is not a checkpoint
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from imm_scale import storage
from imm_scale.errors import UserError

FORMAT_VERSION = 1
COMMITTED = "COMMITTED"
_FOLDER = "checkpoints"
_PREFIX = "step-"


class DamagedCheckpointError(UserError):
    """A committed checkpoint whose files are no longer what was committed."""


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says beside its tensors.

    Attributes:
        step, images_seen: the clock after the last step that is inside.
        optimizer_steps: Adam's counter, behind `step` where steps were skipped.
        config, spec: the resolved config (YAML) and the model spec (JSON).
        manifest_hash: of the data the run learns from.
        world_size, zero_stage: of the run that wrote it; a reader may have others.
        versions: library versions of the writer.
        loss_scale, loss_scale_good_steps: of fp16; None elsewhere.
        skipped: ranges [first, last) of images_seen whose batches were stepped over on purpose.
    """

    step: int
    images_seen: int
    optimizer_steps: int
    config: str
    spec: str
    manifest_hash: str
    world_size: int
    zero_stage: int
    versions: Mapping[str, str]
    loss_scale: float | None = None
    loss_scale_good_steps: int = 0
    skipped: tuple[tuple[int, int], ...] = ()
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_json(cls, text: bytes) -> "Meta":
        """Of this or an older writer, whose missing fields take their defaults."""
        fields = json.loads(text)
        fields["skipped"] = tuple((first, last) for first, last in fields.get("skipped", ()))
        return cls(**fields)


@dataclass(frozen=True)
class Slice:
    """Part of one state of one parameter, and the file that holds it."""

    offset: int
    numel: int
    file: str


def folder(run_dir: str, step: int) -> str:
    return storage.join(run_dir, _FOLDER, f"{_PREFIX}{step:08d}")


def committed_steps(run_dir: str) -> list[int]:
    """Steps that have a committed checkpoint, ascending."""
    names = storage.list_names(storage.join(run_dir, _FOLDER))
    steps = [int(name.removeprefix(_PREFIX)) for name in names if name.startswith(_PREFIX)]
    return [step for step in sorted(steps) if storage.exists(storage.join(folder(run_dir, step), COMMITTED))]


def write_rank(url: str, rank: int, slices: Iterable[tuple[str, tuple[int, ...], int, Mapping[str, Tensor]]]) -> None:
    """Writes one rank's part.

    Args:
        url: the checkpoint's folder.
        slices: (parameter, its whole shape, offset, {state: flat tensor}).
    """
    tensors: dict[str, Tensor] = {}
    entries = []
    for name, shape, offset, states in slices:
        for state, tensor in states.items():
            tensors[f"{state}/{name}"] = tensor.detach().to("cpu", torch.float32).contiguous()
            entries.append({"state": state, "name": name, "shape": shape, "offset": offset, "numel": tensor.numel()})
    data = save_safetensors(tensors)
    file = f"rank-{rank:05d}.safetensors"
    storage.write_bytes(storage.join(url, file), data)
    description = {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "slices": entries}
    storage.write_text(storage.join(url, f"rank-{rank:05d}.json"), json.dumps(description))


def commit(url: str, meta: Meta) -> None:
    """Makes the folder a checkpoint, once every rank has written its part."""
    storage.write_text(storage.join(url, "meta.json"), json.dumps(asdict(meta)))
    names = ["meta.json", *(f"rank-{rank:05d}.json" for rank in range(meta.world_size))]
    hashes = {name: hashlib.sha256(storage.read_bytes(storage.join(url, name))).hexdigest() for name in names}
    storage.write_text(storage.join(url, COMMITTED), json.dumps({"format_version": FORMAT_VERSION, "sha256": hashes}))


def prune(run_dir: str, keep_last: int, keep_every: int | None) -> None:
    """Removes committed checkpoints beyond the newest `keep_last`, but for multiples of `keep_every`."""
    for step in committed_steps(run_dir)[:-keep_last]:
        if keep_every is None or step % keep_every:
            url = folder(run_dir, step)
            storage.remove(storage.join(url, COMMITTED))  # first, so that no reader takes half of it for whole
            storage.remove(url)


class Checkpoint:
    """A committed checkpoint, open for reading.

    Raises:
        DamagedCheckpointError: a description that is missing or whose hash is wrong.
        UserError: written by a newer version.
    """

    def __init__(self, url: str):
        self.url = url
        committed = self._read_json(COMMITTED)
        if committed["format_version"] > FORMAT_VERSION:
            raise UserError(f"{url} was written by a newer imm-scale (format {committed['format_version']}); update it")
        for name, expected in committed["sha256"].items():
            if hashlib.sha256(self._read(name)).hexdigest() != expected:
                raise DamagedCheckpointError(
                    f"{url}/{name} is not what was committed: restore it or remove this checkpoint"
                )
        self.meta = Meta.from_json(self._read("meta.json"))
        self.parts = [self._read_json(f"rank-{rank:05d}.json") for rank in range(self.meta.world_size)]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._slices: dict[tuple[str, str], list[Slice]] = {}
        self._places: dict[str, dict[str, int]] = {}
        for part in self.parts:
            self._index(part)

    @classmethod
    def of_step(cls, run_dir: str, step: int) -> "Checkpoint":
        return cls(folder(run_dir, step))

    @classmethod
    def latest(cls, run_dir: str) -> "Checkpoint":
        """The newest one. Raises UserError where there is none."""
        steps = committed_steps(run_dir)
        if not steps:
            raise UserError(f"{run_dir} holds no committed checkpoint: train it first, or check the path")
        return cls.of_step(run_dir, steps[-1])

    def _read(self, name: str) -> bytes:
        try:
            return storage.read_bytes(storage.join(self.url, name))
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{self.url} is not a whole checkpoint: {name} is missing") from error

    def _read_json(self, name: str) -> Any:
        return json.loads(self._read(name))

    def _index(self, part: Mapping[str, Any]) -> None:
        for entry in part["slices"]:
            self.shapes[entry["name"]] = tuple(entry["shape"])
            place = Slice(entry["offset"], entry["numel"], part["file"])
            self._slices.setdefault((entry["state"], entry["name"]), []).append(place)

    def damaged_files(self, part: int = 0, parts: int = 1) -> list[str]:
        """Names of the tensor files (every `parts`-th from the `part`-th on) that are missing or altered."""
        return [entry["file"] for entry in self.parts[part::parts] if not self._is_intact(entry)]

    def _is_intact(self, entry: Mapping[str, Any]) -> bool:
        url = storage.join(self.url, entry["file"])
        return storage.exists(url) and hashlib.sha256(storage.read_bytes(url)).hexdigest() == entry["sha256"]

    def _place(self, file: str, key: str) -> tuple[str, int]:
        """URL of a tensor file and the byte in it where a tensor's data start."""
        url = storage.join(self.url, file)
        if file not in self._places:
            self._places[file] = _tensor_places(url)
        return url, self._places[file][key]

    @property
    def states(self) -> list[str]:
        return sorted({state for state, _ in self._slices})

    def read(self, state: str, name: str, offset: int = 0, numel: int | None = None) -> Tensor:
        """A flat fp32 slice of one state of one parameter, assembled from whichever ranks had it.

        Raises:
            UserError: the state, the parameter or a part of it is not there.
        """
        pieces = self._slices.get((state, name))
        if pieces is None:
            raise UserError(f"{self.url} holds no {state} of {name}; it has {', '.join(self.states)}")
        total = int(np.prod(self.shapes[name], dtype=np.int64))
        stop = total if numel is None else offset + numel
        out = torch.empty(stop - offset, dtype=torch.float32)
        filled = 0
        for piece in pieces:
            first, last = max(offset, piece.offset), min(stop, piece.offset + piece.numel)
            if first < last:
                url, data_start = self._place(piece.file, f"{state}/{name}")
                start = data_start + 4 * (first - piece.offset)
                data = storage.read_range(url, start, start + 4 * (last - first))
                out[first - offset : last - offset] = torch.frombuffer(bytearray(data), dtype=torch.float32)
                filled += last - first
        if filled != stop - offset:
            raise UserError(f"{self.url} holds only {filled} of {stop - offset} elements of {state} of {name}")
        return out

    def weights(self, state: str = "weight") -> dict[str, Tensor]:
        """{parameter: whole tensor} of one state, such as "weight" or "ema-0.9999"."""
        if state not in self.states:
            raise UserError(f"{self.url} holds no {state!r}; it has {', '.join(self.states)}")
        return {name: self.read(state, name).view(shape) for name, shape in self.shapes.items()}


def _tensor_places(url: str) -> dict[str, int]:
    """{key: byte where its data start} of a safetensors file: an 8-byte length, a JSON header, then the data."""
    length = int.from_bytes(storage.read_range(url, 0, 8), "little")
    header = json.loads(storage.read_range(url, 8, 8 + length))
    return {key: 8 + length + value["data_offsets"][0] for key, value in header.items() if key != "__metadata__"}


def load_into(tensors: Sequence[tuple[str, str, int, Tensor]], checkpoint: Checkpoint) -> None:
    """Fills (state, parameter, offset, flat tensor) targets in place."""
    for state, name, offset, target in tensors:
        target.copy_(checkpoint.read(state, name, offset, target.numel()))
