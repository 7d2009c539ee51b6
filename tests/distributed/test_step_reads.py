"""How often a step of the training loop reads a value back from its tensors: on a GPU each is a wait."""

from typing import Any

import pytest

from tests import ranks
from tests.conftest import TINY
from tests.transfers import Transfers


def _reads(*argv: str) -> dict[int, dict[str, int]]:
    """By step: values read, by the file that asked for them."""
    from imm_scale.training.loop import Loop

    reads_by_step: dict[int, dict[str, int]] = {}
    plain = Loop._step

    def step(self: Any, loader: Any) -> None:
        with Transfers() as seen:
            plain(self, loader)
        reads_by_step[self.state.step] = dict(seen.reads)

    Loop._step = step  # type: ignore[method-assign]
    assert ranks.command("train", *argv) == 0
    return reads_by_step


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_step_reads_its_gradient_norm_and_the_summary_of_the_last(stage, digits, tmp_path):
    settings = [*TINY, f"data.manifest={digits}", f"run.dir={tmp_path}/run", f"zero.stage={stage}"]
    schedule = ["train.max_steps=8", "train.log_every=4", "train.checkpoint_every=1000"]
    for reads_by_step in ranks.run(_reads, 2, *settings, *schedule):
        # Stage 3 learns the order of its parameters in the first two steps; steps 4 and 8 write a record.
        for step in (3, 5, 6, 7):
            reads = reads_by_step[step]
            # From host memory, once an event of the step before has passed.
            assert reads.pop("imm_scale/parallel/consensus.py") == 1
            assert reads.pop("imm_scale/parallel/deepspeed_engine.py") == 1  # the norm
            # DeepSpeed looks at the norm that the engine has brought to the host (test_synchronizations.py).
            assert reads.pop("deepspeed/runtime/utils.py", 0) == (stage > 0)
            assert not reads, f"step {step} reads something else"
