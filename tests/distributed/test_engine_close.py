"""A closed engine holds nothing: no module, no parameter, no moment, at any ZeRO stage, also after rewinds."""

import weakref

import pytest
import torch

from tests import measure, ranks
from tests.conftest import TINY
from tests.distributed.engines import opened
from tests.resume import faults

CASES = (
    ("zero.stage=0",),
    ("zero.stage=1", "zero.offload=optimizer"),
    ("zero.stage=2",),
    ("zero.stage=3", "train.activation_checkpointing=true"),
    ("zero.stage=3", "zero.offload=parameters"),
    ("zero.stage=1", "precision=bf16"),
    ("zero.stage=3", "precision=bf16"),
)


def _alive_after_close(manifest: str, case: tuple[str, ...]) -> list[str]:
    """What outlives `close`, though the caller keeps the Engine itself."""
    with opened(*TINY, f"data.manifest={manifest}", *case) as (_, engine, steps):
        for _ in range(4):  # DeepSpeed learns the order of modules in the first two, and then remembers more of them
            engine.step(next(steps), 1e-3)
        module = engine._module
        references = {
            "net": weakref.ref(module.net.model),
            "module": weakref.ref(module),
            "DeepSpeed's engine": weakref.ref(engine._engine),
            "DeepSpeed's optimizer": weakref.ref(engine._optimizer),
            "optimizer": weakref.ref(engine._base_optimizer()),
            **{name: weakref.ref(parameter) for name, parameter in module.named_parameters()},
        }
        del module
    return [name for name, reference in references.items() if reference() is not None]


def _alive_after_each(manifest: str) -> dict[tuple[str, ...], list[str]]:
    linear = torch.nn.functional.linear
    alive = {case: _alive_after_close(manifest, case) for case in CASES}
    assert torch.nn.functional.linear is linear  # stage 3 has its own
    return alive


@pytest.mark.parametrize("size", [1, 2])
def test_nothing_outlives_close(size, digits):
    for alive in ranks.run(_alive_after_each, size, digits):
        assert alive == {case: [] for case in CASES}


def _bytes_of_each_start(*argv: str) -> tuple[list[int], list[int]]:
    """Bytes alive before and after each state of a run was made; steps 23 to 25 spike."""
    from imm_scale.training import trainer

    before, after = [], []

    class Measured(trainer.State):
        def __init__(self, *args, **kwargs):
            before.append(measure.live_bytes())
            super().__init__(*args, **kwargs)
            after.append(measure.live_bytes())

    trainer.State = Measured
    code, output = faults.spikes([23, 24, 25], *argv)
    assert code == 0, output
    return before, after


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_three_rewinds_hold_no_more_than_the_first_start(stage, digits, tmp_path):
    settings = ["train", *TINY, "model.width=64", f"data.manifest={digits}", f"run.dir={tmp_path}/run"]
    settings += ["train.max_steps=27", "train.checkpoint_every=20", "train.spike_factor=20", f"zero.stage={stage}"]
    settings += ["zero.extra.zero_optimization.reduce_bucket_size=100000"]  # DeepSpeed's own would hide all else
    before, after = ranks.run(_bytes_of_each_start, 2, *settings)[1]
    assert len(after) == 4, "three rewinds"
    assert max(before) < 0.05 * after[0], f"bytes alive when the next engine is built: {before}, of {after[0]}"
    assert max(after) <= 1.05 * after[0]
