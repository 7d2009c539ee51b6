"""What any backbone costs, counted by running it on tensors without data.

Multiply-adds come from `FlopCounterMode` on the meta device. What a pass keeps, moves and launches is counted on fake
tensors, which are meta tensors that claim a device: autocast and fused attention choose as they would on it.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from imm_scale.errors import UserError
from imm_scale.models.base import Architecture

_OWN = frozenset(vars(nn.Module()))  # attributes that every module has
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")  # bound by arithmetic rather than by memory traffic
_SAMPLES = 32
_TOKENS = 8192  # of samples of many tokens so many at once: a long vocabulary is taken in pieces, each of them counted
_LAUNCH_NOTHING = ("detach", "_unsafe_view", "empty", "empty_like", "empty_strided")


class _Shapes(TorchFunctionMode):
    """Initializes nothing: half the time to build a net on the meta device, where there is nothing to initialize."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


@lru_cache(maxsize=64)
def on_meta(net: Architecture) -> Any:
    """The net on the meta device: shapes without memory."""
    with torch.device("meta"), _Shapes():
        return net.build()


def elements(net: Architecture) -> int:
    """Of one sample as the net sees it."""
    with torch.device("meta"):
        return int(net.example(1)[0].numel())


@cache
def forward_multiply_adds(net: Architecture) -> int:
    """Multiply-adds of one forward pass of one sample, embedders included; of blocks as if they were drawn at once.

    Raises:
        UserError: the net does not run on meta tensors.
    """
    return _counted(net.at_once, lambda model, example: model(*example))


class StreamCosts(NamedTuple):
    """Multiply-adds of one pass of one sample through a net of several blocks, what masks hide left out."""

    clean: int
    branch: int


@cache
def stream_multiply_adds(net: Architecture) -> StreamCosts:
    """Of the clean stream and of a branch, told apart by passes of one branch and of two. Raises UserError."""
    assert net.sequence_blocks > 1, "a net that draws samples at once has one stream"

    def pair(model: Any, example: tuple[Any, ...]) -> None:
        x, c_noise, second, label, *_, context = example
        model.pair(x, x, c_noise, c_noise, second, second, label, context=context)

    one = _counted(net, lambda model, example: model(*example))
    branch = _counted(net, pair) - one
    of_clean, of_branch = net.hidden
    return StreamCosts(one - branch - of_clean, branch - of_branch)


class TokenCosts(NamedTuple):
    """Multiply-adds of a token net on one sequence of T tokens.

    Attributes:
        states: of all positions.
        head: of a law of all T tokens; of a causal net, of T laws, one for the block after each place.
    """

    states: int
    head: int


@cache
def token_multiply_adds(net: Architecture) -> TokenCosts:
    """Of the states, and of the head beside them. Raises UserError."""
    states = _counted(net, lambda model, example: model(*example[:2]))
    return TokenCosts(states, forward_multiply_adds(net) - states)


def _counted(net: Architecture, run: Callable[[Any, tuple[Any, ...]], Any]) -> int:
    """Multiply-adds of what `run` does with the net and its example of one sample."""
    model = on_meta(net)
    with torch.device("meta"):
        example = net.example(1)
    with (
        _explained(type(model)),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),  # which takes attention apart into the products that are counted
        FlopCounterMode(display=False) as counter,
        _once_of_each_kind(model.blocks, counter.get_total_flops) as skipped,
    ):
        run(model, example)
    return (counter.get_total_flops() + sum(skipped)) // 2


