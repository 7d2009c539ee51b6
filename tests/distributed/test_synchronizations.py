"""A step reads one value of the device on the host: the gradient norm. Counted on CPU by what is read from what."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imm_scale.parallel.deepspeed_engine import Engine
from tests import ranks
from tests.conftest import TINY
from tests.distributed.engines import opened

CASES = [
    ("zero.stage=0", "train.grad_clip=0.1"),
    ("zero.stage=1", "train.grad_clip=0.1"),
    ("zero.stage=2", "train.micro_batch_size=16"),
    ("zero.stage=3", "train.grad_clip=0.1"),
]


class Reads(TorchDispatchMode):
    """Counts scalars read from tensors that would be on the device: all but `host` and what follows from it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.host: dict[int, torch.Tensor] = {}  # held, so that no other tensor takes its id

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_host = bool(tensors) and all(id(tensor) in self.host for tensor in tensors)
        if function is torch.ops.aten._local_scalar_dense.default and not on_host:
            self.count += 1
        if on_host:
            self.host |= {id(leaf): leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


def _step(manifest: str, *case: str) -> tuple[int, int]:
    """Values that the host gets from the device in a step, and its waits for the whole device."""
    from deepspeed.accelerator import get_accelerator

    waits, reads = [], Reads()
    get_accelerator().synchronize = lambda *args: waits.append(args)
    plain = Engine._global_norm

    def norm(self: Engine) -> torch.Tensor:
        value = plain(self).clone()  # on a GPU `cpu()` makes another tensor, here it is the same
        reads.host[id(value)] = value
        reads.count += 1
        return value

    Engine._global_norm = norm
    with opened(*TINY, f"data.manifest={manifest}", *case) as (_, engine, steps):
        for _ in range(3):  # DeepSpeed's throughput timer would begin to wait at its third step
            engine.step(next(steps), 1e-3)
        batch = next(steps)
        waits.clear()
        reads.count = 0
        with reads:
            engine.step(batch, 1e-3)
        Engine._global_norm = plain
        return reads.count, len(waits)


def _each(manifest: str) -> list[tuple[int, int]]:
    return [_step(manifest, *case) for case in CASES]


def test_a_step_waits_for_the_gradient_norm_and_nothing_else(digits):
    for case, reads_and_waits in zip(CASES, ranks.run(_each, 1, digits)[0], strict=True):
        assert reads_and_waits == (1, 0), case
