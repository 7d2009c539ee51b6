"""How many operators a micro-batch launches around the DiT's blocks: `python -m benchmarks.operators`.

Counted on CPU, over the loss and its backward pass, by a dispatch mode: what is not a view is a launch on a GPU. Philox
takes its tensor path, as there; a compiled graph counts the kernels that were generated for it. What does not grow with
the depth is around the blocks, embedders and last layer included.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from imm_scale import fusion, rng
from imm_scale.methods.base import Method
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.flow_matching import FlowMatching, FlowMatchingConfig
from imm_scale.methods.imm import ImmConfig, InductiveMomentMatching
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.models.dit import DiT, DiTConfig
from imm_scale.parallel.deepspeed_engine import LossModule

METHODS: dict[str, Method] = {
    "imm": InductiveMomentMatching(ImmConfig().resolved("fp32")),
    "flow_matching": FlowMatching(FlowMatchingConfig().resolved("fp32")),
}
_SAMPLES, _WIDTH, _SIDE = 8, 32, 8
_LAUNCH_NOTHING = ("aten::detach", "aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided")


class Operators(TorchDispatchMode):
    """Counts, by name, the operators called since it was entered: neither views nor what compiled graphs do inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_view(function):
            self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


def _is_view(function: Any) -> bool:
    aliases = [returned.alias_info for returned in function._schema.returns if returned.alias_info is not None]
    return function._schema.name in _LAUNCH_NOTHING or any(not alias.is_write for alias in aliases)


@dataclass(frozen=True)
class Launches:
    """Of one micro-batch, forward and backward.

    Attributes:
        around: operators around the blocks.
        a_block: operators of one block, over all its passes.
        graphs: kernels of compiled graphs, all of them around the blocks.
    """

    around: int
    a_block: int
    graphs: int


def launches(method: str, compiled: bool, half: bool = False, checkpointing: bool = False) -> Launches:
    """Counts them on nets of one block and of two.

    Args:
        method: `imm` or `flow_matching`.
        compiled: draws and loss as graphs, as on a GPU with triton; otherwise one operator after the other.
        half: under bf16 autocast.
        checkpointing: activations of blocks are computed again.
    """
    from torch._inductor import metrics

    torch._dynamo.reset()
    with _as_on_a_gpu(compiled):
        before = metrics.generated_kernel_count
        one = _operators(method, 1, half, checkpointing)
        graphs = metrics.generated_kernel_count - before
        two = _operators(method, 2, half, checkpointing)
        # The graphs serve any net: nothing was compiled for the second.
        assert metrics.generated_kernel_count - before == graphs
    return Launches(2 * one - two, two - one, graphs)


@contextmanager
def _as_on_a_gpu(compiled: bool) -> Iterator[None]:
    with fusion.override(compiled), patch.object(rng, "_by_numpy", lambda tensor: False):
        yield


def _operators(method: str, depth: int, half: bool, checkpointing: bool) -> int:
    """Of the second micro-batch: the first compiles. Gradients are gone in between, as DeepSpeed takes them away."""
    net = DiT(DiTConfig(_WIDTH, depth, 2, 2, 4, _SIDE, _SIDE, num_classes=10, second_time=method == "imm"))
    net.activation_checkpointing = checkpointing
    second_time = "s" if net.config.second_time else "none"
    flow_map = FlowMap(net, OTFlowMatching(), second_time=second_time, null_label=net.null_label)
    module = LossModule(flow_map, METHODS[method], seed=0)
    groups = _SAMPLES // METHODS[method].group_size
    x, label = torch.randn(_SAMPLES, 4, _SIDE, _SIDE), torch.zeros(_SAMPLES, dtype=torch.int64)
    weight = torch.ones(groups)
    for ordinal in torch.arange(2 * _SAMPLES).split(_SAMPLES):
        module.zero_grad(set_to_none=True)
        with Operators() as operators:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = module(x, label, ordinal, weight)
            loss.backward()
    return operators.counts.total()


def main() -> None:
    for method in METHODS:
        for compiled in (False, True):
            counts = launches(method, compiled)
            print(
                f"{method:<14} {'compiled' if compiled else 'eager':<9} {counts.around + counts.graphs} around the "
                f"blocks ({counts.graphs} of them in graphs), {counts.a_block} a block"
            )


if __name__ == "__main__":
    main()