@contextmanager
def _explained(net: type) -> Iterator[None]:
    """Raises UserError where a net needs data, or an operator that knows no tensors without."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{net.__name__} does not run on tensors without data, on which its cost is counted ({reason}): let "
            "nothing in its forward pass read values, and give operators of its own a fake implementation "
            "(torch.library.register_fake)"
        ) from error


@contextmanager
def _once_of_each_kind(blocks: Sequence[nn.Module], cost: Callable[[], int]) -> Iterator[list[int]]:
    """Of blocks that are alike only the first runs; the others take its output, and their costs are listed."""
    known: dict[Any, tuple[int, Any]] = {}
    skipped: list[int] = []

    def run(kind: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        key = kind, repr([tuple(x.shape) if isinstance(x, Tensor) else x for x in tree_leaves((args, kwargs))])
        if key in known:
            skipped.append(known[key][0])
        else:
            before = cost()
            output = forward(*args, **kwargs)
            known[key] = cost() - before, output
        return known[key][1]

    for block in blocks:
        block.forward = partial(run, _kind(block), block.forward)
    try:
        yield skipped
    finally:
        for block in blocks:
            del block.forward


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """All that shapes a module: types, settings and shapes of its parts. Settings that do not print tell it apart."""
    return tuple(
        (
            type(part),
            repr({key: value for key, value in vars(part).items() if key not in _OWN}),
            tuple(
                (name, tuple(p.shape))
                for name, p in (*part._parameters.items(), *part._buffers.items())
                if p is not None
            ),
        )
        for part in block.modules()
    )


@dataclass(frozen=True)
class Footprint:
    """What passes of one sample keep, move and launch. Bytes, but for operators.

    Attributes:
        kept_by_block: for the backward pass, mean of the blocks, without 16-bit copies of weights.
        kept_around: the same outside the blocks.
        block_input: the first input of a block, which activation checkpointing keeps.
        widest: most that is alive at once inside a block without gradient, its input included.
        workspace: most that a backward pass holds beside what the forward pass kept.
        moved: read and written by operators other than matrix products, in a forward pass.
        block_operators, other_operators: launches of a forward pass.
        backward_operators: launches of a backward pass.
    """

    kept_by_block: float
    kept_around: float
    block_input: float
    widest: float
    workspace: float
    moved: float
    block_operators: float
    other_operators: float
    backward_operators: float


@cache
def footprint(net: Architecture, half: bool, replicas: int = 1) -> Footprint:
    """Counts a sample's bytes from the difference of two batches, which leaves out what all samples share.

    Batches are large, so that the most held at once is what samples hold, and not gradients of weights. Of branches
    apart from the transformer there are so many replicas.
    """
    size = max(4, min(_SAMPLES, _TOKENS // getattr(net, "tokens", 1)))
    few, many = (vars(_footprint(net, half, samples, replicas)) for samples in (size, 2 * size))
    of_a_sample = {name: (many[name] - few[name]) / size for name in few}
    return Footprint(**{**of_a_sample, **{name: few[name] for name in few if name.endswith("_operators")}})


def _footprint(net: Architecture, half: bool, samples: int, replicas: int) -> Footprint:
    """Of so many samples together, what they share included."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        model, example = net.build(), _replicated(net.example(samples), replicas)
        blocks = list(model.blocks)
        with _explained(type(model)):
            with torch.no_grad(), _Watch(blocks) as still:
                model(*example)
            with _Watch(blocks) as forward:
                out = model(*example)
        for parameter in model.parameters():  # gradients of weights go as they come: they are counted elsewhere
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with _Watch(blocks) as backward:
            _total(out).backward()
    parameters = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    inside, around = (
        {k: n for k, n in saved.items() if k not in parameters} for saved in (forward.inside, forward.around)
    )
    return Footprint(
        kept_by_block=sum(inside.values()) / len(blocks),
        kept_around=sum(n for key, n in around.items() if key not in inside),
        block_input=forward.block_input,
        widest=still.widest + still.block_input,
        workspace=backward.peak,
        moved=still.moved,
        block_operators=still.block_operators,
        other_operators=still.operators - still.block_operators,
        backward_operators=backward.operators,
    )


def _replicated(example: tuple[Any, ...], replicas: int) -> tuple[Any, ...]:
    """An example whose branches, but not what they are given, have so many times the samples."""
    if replicas == 1:
        return example
    branch = (None if x is None else x.repeat(replicas, *[1] * (x.dim() - 1)) for x in example[:4])
    return (*branch, *example[4:])


@dataclass(frozen=True)
class TangentFootprint:
    """What a pass with a tangent keeps and holds of one sample, in bytes.

    Attributes:
        held: most that is alive at once beside what the value keeps, of a tangent without gradient.
        kept_by_block, kept_around: for the backward pass, of value and tangent where both carry a gradient.
        workspace: most that is alive at once beside that, in this pass or on its way back.
    """

    held: float
    kept_by_block: float
    kept_around: float
    workspace: float


