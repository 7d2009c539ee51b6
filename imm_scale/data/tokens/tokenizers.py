"""Texts as tokens and back, the same when a data set is packed and when a net's samples are read."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from imm_scale import storage
from imm_scale.data.manifest import TokenCodec
from imm_scale.errors import UserError

TOKENIZER_FILE = "tokenizer.json"  # beside the manifest of a data set whose tokenizer is a file
NAMES = ("bytes", "text27", "hf:FILE")
_LETTERS = " abcdefghijklmnopqrstuvwxyz"


class Tokenizer(Protocol):
    """What a codec says of a tokenizer, and both directions of it.

    Attributes:
        name: as a manifest has it: "bytes", "text27" or "hf".
        vocabulary: tokens are 0 to vocabulary - 1.
        hash: sha256 of what defines it.
    """

    name: str
    vocabulary: int
    hash: str

    def encode(self, text: bytes | str, where: str = "the text") -> NDArray[np.int64]:
        """(n,) tokens of a text. Raises UserError, naming `where` it is from, for what the tokenizer does not take."""
        ...

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of (n,) tokens."""
        ...

    def bytes_of(self, text: bytes, ids: NDArray[np.int64]) -> int:
        """Bytes of that in a text which its (n,) tokens keep."""
        ...


class Bytes:
    """Each byte is a token; any file is a text."""

    name, vocabulary = "bytes", 256
    hash = hashlib.sha256(b"a token is a byte").hexdigest()

    def encode(self, text: bytes | str, where: str = "the text") -> NDArray[np.int64]:
        """(n,) values of the bytes, of a str as UTF-8, with those that a command line could not read as they are."""
        content = text.encode(errors="surrogateescape") if isinstance(text, str) else text
        return np.frombuffer(content, np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The bytes as UTF-8, with a replacement character where they are none."""
        return np.asarray(ids).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def bytes_of(self, text: bytes, ids: NDArray[np.int64]) -> int:
        """All of them."""
        return len(text)


class Text27:
    """The alphabet of text8: a space is 0, a to z are 1 to 26.

    Latin capitals become small; a run of anything else, digits and accented letters too, is one space, and none at
    either end.
    """

    name, vocabulary = "text27", len(_LETTERS)
    hash = hashlib.sha256(f"{_LETTERS!r}, ASCII lower case, runs of others one space, stripped".encode()).hexdigest()
    _table = np.array([max(_LETTERS.find(chr(byte).lower()), 0) for byte in range(128)], np.int64)

    def encode(self, text: bytes | str, where: str = "the text") -> NDArray[np.int64]:
        """(n,) tokens. Raises UserError for bytes that are no UTF-8."""
        plain = _utf8(text, where).encode("ascii", errors="replace")  # what is not ASCII becomes "?", and so a space
        ids = self._table[np.frombuffer(plain, np.uint8)]
        letters = np.flatnonzero(ids)
        if not len(letters):
            return ids[:0]
        ids = ids[letters[0] : letters[-1] + 1]
        return ids[(ids != 0) | (np.roll(ids, 1) != 0)]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Letters and spaces."""
        return "".join(_LETTERS[i] for i in np.asarray(ids).tolist())

    def bytes_of(self, text: bytes, ids: NDArray[np.int64]) -> int:
        """A byte a letter or space."""
        return len(ids)


class FromFile:
    """A tokenizer.json as Hugging Face's `tokenizers` writes it, without special tokens around a text.

    The truncation and padding that such a file may carry are for batches of another job, and are turned off: here a
    text has the tokens it has.

    Args:
        definition: the file's bytes.
        where: names it in messages.

    Raises:
        UserError: `tokenizers` is missing, or the file is none of its own.
    """

    name = "hf"

    def __init__(self, definition: bytes, where: str) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise UserError(f"{where} needs the tokenizers library: pip install 'imm-scale[hf]'") from error
        try:
            json.loads(definition)
            self._library = Library.from_str(definition.decode())
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{where} is no tokenizer.json ({error}): name the file that tokenizers saved") from error
        self._library.no_truncation()
        self._library.no_padding()
        self.definition, self.hash = definition, hashlib.sha256(definition).hexdigest()
        self.vocabulary = 1 + max(self._library.get_vocab(with_added_tokens=True).values(), default=0)

    def encode(self, text: bytes | str, where: str = "the text") -> NDArray[np.int64]:
        """(n,) tokens. Raises UserError for bytes that are no UTF-8, or a text the tokenizer has no tokens for."""
        plain = _utf8(text, where)
        try:
            ids = self._library.encode(plain, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{where} cannot be encoded ({error}): take a tokenizer that has tokens for it") from error
        return np.array(ids, np.int64)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """As the library joins them, special tokens shown."""
        text: str = self._library.decode(np.asarray(ids).tolist(), skip_special_tokens=False)
        return text

    def bytes_of(self, text: bytes, ids: NDArray[np.int64]) -> int:
        """All of them, whatever the tokenizer normalizes."""
        return len(text)


def open_tokenizer(name: str) -> Tokenizer:
    """A tokenizer by the name a user gives it, one of NAMES. Raises UserError."""
    if name == Bytes.name:
        return Bytes()
    if name == Text27.name:
        return Text27()
    kind, _, file = name.partition(":")
    if kind != FromFile.name or not file:
        raise UserError(f"tokenizer {name!r} is none of {', '.join(NAMES)}")
    return _from_file(file)


def tokenizer_of(codec: TokenCodec, folder: str) -> Tokenizer:
    """The tokenizer of a manifest in `folder`.

    Raises:
        UserError: tokens of images, or a tokenizer other than the one the data were packed with.
    """
    if codec.image_shape is not None:
        raise UserError(f"tokens of {codec.tokenizer} stand for images, not for a text")
    url = storage.join(folder, TOKENIZER_FILE)
    tokenizer = _from_file(url) if codec.tokenizer == FromFile.name else open_tokenizer(codec.tokenizer)
    where = url if codec.tokenizer == FromFile.name else f"tokenizer {codec.tokenizer}"
    if (tokenizer.hash, tokenizer.vocabulary) != (codec.tokenizer_hash, codec.vocabulary):
        raise UserError(
            f"{where} has hash {tokenizer.hash[:12]} and {tokenizer.vocabulary} tokens, the data were packed with "
            f"{codec.tokenizer_hash[:12] or 'none'} of {codec.vocabulary}: put the one they were packed with there"
        )
    return tokenizer


def _from_file(url: str) -> FromFile:
    try:
        return FromFile(storage.read_bytes(url), url)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"no tokenizer at {url}: name a tokenizer.json") from error


def _utf8(text: bytes | str, where: str) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is no UTF-8 (byte {text[error.start]:#04x} at {error.start}): convert it, leave it out, or take "
            "--tokenizer bytes"
        ) from error
