"""The data set's description, `manifest.json`: which shards, of which codec, and what they must weigh and hash to."""

import hashlib
import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import numpy as np

from imm_scale import storage
from imm_scale.errors import UserError

FORMAT_VERSION = 2  # written where a codec says more than version 1 could
_OWN_HASH = "sha256"
CODEC_KINDS = ("pixels", "vae")
TOKENS_KIND = "tokens"
MOMENTS = ("mean_std", "mean_logvar", "sample")
PIXEL_RANGES = ("signed", "unit")


@dataclass(frozen=True)
class Codec:
    """How images became latents.

    Attributes:
        kind: "pixels" (the values themselves) or "vae" (posterior mean and std of an autoencoder).
        weights_hash: sha256 of the autoencoder's weights, "" for pixels.
        image_size: pixels on a side of the square images, or their height where `image_width` says another width.
        channels: channels of the latent as the network sees it.
        factor: image pixels per latent pixel along a side, 1 for pixels.
        mean, std: per channel, of the raw latent; training data is (raw - mean) / std * sigma_data.
        image_width: pixels; None where the images are square.
        moments: what `vae` shards hold of a posterior: "mean_std" or "mean_logvar", stacked along the channels, or
            "sample", one draw of it.
        scale, shift: what is stored are values, or moments, of (raw - shift) * scale.
        pixel_range: black and white as the autoencoder, or the stored pixels, have them: "signed" -1 and 1, "unit" 0
            and 1.
    """

    kind: str
    weights_hash: str
    image_size: int
    channels: int
    factor: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_width: int | None = None
    moments: str = "mean_std"
    scale: float = 1.0
    shift: float = 0.0
    pixel_range: str = "signed"

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.image_size, self.image_size if self.image_width is None else self.image_width

    @property
    def has_posterior(self) -> bool:
        """Whether stored arrays hold two halves, of which a raw latent is drawn."""
        return self.kind == "vae" and self.moments != "sample"

    def to_fields(self) -> dict[str, Any]:
        """For JSON: what version 1 knew, and of the rest what is not as it took for granted, so its hashes stand."""
        optional = {field.name: field.default for field in fields(self) if field.default is not MISSING}
        return {key: value for key, value in asdict(self).items() if key not in optional or value != optional[key]}


