"""Pickles read without running anything.

A pickle is a program for a stack machine that may import and call whatever it names. This is that machine, on top of
the standard library's disassembler, without imports and calls: a global stays a `Name`, an object becomes a `Record` of
what the pickle says about it, and only the names in `_BUILDERS` are built, into tensors and plain containers.

The stock `pickle.Unpickler` with an allow-list in `find_class` would not do. A file without any global can make it
allocate a memo of any size, or hash a tuple nested so deeply that the process dies; EXT codes come from a cache before
`find_class` is asked; and BUILD calls `__setstate__` or sets attributes on whatever lies on the stack.
"""

import io
import pickle
import pickletools
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from imm_scale.errors import UserError

_MAX_INSTRUCTIONS = 2_000_000  # DiT-XL needs some 60,000
_MAX_STORAGE_INSTRUCTIONS = 1_000  # the header of one storage needs some 40
_LONGEST_LINE = 1_000
_FORGOTTEN = object()
# What torch.load raises for damaged bytes.
DAMAGED = (
    *(RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError, AttributeError, EOFError),
    *(struct.error, pickle.UnpicklingError),
)

# Classes of which a record is kept: the parts of the network, and what configs leave among their arguments.
_CLASS_PACKAGES = ("torch.nn.modules.", "timm.", "training.", "dnnlib.", "omegaconf.")
_CLASSES = frozenset(
    {"torch.device", "typing.Any"}
    | {f"builtins.{kind.__name__}" for kind in (bool, int, float, str, bytes, list, tuple, dict, object)}
    | {f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
)


@dataclass(frozen=True)
class Name:
    """A global the pickle names, as in `torch.float16`. Nothing is imported."""

    value: str


@dataclass(eq=False)
class Record:
    """An object as its pickle describes it: name of its class, constructor arguments and attributes."""

    name: str
    args: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class HasState(Protocol):
    """A value that a builder made and that takes its state from BUILD."""

    def set_state(self, state: Any) -> None:
        """Raises RefusedError for a state that does not fit."""


class RefusedError(Exception):
    """A verdict on the file; `load` adds where it was and raises UserError."""


class _Storage:
    """The memory of one tensor, given out once: tensors that share memory cannot be saved."""

    def __init__(self, flat: Tensor):
        self._flat: Tensor | None = flat

    def take(self) -> Tensor:
        flat, self._flat = self._flat, None
        if flat is None:
            raise RefusedError("lets two tensors share one storage")
        return flat


class _Bounded:
    """A file that is never asked for more than is left of it: lengths come from the pickle."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._end = file.seek(0, io.SEEK_END)
        file.seek(0)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int) -> bytes:
        if count > self._end - self.tell():
            raise ValueError("the file ends too early")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(_LONGEST_LINE)


def shown(value: Any) -> str:
    """A value from a file as error messages show it: short, and without control characters."""
    if isinstance(value, Name | Record):
        value = value.value if isinstance(value, Name) else value.name
    if isinstance(value, str):
        return repr(value[:100])
    return repr(value) if value is None or isinstance(value, int | float) else f"a {type(value).__name__}"


def _instructions(file: IO[bytes], limit: int) -> Iterator[tuple[str, Any, int]]:
    """(name, argument, position) of each instruction of one pickle, the last of them STOP."""
    stream = pickletools.genops(file)
    for _ in range(limit):
        try:
            info, argument, position = next(stream)
        except StopIteration:
            return
        except ValueError as error:
            raise RefusedError(f"is not a whole pickle ({str(error)[:200]})") from error
        yield info.name, argument, position or 0
    raise RefusedError(f"has more than {limit} pickle instructions")


def _qualified(module: str, name: str) -> str:
    return ("builtins" if module == "__builtin__" else module) + "." + name


def _is_class(name: str) -> bool:
    return name in _CLASSES or name.startswith(_CLASS_PACKAGES)


def _arguments(args: tuple[Any, ...], *kinds: type) -> None:
    """Raises RefusedError unless the first arguments are of these kinds."""
    if len(args) < len(kinds) or not all(isinstance(arg, kind) for arg, kind in zip(args, kinds, strict=False)):
        raise RefusedError("calls a constructor with arguments of the wrong kind")


def _keys(values: list[Any]) -> list[Any]:
    """Values fit to be hashed: hashing a tuple visits all that is nested in it."""
    if not all(isinstance(value, str | int) for value in values):
        raise RefusedError("has a dict key or a set element that is neither a string nor an integer")
    return values


def empty_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    """What classes of dicts are made of: their entries come later."""
    if not all(isinstance(arg, Name) for arg in args):  # a defaultdict names its factory; here it has none
        raise RefusedError("builds a dict from arguments")
    return {}


def _set(args: tuple[Any, ...]) -> set[Any]:
    _arguments(args, list)
    return set(_keys(args[0]))


def _size(args: tuple[Any, ...]) -> tuple[Any, ...]:
    _arguments(args, tuple)
    return args[0]


def _check_storage(data: bytes) -> None:
    """Refuses bytes that name anything but torch's storages: the five pickles before a storage's numbers."""
    file = io.BytesIO(data)
    for _ in range(5):
        for instruction, argument, _position in _instructions(file, _MAX_STORAGE_INSTRUCTIONS):
            if instruction in ("GLOBAL", "INST"):
                name = str(argument).replace(" ", ".")
                if not re.fullmatch(r"torch\.(storage\.)?\w+Storage|collections\.OrderedDict", name):
                    raise RefusedError(f"names {shown(name)} inside the bytes of a tensor")
            elif instruction == "STACK_GLOBAL" or instruction.startswith("EXT"):
                raise RefusedError(f"uses the pickle instruction {instruction} inside the bytes of a tensor")


def _storage(args: tuple[Any, ...]) -> _Storage:
    _arguments(args, bytes)
    _check_storage(args[0])
    try:
        storage = torch.load(io.BytesIO(args[0]), map_location="cpu", weights_only=True)
    except DAMAGED as error:
        # The cause's own words advise to read the file with the checks off.
        raise RefusedError(f"holds a damaged tensor ({type(error).__name__})") from error
    if not isinstance(storage, torch.storage.TypedStorage):
        raise RefusedError("holds a tensor without a type")
    return _Storage(torch.empty(0, dtype=storage.dtype).set_(storage))


def _tensor(args: tuple[Any, ...]) -> Tensor:
    """(storage, offset, size, stride, ...) as a tensor; what follows concerns gradients."""
    _arguments(args, _Storage, int, tuple, tuple)
    flat = args[0].take()
    try:
        tensor = flat.as_strided(args[2], args[3], args[1])
    except (RuntimeError, TypeError) as error:
        raise RefusedError(f"holds a tensor that does not fit its storage ({str(error)[:200]})") from error
    if tensor.numel() > flat.numel():
        raise RefusedError("holds a tensor larger than its storage")
    return tensor


def _parameter(args: tuple[Any, ...]) -> Tensor:
    _arguments(args, Tensor)
    return args[0]


def _persistent(args: tuple[Any, ...]) -> Record:
    """EDM's persistence: {type, version, module_src, class_name, state}. The class's source text is not looked at."""
    _arguments(args, dict)
    name, state = args[0].get("class_name"), args[0].get("state")
    if not isinstance(name, str) or not isinstance(state, dict):
        raise RefusedError("holds a persistent object without class_name or state")
    return Record(name, (), state)


_BUILDERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "builtins.set": _set,
    "collections.OrderedDict": empty_dict,
    "collections.defaultdict": empty_dict,
    "dnnlib.util.EasyDict": empty_dict,
    "torch.Size": _size,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
}


@dataclass(frozen=True)
class Vocabulary:
    """What a kind of file may hold.

    Attributes:
        builders: {global: what makes a value of its arguments}. A value with `set_state` gets what BUILD says of it.
        is_class: whether a global without a builder may be named, and a record kept of its objects.
        kind: of file, and remedy: what to do about one that is refused; both for messages.
    """

    builders: Mapping[str, Callable[[tuple[Any, ...]], Any]]
    is_class: Callable[[str], bool]
    kind: str
    remedy: str


CHECKPOINT = Vocabulary(_BUILDERS, _is_class, "released checkpoint", "use a checkpoint as its authors published it")


class _Machine:
    """The stack machine of a pickle. `position` is where in the file it stands."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.position = 0
        self._vocabulary = vocabulary
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each mark
        self._memo: dict[int, Any] = {}

    def run(self, instructions: Iterator[tuple[str, Any, int]]) -> Any:
        begun = False
        for name, argument, position in instructions:
            self.position = position
            if not begun and name != "PROTO":
                raise RefusedError("is not a whole pickle (it does not begin as one of protocol 2 or later)")
            begun = True
            if name == "STOP":
                return self.pop()
            if name not in _STEPS:
                detail = "" if argument is None else " " + shown(str(argument).replace(" ", "."))
                raise RefusedError(
                    f"uses the pickle instruction {name}{detail}, which no {self._vocabulary.kind} needs"
                )
            _STEPS[name](self, argument)
        raise RefusedError("is not a whole pickle (it has no end)")

    def pop(self, kind: type = object) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise RefusedError(f"is not a sound pickle: its stack holds no {kind.__name__} where one is needed")
        return self._stack.pop()

    def top(self, kind: type) -> Any:
        self._stack.append(self.pop(kind))
        return self._stack[-1]

    def push(self, value: Any) -> None:
        if isinstance(value, int) and value.bit_length() > 64:
            raise RefusedError("holds an integer of more than 64 bits")
        self._stack.append(value)

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def since_mark(self) -> list[Any]:
        if not self._below:
            raise RefusedError("is not a sound pickle: it has no mark where one is needed")
        items, self._stack = self._stack, self._below.pop()
        return items

    def remember(self, index: int | None) -> None:
        value = self.top(object)
        # Bytes are storages, each used once: remembering them would keep the whole file in memory beside its tensors.
        # (Single ones are not: Python has each of them once, so pickles recall them.)
        is_storage = isinstance(value, bytes) and len(value) > 1
        self._memo[len(self._memo) if index is None else index] = _FORGOTTEN if is_storage else value

    def recall(self, index: int) -> None:
        if self._memo.get(index, _FORGOTTEN) is _FORGOTTEN:
            raise RefusedError("is not a sound pickle: it recalls what it did not store, or uses bytes twice")
        self.push(self._memo[index])

    def pack(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def add(self, items: list[Any]) -> None:
        self.top(set).update(_keys(items))

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise RefusedError("is not a sound pickle: a dict has a key without a value")
        self.top(dict).update(zip(_keys(items[::2]), items[1::2], strict=True))

    def name(self, module: str, name: str) -> None:
        qualified = _qualified(module, name)
        known = qualified in self._vocabulary.builders or self._vocabulary.is_class(qualified)
        if not known or not name.isidentifier():  # a dotted name would be looked up inside the module
            raise RefusedError(f"names {shown(qualified)}, which no {self._vocabulary.kind} needs")
        self.push(Name(qualified))

    def name_from_stack(self) -> None:
        name, module = self.pop(str), self.pop(str)
        self.name(module, name)

    def call(self) -> None:
        """REDUCE and NEWOBJ: one of our builders, or the record of an object."""
        args, callee = self.pop(tuple), self.pop(Name).value
        builder = self._vocabulary.builders.get(callee)
        self.push(builder(args) if builder else Record(callee, args))

    def build(self) -> None:
        """BUILD: the attributes of a record, which are data whatever they are called."""
        if len(self._stack) > 1 and isinstance(self._stack[-2], HasState):
            state, value = self.pop(), self.top(object)
            value.set_state(state)
            return
        state, record = self.pop(dict), self.top(Record)
        if record.state or not all(isinstance(key, str) for key in state):
            raise RefusedError(f"sets attributes of {shown(record)} twice, or attributes that have no name")
        record.state = state


def _forget(machine: _Machine, argument: Any) -> None:
    """What only helps a reader along: versions and frames."""


_STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": _forget,
    "FRAME": _forget,
    "MARK": lambda machine, _: machine.mark(),
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": lambda machine, _: machine.since_mark(),
    "BYTEARRAY8": lambda machine, value: machine.push(bytes(value)),
    "MEMOIZE": lambda machine, _: machine.remember(None),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(set()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.pack(1),
    "TUPLE2": lambda machine, _: machine.pack(2),
    "TUPLE3": lambda machine, _: machine.pack(3),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.add(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "GLOBAL": lambda machine, argument: machine.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name_from_stack(),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    **{f"{size}PUT": lambda machine, index: machine.remember(index) for size in ("BIN", "LONG_BIN")},
    **{f"{size}GET": lambda machine, index: machine.recall(index) for size in ("BIN", "LONG_BIN")},
    **{
        literal: lambda machine, value: machine.push(value)
        for literal in (
            *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
            *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
        )
    },
}


def load(file: IO[bytes], where: str, vocabulary: Vocabulary = CHECKPOINT) -> Any:
    """The object in a pickle: tensors on CPU, plain containers, `Record`s for objects and `Name`s for globals.

    Args:
        file: open for reading, seekable.
        where: how messages call it.

    Raises:
        UserError: not a whole pickle, a global outside the allow-list (by its name), an instruction no such file
            needs, or data that contradict each other. Nothing is run in any case.
    """
    machine = _Machine(vocabulary)
    try:
        return machine.run(_instructions(cast(IO[bytes], _Bounded(file)), _MAX_INSTRUCTIONS))
    except RefusedError as refusal:
        raise UserError(
            f"{where} {refusal} (at byte {machine.position}). It was refused and nothing in it was run: "
            f"{vocabulary.remedy}"
        ) from refusal