@cache
def tangent_footprint(net: Architecture, half: bool) -> TangentFootprint:
    """As `footprint`, of `Backbone.with_tangent`, without and with gradient of the tangent.

    Raises:
        UserError: the net's tangent does not run on tensors without data.
    """
    few, many = (vars(_tangent_footprint(net, half, samples)) for samples in (_SAMPLES, 2 * _SAMPLES))
    return TangentFootprint(**{name: (many[name] - few[name]) / _SAMPLES for name in few})


def _tangent_footprint(net: Architecture, half: bool, samples: int) -> TangentFootprint:
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        model = net.build()
        x, c_noise, second, label, *more = net.example(samples)
        moves = None if second is None else torch.ones_like(second)
        inputs = (x, torch.ones_like(x), c_noise, torch.ones_like(c_noise), second, moves, label)
        told: dict[str, Any] = {"guidance": more[-1]} if model.takes_guidance else {}
        blocks = list(model.blocks)
        weights = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        with _explained(type(model)), _Watch(blocks) as still:
            model.with_tangent(*inputs, **told)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with _Watch(blocks) as live:
            value, derivative = model.with_tangent(*inputs, **told, live=True)
            loss = (value + derivative).sum()
            del value, derivative
            loss.backward()
    inside = {k: n for k, n in live.inside.items() if k not in weights}
    around = {k: n for k, n in live.around.items() if k not in weights and k not in inside}
    kept = {k: n for k, n in (still.inside | still.around).items() if k not in weights}
    return TangentFootprint(
        held=still.peak - sum(kept.values()),
        kept_by_block=sum(inside.values()) / len(blocks),
        kept_around=sum(around.values()),
        workspace=live.peak - sum(inside.values()) - sum(around.values()),
    )


def _total(out: Any) -> Tensor:
    """The sum of all that a net answers with a gradient: a tensor, or what its head says."""
    leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([leaf.sum() for leaf in leaves]).sum()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Watch(TorchDispatchMode):
    """Counts what runs while it is entered: operators, bytes moved, bytes alive, bytes kept for a backward pass.

    Attributes:
        inside, around: bytes by storage, kept in the blocks and outside.
        widest: most bytes that a block allocated and held at once.
        peak: the same of all that ran.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.inside: dict[int, int] = {}
        self.around: dict[int, int] = {}
        self.block_input = self.widest = self.peak = self.moved = self.operators = self.block_operators = 0
        self._blocks, self._handles = blocks, []  # type: ignore[var-annotated]
        self._in_block, self._alive, self._alive_before = False, 0, 0
        self._held: list[Tensor] = []  # else storages of freed tensors would be taken for new ones
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self._saving = saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def __enter__(self) -> Self:
        for block in self._blocks:
            self._handles.append(block.register_forward_pre_hook(self._enter_block))
            self._handles.append(block.register_forward_hook(self._leave_block))
        self._saving.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._saving.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _enter_block(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.block_input = _bytes(args[0])
        self._in_block, self._alive_before = True, self._alive

    def _leave_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._in_block = False

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        (self.inside if self._in_block else self.around)[storage._cdata] = storage.nbytes()
        return tensor

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if not _launches_nothing(function):
            self.operators += 1
            self.block_operators += self._in_block
            if function._schema.name.removeprefix("aten::") not in _PRODUCTS:
                self.moved += sum(_bytes(x) for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._allocated(leaf.untyped_storage())
        return out

    def _allocated(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self._alive += size
        weakref.finalize(storage, self._freed, size)
        self.peak = max(self.peak, self._alive)
        if self._in_block:
            self.widest = max(self.widest, self._alive - self._alive_before)

    def _freed(self, size: int) -> None:
        self._alive -= size


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _launches_nothing(function: Any) -> bool:
    """Views, memory not yet written, and questions to a tensor (prim)."""
    aliases = [returned.alias_info for returned in function._schema.returns if returned.alias_info is not None]
    name = function._schema.name.removeprefix("aten::")
    return function.namespace == "prim" or name in _LAUNCH_NOTHING or any(not alias.is_write for alias in aliases)