@dataclass(frozen=True)
class TokenCodec:
    """How texts or images became sequences of tokens.

    Attributes:
        vocabulary: tokens are 0 to vocabulary - 1; a mask is none of them and is never stored.
        tokenizer: "bytes", "text27", "binary" (pixels as 0 or 1), "codes" (of an autoencoder), "hf" (a tokenizer.json).
        tokenizer_hash: sha256 of what defines it: a sentence, a tokenizer.json, or an autoencoder's file.
        image_shape: height and width of the images that sequences stand for, None where they stand for text.
        bits_in: bits of the text or the 8-bit pixels that one sequence stands for, on average.
        kind: "tokens".
    """

    vocabulary: int
    tokenizer: str
    tokenizer_hash: str
    image_shape: tuple[int, int] | None = None
    bits_in: float = 0.0
    kind: str = TOKENS_KIND

    @property
    def has_posterior(self) -> bool:
        """Tokens are stored as they are."""
        return False

    @property
    def stored_dtype(self) -> "np.dtype[Any]":
        """The narrowest of uint8, uint16 and int32 that holds the vocabulary."""
        return np.dtype("u1" if self.vocabulary <= 1 << 8 else "<u2" if self.vocabulary <= 1 << 16 else "<i4")

    def to_fields(self) -> dict[str, Any]:
        """For JSON; the images' shape only where there is one."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        return values if self.image_shape is None else {**values, "image_shape": list(self.image_shape)}

    @classmethod
    def from_fields(cls, values: dict[str, Any]) -> "TokenCodec":
        """From what `to_fields` gave, by way of JSON."""
        shape = values.get("image_shape")
        return cls(
            **{**values, "bits_in": float(values["bits_in"]), "image_shape": None if shape is None else tuple(shape)}
        )

    def unlike(self, other: "TokenCodec") -> dict[str, tuple[Any, Any]]:
        """In what the tokens of another data set mean something else: {field: (there, here)}."""
        names = ("vocabulary", "tokenizer", "tokenizer_hash", "image_shape")
        pairs = {name: (getattr(other, name), getattr(self, name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclass(frozen=True)
class ShardInfo:
    """One shard: its file name (relative to the manifest), and size and sha256 that make damage visible."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        """The index beside the shard, relative to the manifest."""
        return self.name.removesuffix(".tar") + ".index.npy"


@dataclass(frozen=True)
class Manifest:
    """A data set.

    Attributes:
        latent_shape: (C, H, W) as the network sees it; (T,) of sequences of tokens.
        class_names: a name per class, or none.
        flipped: the shards also hold the latents of the mirrored images.
    """

    codec: Codec | TokenCodec
    latent_shape: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]
    shards: tuple[ShardInfo, ...]
    flipped: bool = False

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one stored array: two halves stacked along the channels where there is a posterior."""
        channels, *sides = self.latent_shape
        return (2 * channels if self.codec.has_posterior else channels, *sides)

    @property
    def stored_dtype(self) -> "np.dtype[Any]":
        """Type of the stored arrays: fp16 latents, or tokens in as few bytes as their vocabulary needs."""
        return self.codec.stored_dtype if isinstance(self.codec, TokenCodec) else np.dtype("<f2")

    @property
    def vocabulary(self) -> int | None:
        """Tokens are 0 to vocabulary - 1; None of latents."""
        return self.codec.vocabulary if isinstance(self.codec, TokenCodec) else None

    @property
    def latent_codec(self) -> Codec:
        """The codec of latents. Raises UserError for tokens."""
        if isinstance(self.codec, TokenCodec):
            raise UserError(
                "the data set holds tokens, where latents or pixels are needed: name another data.manifest, or choose "
                "a sample space of tokens (data.space.name)"
            )
        return self.codec

    @property
    def token_codec(self) -> TokenCodec:
        """The codec of tokens. Raises UserError for latents."""
        if isinstance(self.codec, TokenCodec):
            return self.codec
        raise UserError(
            f"the data set holds {self.codec.kind}, where tokens are needed: name one that imm-scale pack-tokens wrote "
            "in data.manifest, or set data.space.name=latents"
        )

    @property
    def format_version(self) -> int:
        """1 where that says all, so that programs which know no other still read it."""
        plain = isinstance(self.codec, Codec) and len(self.codec.to_fields()) == len(_required(Codec))
        return 1 if plain else FORMAT_VERSION

    def _document(self) -> dict[str, Any]:
        return {**asdict(self), "codec": self.codec.to_fields(), "format_version": self.format_version}

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON: equal for equal content, whatever the file's layout."""
        canonical = json.dumps(self._document(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> str:
        """The file's text. It holds its own hash, so that a byte changed in the file or on the way is noticed."""
        return json.dumps({**self._document(), _OWN_HASH: self.hash}, indent=2, sort_keys=True) + "\n"

    def save(self, url: str) -> None:
        """Writes the manifest as JSON."""
        storage.write_text(url, self.to_json())

    @classmethod
    def load(cls, url: str) -> "Manifest":
        """Reads and checks a manifest.

        Raises:
            UserError: no such file, no JSON, a newer format, a missing, unknown or ill-typed field, or fields that
                contradict each other.
        """
        before = None
        while True:
            try:
                text = storage.read_bytes(url)
            except (FileNotFoundError, IsADirectoryError) as error:
                raise UserError(
                    f"no manifest at {url}: data.manifest must name the manifest.json that imm-scale encode wrote"
                ) from error
            try:
                return parse(text, where=url)
            except UserError:
                if text == before:  # else it may have been damaged on the way
                    raise
                before = text


def other_width(height: int, width: int) -> int | None:
    """A codec's `image_width` for images of this height and width."""
    return None if width == height else width


def unseen(shape: tuple[int, ...], num_classes: int, vocabulary: int | None = None) -> Manifest:
    """A manifest of no shards, to plan for data of which no more is known; with a vocabulary, of tokens."""
    if vocabulary is not None:
        return Manifest(TokenCodec(vocabulary, "", ""), shape, num_classes, (), ())
    channels, height, width = shape
    codec = Codec("pixels", "", height, channels, 1, (0.0,) * channels, (1.0,) * channels, other_width(height, width))
    return Manifest(codec, shape, num_classes, (), ())


def parse(text: str | bytes, where: str) -> Manifest:
    """A manifest from its JSON text; `where` names it in messages. Raises UserError as `Manifest.load` does."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}): write it again with imm-scale encode") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{where} has format version {version}, this program reads up to {FORMAT_VERSION}: upgrade imm-scale"
        )
    if isinstance(document, dict) and type(document.pop("format_version", None)) is not int:
        raise UserError(f"{where}: format_version is {version!r}: int is needed")
    own_hash = document.pop(_OWN_HASH, None) if isinstance(document, dict) else None
    top = _checked(document, Manifest, where)
    manifest = Manifest(
        codec=_parse_codec(top["codec"], f"{where}: codec"),
        latent_shape=tuple(_items(top["latent_shape"], int, f"{where}: latent_shape")),
        num_classes=top["num_classes"],
        class_names=tuple(_items(top["class_names"], str, f"{where}: class_names")),
        shards=tuple(
            ShardInfo(**_checked(shard, ShardInfo, f"{where}: shards[{i}]")) for i, shard in enumerate(top["shards"])
        ),
        flipped=top.get("flipped", False),
    )
    _check_consistent(manifest, where)
    if version != manifest.format_version:
        raise UserError(f"{where}: format_version is {version}, its codec is of version {manifest.format_version}")
    if own_hash != manifest.hash:
        raise UserError(
            f"{where}: its {_OWN_HASH} is {own_hash}, its contents have {manifest.hash}: it was edited or damaged; "
            "write it again with imm-scale encode --finalize"
        )
    return manifest


def _parse_codec(document: Any, where: str) -> Codec | TokenCodec:
    if isinstance(document, dict) and document.get("kind") == TOKENS_KIND:
        return _parse_token_codec(document, where)
    values = _checked(document, Codec, where)
    for name in ("mean", "std"):
        values[name] = tuple(float(v) for v in _items(values[name], float, f"{where}.{name}"))
    return Codec(**values)


def _parse_token_codec(document: dict[str, Any], where: str) -> TokenCodec:
    values = _checked(document, TokenCodec, where)
    shape = values.get("image_shape")
    if shape is not None and (not isinstance(shape, list) or len(shape) != 2):
        raise UserError(f"{where}: image_shape is {shape!r}: a list of height and width, or null, is needed")
    _items(shape or [], int, f"{where}.image_shape")
    return TokenCodec.from_fields({"bits_in": 0.0, **values})


def _checked(document: Any, target: type, where: str) -> dict[str, Any]:
    """The document as keyword arguments of a dataclass: its fields, but those with defaults, scalars of its types."""
    if not isinstance(document, dict):
        raise UserError(f"{where} is {document!r}: an object with named fields is needed")
    types = {field.name: field.type for field in fields(target)}
    for key in document:
        if key not in types:
            raise UserError(f"{where} has an unknown field {key!r}: remove it, or write the file again")
    for key in _required(target):
        if key not in document:
            raise UserError(f"{where} has no field {key!r}: write the file again with imm-scale encode")
    for key in document:
        kind = types[key]
        # A tuple is a JSON list, a nested dataclass is checked by its own call.
        if kind in (int, str, bool) and type(document[key]) is not kind:
            raise UserError(f"{where}: {key} is {document[key]!r}: {kind.__name__} is needed")
        if kind is float and type(document[key]) not in (int, float):
            raise UserError(f"{where}: {key} is {document[key]!r}: a number is needed")
        if str(kind).startswith("tuple") and not isinstance(document[key], list):
            raise UserError(f"{where}: {key} is {document[key]!r}: a list is needed")
    return dict(document)


def _required(target: type) -> list[str]:
    """Names of a dataclass's fields without defaults."""
    return [field.name for field in fields(target) if field.default is MISSING]


def _items(values: list[Any], kind: type, where: str) -> list[Any]:
    allowed = (int, float) if kind is float else (kind,)
    for value in values:
        if type(value) not in allowed:
            raise UserError(f"{where} holds {value!r}: {kind.__name__} is needed")
    return values


def _check_consistent(manifest: Manifest, where: str) -> None:
    counts = [shard.samples for shard in manifest.shards] + [shard.bytes for shard in manifest.shards]
    codec = manifest.codec
    of_codec = _token_rules(codec, manifest) if isinstance(codec, TokenCodec) else _latent_rules(codec, manifest)
    rules = [
        *of_codec,
        (manifest.num_classes >= 1, f"num_classes is {manifest.num_classes}, it must be at least 1"),
        (
            len(manifest.class_names) in (0, manifest.num_classes),
            f"{len(manifest.class_names)} class_names for num_classes {manifest.num_classes}",
        ),
        (len(manifest.shards) > 0, "there are no shards"),
        (all(count >= 1 for count in counts), "a shard has no samples or no bytes"),
        (
            len({shard.name for shard in manifest.shards}) == len(manifest.shards),
            "two shards have the same name",
        ),
    ]
    writer = "pack-tokens" if isinstance(codec, TokenCodec) else "encode"
    for holds, problem in rules:
        if not holds:
            raise UserError(f"{where}: {problem}; write the file again with imm-scale {writer}")


def _latent_rules(codec: Codec, manifest: Manifest) -> list[tuple[bool, str]]:
    """What has to hold of latents, and how to say that it does not."""
    expected = (codec.channels, *(side // max(codec.factor, 1) for side in codec.image_shape))
    kinds = ", ".join([*CODEC_KINDS, TOKENS_KIND])
    return [
        (codec.kind in CODEC_KINDS, f"codec kind {codec.kind!r} is none of {kinds}"),
        (codec.channels >= 1 and codec.factor >= 1, f"codec channels {codec.channels} or factor {codec.factor} < 1"),
        (
            manifest.latent_shape == expected,
            f"latent_shape {list(manifest.latent_shape)} does not follow from the codec's channels, image_size and "
            f"factor, which give {list(expected)}",
        ),
        *_convention_rules(codec),
        (
            len(codec.mean) == len(codec.std) == codec.channels,
            f"codec mean and std have {len(codec.mean)} and {len(codec.std)} entries for {codec.channels} channels",
        ),
        (all(0 < std < float("inf") for std in codec.std), f"codec std {list(codec.std)} must be positive"),
        (all(abs(mean) < float("inf") for mean in codec.mean), f"codec mean {list(codec.mean)} must be finite"),
    ]


def _token_rules(codec: TokenCodec, manifest: Manifest) -> list[tuple[bool, str]]:
    """What has to hold of tokens, and how to say that it does not."""
    shape, sides = manifest.latent_shape, codec.image_shape or (1, 1)
    return [
        (len(shape) == 1 and shape[0] >= 1, f"latent_shape {list(shape)} is no length of a sequence of tokens"),
        (2 <= codec.vocabulary < 1 << 31, f"codec vocabulary {codec.vocabulary} is not from 2 to 2147483647"),
        (min(sides) >= 1, f"codec image_shape {list(sides)} is no height and width"),
        (0 <= codec.bits_in < math.inf, f"codec bits_in {codec.bits_in} must be finite and not negative"),
        (not manifest.flipped, "flipped is true, but tokens have no mirrored ones beside them"),
    ]


def _convention_rules(codec: Codec) -> list[tuple[bool, str]]:
    """What has to hold of how values are stored, and how to say that it does not."""
    width, stored_raw = codec.image_width, (codec.moments, codec.scale, codec.shift) == ("mean_std", 1.0, 0.0)
    return [
        (width is None or (type(width) is int and width >= 1), f"codec image_width {width!r} is no number of pixels"),
        (codec.moments in MOMENTS, f"codec moments {codec.moments!r} is none of {', '.join(MOMENTS)}"),
        (codec.pixel_range in PIXEL_RANGES, f"codec pixel_range {codec.pixel_range!r} is none of signed, unit"),
        (0 < codec.scale < float("inf"), f"codec scale {codec.scale} must be positive"),
        (abs(codec.shift) < float("inf"), f"codec shift {codec.shift} must be finite"),
        (codec.kind == "vae" or stored_raw, "codec moments, scale and shift are for latents of a vae, not for pixels"),
    ]


def check_expectations(
    manifest: Manifest,
    *,
    codec: str | None = None,
    latent_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    vocabulary: int | None = None,
) -> None:
    """Refuses a data set other than the one expected; None expects nothing. `codec` is "pixels", "vae" or "tokens".

    Raises:
        UserError: naming both sides.
    """
    if codec is not None and codec != manifest.codec.kind:
        raise UserError(
            f"the manifest's codec is {manifest.codec.kind}, data.codec expects {codec}: "
            "name the data set the model was made for in data.manifest, or change data.codec"
        )
    if latent_shape is not None and latent_shape != manifest.latent_shape:
        raise UserError(
            f"the manifest's samples have shape {manifest.latent_shape}, the model expects {latent_shape}: "
            "change the model's shape or data.manifest"
        )
    if num_classes is not None and num_classes != manifest.num_classes:
        raise UserError(f"the manifest has {manifest.num_classes} classes, the model {num_classes}: change one of them")
    if vocabulary is not None and vocabulary != manifest.vocabulary:
        there = "no tokens" if manifest.vocabulary is None else f"{manifest.vocabulary} tokens"
        raise UserError(
            f"the manifest has a vocabulary of {there}, data.vocabulary expects {vocabulary}: name the data set the "
            "model was made for in data.manifest, or change data.vocabulary"
        )
