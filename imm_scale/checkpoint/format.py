"""Checkpoints of any world, for any world: every rank writes the slices it owns, a reader takes what it needs.

step-00001000/
  rank-00000.safetensors   flat fp32 slices, keyed "state/parameter"
  rank-00000.json          parameter, shape and offset of each, sha256 of the file beside it, checksum of each state
  meta.json                counters, config, model spec, versions
  index.json               all rank-*.json together, so that a reader of many ranks' work opens one file
  COMMITTED                written last: sha256 of the two files above; without it the folder is not a checkpoint
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from imm_scale import devices, storage
from imm_scale.errors import UserError
from imm_scale.parallel.param_slice import ParamSlice

Result = TypeVar("Result")
FORMAT_VERSION = 1
COMMITTED = "COMMITTED"
INDEX = "index.json"
_FOLDER = "checkpoints"
_PREFIX = "step-"
_READERS = 16
_CHUNK = 1 << 22  # elements written, hashed or summed at once


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
        guards: what the loop's guards remember, as they handed it over.
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
    guards: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_json(cls, text: bytes) -> "Meta":
        """Of this or an older writer, whose missing fields take their defaults."""
        fields = json.loads(text)
        fields["skipped"] = tuple((first, last) for first, last in fields.get("skipped", ()))
        return cls(**fields)


@dataclass(frozen=True)
class StoredRange:
    """Elements of one state of one flattened parameter, and the file that holds them."""

    offset: int
    numel: int
    file: str


def folder(run_dir: str, step: int) -> str:
    """URL of the checkpoint of a step, whether it is there or not."""
    return storage.join(run_dir, _FOLDER, f"{_PREFIX}{step:08d}")


def committed_steps(run_dir: str) -> list[int]:
    """Steps that have a committed checkpoint, ascending."""
    return [step for step in _steps(run_dir) if storage.exists(storage.join(folder(run_dir, step), COMMITTED))]


def _steps(run_dir: str) -> list[int]:
    names = storage.list_names(storage.join(run_dir, _FOLDER))
    numbers = [name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)]
    return sorted(int(number) for number in numbers if number.isdecimal())  # a person may have left a copy there


def checksum(name: str, offset: int, flat: Tensor) -> Tensor:
    """Of a flat slice of one state of one parameter, an int64 on the slice's device.

    The sum over elements of bits * (2 * position + 1) * an odd number made from the name, mod 2^64: over any cut of a
    state into slices, on any ranks, the sums come to the same number, and one changed or misplaced element changes it.
    """
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    odd = 2 * torch.arange(min(_CHUNK, flat.numel()), dtype=torch.int64, device=flat.device) + 1
    for start in range(0, flat.numel(), _CHUNK):
        bits = flat[start : start + _CHUNK].view(torch.int32).to(torch.int64)
        total += (bits * (odd[: len(bits)] + 2 * (offset + start))).sum()
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    return total * (2 * key + 1)


def write_rank(url: str, rank: int, slices: Sequence[ParamSlice[tuple[Tensor, ...]]], staging: str) -> None:
    """Writes one rank's part.

    Args:
        url: the checkpoint's folder.
        staging: a local folder that files for a remote store pass through.
    """
    places = [(owner, state, parts) for owner in slices for state, parts in owner.states.items()]
    file, digest, size = f"rank-{rank:05d}.safetensors", hashlib.sha256(), 0

    def chunks() -> Iterator[bytes | memoryview]:
        nonlocal size
        for chunk in _safetensors({f"{state}/{owner.name}": parts for owner, state, parts in places}):
            digest.update(chunk)
            size += len(chunk)
            yield chunk

    storage.write_chunks(storage.join(url, file), chunks(), staging)
    sums = {state: torch.zeros((), dtype=torch.int64) for _, state, _ in places}
    for owner, state, parts in places:
        offset = owner.offset
        for part in parts:
            sums[state] += checksum(owner.name, offset, part)
            offset += part.numel()
    description = {
        "file": file,
        "bytes": size,
        "sha256": digest.hexdigest(),
        "checksums": {state: int(total) for state, total in sums.items()},
        "slices": [
            {
                "state": state,
                "name": owner.name,
                "shape": owner.shape,
                "offset": owner.offset,
                "numel": _numel(parts),
            }
            for owner, state, parts in places
        ],
    }
    storage.write_text(storage.join(url, f"rank-{rank:05d}.json"), json.dumps(description))


def _numel(parts: Sequence[Tensor]) -> int:
    return sum(part.numel() for part in parts)


def _safetensors(tensors: Mapping[str, Sequence[Tensor]]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of flat fp32 tensors, given in parts, without the stock writer's copy of them."""
    header: dict[str, Any] = {}
    end = 0
    for key, parts in tensors.items():
        numel = _numel(parts)
        start, end = end, end + 4 * numel
        header[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for part in (part for parts in tensors.values() for part in parts):
        data = part.numpy().data.cast("B")
        for start in range(0, len(data), 4 * _CHUNK):
            yield data[start : start + 4 * _CHUNK]


def commit(url: str, meta: Meta) -> None:
    """Makes the folder a checkpoint, once every rank has written its part."""
    names = [f"rank-{rank:05d}.json" for rank in range(meta.world_size)]
    with ThreadPoolExecutor(_READERS) as pool:
        parts = list(pool.map(lambda name: json.loads(storage.read_bytes(storage.join(url, name))), names))
    texts = {"meta.json": json.dumps(asdict(meta)), INDEX: json.dumps(parts)}
    for name, text in texts.items():
        storage.write_text(storage.join(url, name), text)
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    storage.write_text(storage.join(url, COMMITTED), json.dumps({"format_version": FORMAT_VERSION, "sha256": hashes}))


def remove(url: str) -> None:
    """Removes a checkpoint or what there is of it."""
    storage.remove(storage.join(url, COMMITTED))  # first, so that no reader takes half of it for whole
    storage.remove(url)


def prune(run_dir: str, step: int, keep_last: int, keep_every: int | None) -> None:
    """Removes committed checkpoints beyond the newest `keep_last` up to `step`, but for multiples of `keep_every`.

    Newer ones are damaged, or the run would not have come back to `step`: they neither count nor go.
    """
    for old in [committed for committed in committed_steps(run_dir) if committed <= step][:-keep_last]:
        if keep_every is None or old % keep_every:
            remove(folder(run_dir, old))


def uncommitted_steps(run_dir: str) -> list[int]:
    """Steps of which there is a folder that was never committed: their writer died, or is still at it."""
    return sorted(set(_steps(run_dir)) - set(committed_steps(run_dir)))


class Checkpoint:
    """A committed checkpoint, open for reading.

    Attributes:
        digest: sha256 of its commit, and so of everything in it.

    Raises:
        DamagedCheckpointError: a description that is missing or whose hash is wrong.
        UserError: written by a newer version.
    """

    def __init__(self, url: str):
        self.url = url
        data = self._read(COMMITTED)
        self.digest = hashlib.sha256(data).hexdigest()
        committed = json.loads(data)
        if committed["format_version"] > FORMAT_VERSION:
            raise UserError(f"{url} was written by a newer imm-scale (format {committed['format_version']}); update it")
        for name, expected in committed["sha256"].items():
            if hashlib.sha256(self._read(name)).hexdigest() != expected:
                raise DamagedCheckpointError(
                    f"{url}/{name} is not what was committed: restore it or remove this checkpoint"
                )
        self.meta = Meta.from_json(self._read("meta.json"))
        if INDEX in committed["sha256"]:
            self.parts = self._read_json(INDEX)
        else:  # an older writer
            self.parts = [self._read_json(f"rank-{rank:05d}.json") for rank in range(self.meta.world_size)]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._ranges: dict[tuple[str, str], list[StoredRange]] = {}
        self._places: dict[str, dict[str, int]] = {}
        for part in self.parts:
            self._index(part)

    @classmethod
    def of_step(cls, run_dir: str, step: int) -> "Checkpoint":
        """The checkpoint of a step. Raises as the class does."""
        return cls(folder(run_dir, step))

    @classmethod
    def latest(cls, run_dir: str) -> "Checkpoint":
        """The newest one. Raises UserError where there is none."""
        return use_newest(run_dir, lambda checkpoint: checkpoint)

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
            place = StoredRange(entry["offset"], entry["numel"], part["file"])
            self._ranges.setdefault((entry["state"], entry["name"]), []).append(place)

    def damaged_files(self, part: int = 0, parts: int = 1) -> list[str]:
        """Names of the tensor files (every `parts`-th from the `part`-th on) that are missing or altered."""
        return [entry["file"] for entry in self.parts[part::parts] if not self._is_intact(entry)]

    def _is_intact(self, entry: Mapping[str, Any]) -> bool:
        url, digest = storage.join(self.url, entry["file"]), hashlib.sha256()
        if not storage.exists(url) or storage.size(url) != entry["bytes"]:
            return False
        for start in range(0, entry["bytes"], 4 * _CHUNK):
            digest.update(storage.read_range(url, start, min(start + 4 * _CHUNK, entry["bytes"])))
        return digest.hexdigest() == entry["sha256"]

    @property
    def checksums(self) -> dict[str, int]:
        """{state: its checksum over all ranks, as a signed 64-bit number}; empty where the writer was too old."""
        sums: dict[str, int] = {}
        for part in self.parts:
            for state, value in part.get("checksums", {}).items():
                sums[state] = sums.get(state, 0) + value
        return {state: (value + 2**63) % 2**64 - 2**63 for state, value in sums.items()}

    def _place(self, file: str, key: str) -> tuple[str, int]:
        """URL of a tensor file and the byte in it where a tensor's data start."""
        url = storage.join(self.url, file)
        if file not in self._places:
            try:
                self._places[file] = _tensor_places(url)
            except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise self._damage(file) from error
        if key not in self._places[file]:
            raise self._damage(file)
        return url, self._places[file][key]

    def _damage(self, what: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"{self.url}/{what} is not what was committed: restore it, or take another checkpoint"
        )

    @property
    def states(self) -> list[str]:
        """Names of the states it holds, sorted, such as "weight" and "ema-0.9999"."""
        return sorted({state for state, _ in self._ranges})

    def read(self, state: str, name: str, offset: int = 0, numel: int | None = None) -> Tensor:
        """A flat fp32 slice of one state of one parameter, assembled from whichever ranks had it.

        Raises:
            UserError: the state, the parameter or a part of it is not there.
            DamagedCheckpointError: a file that is missing or cut.
        """
        ranges = self._ranges.get((state, name))
        if ranges is None:
            raise UserError(f"{self.url} holds no {state} of {name}; it has {', '.join(self.states)}")
        total = int(np.prod(self.shapes[name], dtype=np.int64))
        stop = total if numel is None else offset + numel
        out = torch.empty(stop - offset, dtype=torch.float32)
        filled = 0
        for stored in ranges:
            first, last = max(offset, stored.offset), min(stop, stored.offset + stored.numel)
            if first < last:
                url, data_start = self._place(stored.file, f"{state}/{name}")
                start = data_start + 4 * (first - stored.offset)
                data = storage.read_range(url, start, start + 4 * (last - first))
                if len(data) != 4 * (last - first):
                    raise self._damage(stored.file)
                out[first - offset : last - offset] = torch.frombuffer(bytearray(data), dtype=torch.float32)
                filled += last - first
        if filled != stop - offset:
            raise UserError(f"{self.url} holds only {filled} of {stop - offset} elements of {state} of {name}")
        return out

    def weights(self, state: str = "weight") -> dict[str, Tensor]:
        """{parameter: tensor of its whole shape} of one state, such as "weight" or "ema-0.9999".

        Raises:
            UserError: no such state.
            DamagedCheckpointError: a file that is missing, cut or altered.
        """
        if state not in self.states:
            raise UserError(f"{self.url} holds no {state!r}; it has {', '.join(self.states)}")
        flat = {name: self.read(state, name) for name in self.shapes}
        expected = self.checksums.get(state)  # as proof of what was read; hashing whole files would read all states
        if expected is not None and expected != sum(checksum(name, 0, values) for name, values in flat.items()):
            raise self._damage(f"{state} (its checksum differs)")
        return {name: values.view(self.shapes[name]) for name, values in flat.items()}


def use_newest(run_dir: str, use: Callable[[Checkpoint], Result]) -> Result:
    """What `use` makes of the newest checkpoint; of the newest of then, should the run remove it meanwhile.

    Raises:
        UserError: there is none.
    """
    while True:
        steps = committed_steps(run_dir)
        if not steps:
            raise UserError(f"{run_dir} holds no committed checkpoint: train it first, or check the path")
        try:
            return use(Checkpoint.of_step(run_dir, steps[-1]))
        except (DamagedCheckpointError, FileNotFoundError):
            if steps[-1] in committed_steps(run_dir):
                raise


def _tensor_places(url: str) -> dict[str, int]:
    """{key: byte where its data start} of a safetensors file: an 8-byte length, a JSON header, then the data."""
    length = int.from_bytes(storage.read_range(url, 0, 8), "little")
    header = json.loads(storage.read_range(url, 8, 8 + length))
    return {key: 8 + length + value["data_offsets"][0] for key, value in header.items() if key != "__metadata__"}


def load_into(tensors: Sequence[tuple[str, str, int, Tensor]], checkpoint: Checkpoint) -> None:
    """Fills (state, parameter, offset, flat tensor) targets in place; many at once from a store that answers slowly."""

    def fill(piece: tuple[str, str, int, Tensor]) -> None:
        state, name, offset, target = piece
        target.copy_(checkpoint.read(state, name, offset, target.numel()))

    if storage.is_local(checkpoint.url):
        for piece in tensors:
            fill(piece)
        return
    where = next((target.device for *_, target in tensors if target.is_cuda), torch.device("cpu"))
    with ThreadPoolExecutor(_READERS, initializer=devices.use_device, initargs=(where,)) as pool:
        list(pool.map(fill, tensors))
