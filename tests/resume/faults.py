"""Faults that are put into one rank of a training run, keyed by the clock so that a rerun meets them again."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests import ranks


class _Multiplied(torch.autograd.Function):
    """The value as it is; its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.factor, None


def _rank() -> int:
    return int(os.environ["RANK"])


def _change_loss(change: Callable[[Tensor, int], Tensor], batch_size: int, rank: int) -> None:
    """Puts `change(loss, step)` between the loss and DeepSpeed on one rank."""
    from imm_scale.parallel.deepspeed_engine import LossModule

    plain = LossModule.forward

    def forward(self: Any, x: Tensor, label: Tensor, ordinal: Tensor, weight: Tensor) -> Tensor:
        loss = plain(self, x, label, ordinal, weight)
        return change(loss, int(ordinal[0]) // batch_size + 1) if _rank() == rank else loss

    LossModule.forward = forward  # type: ignore[method-assign]


def _change_batches(change: Callable[[Any], None], rank: int) -> None:
    from imm_scale.data.loader import Loader

    plain = Loader.__next__

    def following(self: Any) -> Any:
        batch = plain(self)
        if _rank() == rank:
            change(batch)
        return batch

    Loader.__next__ = following  # type: ignore[method-assign]


def nan_gradient_and_inf_batch(*argv: str) -> int:
    """Rank 1's gradient is NaN at step 3; a sample of its third group is Inf at step 5 (batches of 64, M = 4)."""

    def spoil(batch: Any) -> None:
        if batch.images_seen == 4 * 64:
            batch.x[2 * 4 + 1] = torch.inf

    _change_loss(lambda loss, step: _Multiplied.apply(loss, torch.nan if step == 3 else 1.0), 64, rank=1)
    _change_batches(spoil, rank=1)
    return ranks.command(*argv)


def nan_for_ever(*argv: str) -> tuple[int, str]:
    """From step 3 on every gradient of rank 1 is NaN."""
    _change_loss(lambda loss, step: _Multiplied.apply(loss, torch.nan if step >= 3 else 1.0), 64, rank=1)
    return ranks.command_and_output(*argv)


def spikes(steps: list[int], *argv: str) -> tuple[int, str]:
    """Loss and gradient of rank 1 are a thousandfold at these steps, whenever their batches are trained on."""
    _change_loss(lambda loss, step: loss * (1000.0 if step in steps else 1.0), 64, rank=1)
    return ranks.command_and_output(*argv)


def spikes_after_a_failed_save(steps: list[int], failing: int, *argv: str) -> tuple[int, str]:
    """As `spikes`, and rank 1 cannot write its part of the checkpoint of one step before."""
    from imm_scale.checkpoint import format as checkpoints

    write = checkpoints.write_rank

    def refused(url: str, *args: Any) -> None:
        if _rank() == 1 and url.endswith(f"step-{failing:08d}"):
            raise OSError("no room")
        write(url, *args)

    checkpoints.write_rank = refused
    return spikes(steps, *argv)


def stepping_over(step: int, *argv: str) -> int:
    """Leaves out one batch from the beginning, without any guard."""
    from imm_scale.training import step_guard

    step_guard.is_stepped_over = lambda ranges, images_seen: images_seen == (step - 1) * 64  # type: ignore[assignment]
    return ranks.command(*argv)


def sleeps_in_the_loader(*argv: str) -> int:
    """Rank 1 never gets the batch of step 4."""

    def sleep(batch: Any) -> None:
        if batch.images_seen == 3 * 64:
            time.sleep(1000)

    _change_batches(sleep, rank=1)
    return ranks.command(*argv)


def out_of_memory(*argv: str) -> tuple[int, str]:
    """Rank 1's GPU is full at step 3."""

    def change(loss: Tensor, step: int) -> Tensor:
        if step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of ...")
        return loss

    _change_loss(change, 64, rank=1)
    return ranks.command_and_output(*argv)
