"""What is known of each encoded shard, and how these records become the manifest."""

import re
from dataclasses import asdict, dataclass, fields, replace

from data_tools.common import LABELS_NAME, ImageShard, Pack, read_json, write_json
from data_tools.statistics import ChannelSums
from data_tools.tasks import TASKS_NAME
from imm_scale import storage
from imm_scale.data.codec import KNOWN_STATISTICS, ImageCodec
from imm_scale.data.manifest import Codec, Manifest, ShardInfo, other_width
from imm_scale.errors import UserError

MANIFEST_NAME = "manifest.json"
_SHOWN = 5  # names listed in a message


@dataclass(frozen=True)
class Identity:
    """What makes latents of two tasks belong together; the manifest says all of it but the precision."""

    kind: str
    weights_hash: str
    image_size: int
    channels: int
    factor: int
    flipped: bool
    precision: str = "fp32"
    image_width: int | None = None

    def codec(self, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> Codec:
        """What the manifest says of the codec, with the data's statistics."""
        return Codec(
            self.kind,
            self.weights_hash,
            self.image_size,
            self.channels,
            self.factor,
            mean,
            std,
            image_width=self.image_width,
        )

    def __str__(self) -> str:
        weights = f" with weights {self.weights_hash[:12]}" if self.weights_hash else ""
        mirrored = ", with mirrored latents" if self.flipped else ""
        height, width = self.codec().image_shape
        return (
            f"{self.kind}{weights}, {height}x{width} pixels, {self.channels} channels, factor {self.factor}"
            f"{mirrored}, {self.precision}"
        )


def identify(pack: Pack, codec: ImageCodec, flipped: bool) -> Identity:
    """Raises UserError for images the codec does not take."""
    height, width, image_channels = pack.image_shape
    if height % codec.factor or width % codec.factor:
        below = "x".join(str(max(side - side % codec.factor, codec.factor)) for side in (height, width))
        raise UserError(
            f"the images have {width}x{height} pixels, {codec.kind} needs sides divisible by {codec.factor}: pack them "
            f"with --size {below} (height x width), say"
        )
    return Identity(
        codec.kind,
        codec.weights_hash,
        height,
        codec.latent_channels(image_channels),
        codec.factor,
        flipped,
        codec.precision,
        other_width(height, width),
    )


@dataclass(frozen=True)
class Record:
    """A finished shard: its part of the manifest and of the statistics."""

    identity: Identity
    source_sha256: str
    shard: ShardInfo
    sums: ChannelSums

    def save(self, out: str, i: int) -> None:
        """Writes the record of shard i; it is written last, so a shard with a record is finished."""
        identity = {key: value for key, value in asdict(self.identity).items() if value is not None}
        write_json(_url(out, i), {**asdict(self), "identity": identity})

    @classmethod
    def load(cls, url: str) -> "Record":
        """Reads a record. Raises UserError for a file that is none."""
        document = read_json(url)
        try:
            return cls(
                Identity(**document["identity"]),
                document["source_sha256"],
                ShardInfo(**document["shard"]),
                ChannelSums(**document["sums"]),
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{url} is no record of an encoded shard ({error}): choose another --out") from error


def stem(i: int) -> str:
    """Name of latent shard i, without ending."""
    return f"latents-{i:06d}"


def _url(out: str, i: int) -> str:
    return storage.join(out, f"{stem(i)}.json")


def check_manifest(out: str, identity: Identity) -> None:
    """Refuses an output whose manifest is of another codec."""
    url = storage.join(out, MANIFEST_NAME)
    if not storage.exists(url):
        return
    manifest = Manifest.load(url)
    stored = manifest.latent_codec
    if stored == identity.codec(stored.mean, stored.std) and manifest.flipped == identity.flipped:
        return
    known = {field.name: getattr(stored, field.name) for field in fields(Identity) if hasattr(stored, field.name)}
    existing = replace(identity, **known, flipped=manifest.flipped)
    rest = [f", {key} {value}" for key, value in stored.to_fields().items() if key not in (*known, "mean", "std")]
    raise UserError(
        f"{url} is of another codec ({existing}{''.join(rest)}) than asked for ({identity}): choose another --out"
    )


def _check_same(existing: Identity, requested: Identity, url: str) -> None:
    if existing != requested:
        raise UserError(f"{url} is of another codec ({existing}) than asked for ({requested}): choose another --out")


def finished(out: str, i: int, source: ImageShard, identity: Identity) -> Record | None:
    """The record of shard i, or None if it has yet to be encoded. Raises UserError if it is of other data."""
    url = _url(out, i)
    if not storage.exists(url):
        return None
    record = Record.load(url)
    _check_same(record.identity, identity, url)
    if record.source_sha256 != source.sha256:
        raise UserError(f"{url} belongs to other images than {source.name} of --images: choose another --out")
    shard_url = storage.join(out, record.shard.name)
    whole = (
        storage.exists(shard_url)
        and storage.size(shard_url) == record.shard.bytes
        and storage.exists(storage.join(out, record.shard.index_name))
    )
    return record if whole else None


def clear_temporaries(out: str, stems: set[str] | None = None) -> None:
    """Removes what killed writers left, of these shards or of all."""
    for name in storage.list_names(out):
        if storage.is_temporary(name) and (stems is None or name.split(".")[0] in stems):
            storage.remove(storage.join(out, name))


def finalize(images: str, out: str, pack: Pack, records: list[Record | None]) -> Manifest:
    """Merges the records, and publishes the manifest when everything else is in place.

    Raises:
        UserError: shards that are missing, double or foreign, or channels without variation.
    """
    missing = [stem(i) for i, record in enumerate(records) if record is None]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(records)} shards are not encoded yet ({_listed(missing)}): run the tasks again "
            "(finished shards are skipped), or one without --task-index, then --finalize"
        )
    parts = [record for record in records if record is not None]
    expected = {stem(i) for i in range(len(parts))}
    existing = {name.split(".")[0] for name in storage.list_names(out) if re.match(r"latents-\d+\.", name)}
    if existing != expected:
        raise UserError(f"{out} holds shards of no image shard ({_listed(sorted(existing - expected))}): remove them")
    counts = {record.shard.name: (record.shard.samples, pack.shards[i].samples) for i, record in enumerate(parts)}
    wrong = [name for name, (encoded, packed) in counts.items() if encoded != packed]
    if len(counts) != len(parts) or wrong:
        raise UserError(f"shards with too few, too many or double samples: {_listed(wrong)}; remove and encode again")
    manifest = _manifest(parts, class_names(images))
    clear_temporaries(out)
    storage.remove(storage.join(out, TASKS_NAME))
    manifest.save(storage.join(out, MANIFEST_NAME))
    return manifest


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _manifest(records: list[Record], class_names: tuple[str, ...]) -> Manifest:
    identity = records[0].identity
    sums = ChannelSums.zero(identity.channels)
    for record in records:
        sums = sums + record.sums
    mean, std = sums.mean_std()
    if min(std) < 1e-5:
        raise UserError(f"channel {std.index(min(std))} has one value in all images: nothing to learn, check --images")
    if identity.weights_hash in KNOWN_STATISTICS:
        measured, (mean, std) = (mean, std), KNOWN_STATISTICS[identity.weights_hash]
        shift = max(abs(a - b) / c for a, b, c in zip(measured[0], mean, std, strict=True))
        scale = max(abs(a / b - 1) for a, b in zip(measured[1], std, strict=True))
        print(
            f"published mean and std of this autoencoder are used; measured here: mean {_numbers(measured[0])}, std "
            f"{_numbers(measured[1])}, off by {shift:.1%} of a std and by {scale:.1%} of the std"
        )
    codec = identity.codec(mean, std)
    height, width = codec.image_shape
    return Manifest(
        codec=codec,
        latent_shape=(identity.channels, height // identity.factor, width // identity.factor),
        num_classes=len(class_names),
        class_names=class_names,
        shards=tuple(record.shard for record in records),
        flipped=identity.flipped,
    )


def _numbers(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"


def class_names(folder: str) -> tuple[str, ...]:
    """Names of the classes 0, 1, ... of packed images. Raises UserError where labels.json does not say them."""
    url = storage.join(folder, LABELS_NAME)
    try:
        document = read_json(url)
        names = [document[str(label)] for label in range(len(document))]
    except (FileNotFoundError, KeyError) as error:
        raise UserError(f"{url} is missing or does not name classes 0, 1, ...: pack the images again") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{url} names no class, or one by something else than text: pack the images again")
    return tuple(names)
