"""Pickles of numpy arrays in plain containers, such as EDM2's reference statistics, read without running anything."""

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from imm_scale.checkpoint.released.unpickler import Name, RefusedError, Vocabulary, empty_dict, load, shown

_BYTES = re.compile("[\\x00-\\xff]*")  # characters that stand for bytes
_MOST_AXES = 8
_DTYPE = re.compile(r"[fiu][1248]|b1")


@dataclass(eq=False)
class _Dtype:
    """numpy.dtype("f8"), and the byte order its state tells."""

    code: str
    order: str = "="

    def set_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "=", "|"):
            raise RefusedError("holds a numpy type other than plain numbers")
        self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order.replace("|", "") + self.code)


@dataclass(eq=False)
class _Array:
    """An array whose numbers come in its state."""

    value: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        """(version, shape, type, whether columns come first, the numbers' bytes)."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise RefusedError("holds a numpy array without its shape, type and numbers")
        _, shape, dtype, by_columns, data = state
        self.value = _numbers(data, dtype, shape, "F" if by_columns else "C")


def _numbers(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    sound = isinstance(data, bytes) and isinstance(dtype, _Dtype) and isinstance(shape, tuple) and order in ("C", "F")
    if not sound or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise RefusedError("holds a numpy array of something else than plain numbers")
    count = math.prod(shape)
    if count * dtype.numpy().itemsize != len(data) or len(shape) > _MOST_AXES:
        raise RefusedError(f"holds a numpy array of {len(data)} bytes that says it has {count} numbers")
    return np.ndarray(shape, dtype.numpy(), data, order=order)


def _dtype(args: tuple[Any, ...]) -> _Dtype:
    if not args or not isinstance(args[0], str) or not _DTYPE.fullmatch(args[0]):
        raise RefusedError(f"holds the numpy type {shown(args[0] if args else None)}; only plain numbers are read")
    return _Dtype(args[0])


def _reconstruct(args: tuple[Any, ...]) -> _Array:
    if not args or not isinstance(args[0], Name) or args[0].value != "numpy.ndarray":
        raise RefusedError("holds a subclass of numpy's array")
    return _Array()


def _from_buffer(args: tuple[Any, ...]) -> _Array:
    if len(args) != 4:
        raise RefusedError("holds a numpy array without its shape, type and numbers")
    return _Array(_numbers(*args))


def _scalar(args: tuple[Any, ...]) -> _Array:
    if len(args) != 2:
        raise RefusedError("holds a numpy number without its type and bytes")
    return _Array(_numbers(args[1], args[0], (), "C"))


def _encode(args: tuple[Any, ...]) -> bytes:
    """How protocol 2 says bytes."""
    if len(args) != 2 or not isinstance(args[0], str) or args[1] != "latin1" or not _BYTES.fullmatch(args[0]):
        raise RefusedError("encodes something else than bytes")
    return args[0].encode("latin1")


def _no_bytes(args: tuple[Any, ...]) -> bytes:
    if args:
        raise RefusedError("makes bytes of something else than nothing")
    return b""


_BUILDERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "_codecs.encode": _encode,
    "builtins.bytes": _no_bytes,
    "collections.OrderedDict": empty_dict,
    "dnnlib.util.EasyDict": empty_dict,
    "numpy.dtype": _dtype,
    # numpy 2 moved `core`; files keep the name of the numpy that wrote them.
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
}
_NUMBERS = Vocabulary(_BUILDERS, lambda name: name == "numpy.ndarray", "file of arrays", "take it from its authors")


def load_arrays(data: bytes, where: str) -> Any:
    """A dict of numpy arrays, or of such dicts.

    Args:
        where: how messages call the file.

    Raises:
        UserError: anything else in it, by its name.
    """
    return _plain(load(io.BytesIO(data), where, _NUMBERS))


def _plain(value: Any, depth: int = 2) -> Any:
    """With arrays in the place of what they were made from, in dicts of dicts: deeper ones may contain themselves."""
    if isinstance(value, dict) and depth:
        return {key: _plain(one, depth - 1) for key, one in value.items()}
    return value.value if isinstance(value, _Array) else value
