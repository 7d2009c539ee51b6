"""A page that keeps up with runs: written again and again until they have ended."""

import time
from collections.abc import Callable, Sequence
from typing import Literal

from imm_scale.checkpoint import format as checkpoints
from imm_scale.checkpoint import run_folder
from imm_scale.errors import UserError
from imm_scale.evaluation.records import read_evaluations
from imm_scale.evaluation.watch import ENDED
from imm_scale.report import runs

Until = Literal["trained", "evaluated"]


def watch(
    run_dirs: Sequence[str],
    out: str,
    until: Until,
    draw: Callable[[str], None] | None,
    announce: Callable[[str], None],
    poll: float,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Writes the page every `poll` seconds, and a last time when all runs have ended.

    Until then the page reloads itself in a browser. Runs may start after it does.

    Args:
        until: whether a run ends with its training, or with its last checkpoint measured at all of
            evaluation.steps.
        draw: draws what a run's new checkpoints have no picture of (`progress.draw_missing`); None draws nothing.
    """
    drawing = list(run_dirs) if draw is not None else []
    while True:
        # Looked at before the page is written, so that the last page has all that there is.
        ended = all(_has_ended(run_dir, until) for run_dir in run_dirs)
        for run_dir in list(drawing):
            if not _draw(draw, run_dir, announce):
                drawing.remove(run_dir)
        runs.write_report(run_dirs, out, None if ended else poll)
        if ended:
            return
        pause(poll)


def _has_ended(run_dir: str, until: Until) -> bool:
    state = run_folder.read_status(run_dir).get("state")
    if state not in ENDED or state == "failed" or until == "trained":
        return state in ENDED
    wanted = set(runs.read_run(run_dir).config.evaluation.steps)
    last = max(checkpoints.committed_steps(run_dir), default=0)
    measured = [result for e in read_evaluations(run_dir) if e["step"] == last for result in e["results"]]
    return wanted <= {result["steps"] for result in measured}


def _draw(draw: Callable[[str], None] | None, run_dir: str, announce: Callable[[str], None]) -> bool:
    """Whether it worked: what a user can mend, or a net that has diverged, must not end the page as well."""
    assert draw is not None
    try:
        draw(run_dir)
    except UserError as error:
        announce(f"no more samples are drawn of {run_dir}: {error}")
        return False
    return True
