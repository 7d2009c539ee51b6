"""An average of any relative width, made after training from those that a run's checkpoints hold.

Every checkpoint that was kept holds each average as it was then: so many points from which least squares over profiles
(`parallel/ema_profile.py`) makes another one (Karras et al. 2023, arXiv 2312.02696, section 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imm_scale import storage
from imm_scale.build import ModelSpec
from imm_scale.checkpoint import averages, export
from imm_scale.checkpoint.format import COMMITTED, Checkpoint, DamagedCheckpointError, committed_steps
from imm_scale.checkpoint.identity import differences
from imm_scale.checkpoint.origin import Origin
from imm_scale.config.load import from_yaml
from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.parallel import ema_profile
from imm_scale.parallel.ema_profile import Array, Fit

MAX_ERROR = 0.05  # of a profile: about as far as that of relative width 0.106 lies from that of 0.100
MAX_WIDTH = 12**-0.5  # of the average that weighs all steps alike
_WIDTHS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)  # what a refusal tries
_MAX_SKIPPED = 0.01  # share of steps without an update of unknown place, which adds below 0.01 to errors wherever it is
_CHUNK = 1 << 22  # elements made at once


@dataclass(frozen=True)
class Stored:
    """One average as one checkpoint holds it; `kind` counts the decays of the config."""

    checkpoint: Checkpoint
    kind: int
    state: str


class History:
    """The averages that a run kept up to a step.

    Args:
        run_dir: a run folder.
        step: of the last checkpoint to use; None the newest.

    Attributes:
        newest: the checkpoint of that step.
        stored: all averages of all checkpoints, by step.

    Raises:
        UserError: no such checkpoint, fewer than two averages, checkpoints of more than one run, or averages that were
            not kept in one way all along.
    """

    def __init__(self, run_dir: str, step: int | None = None):
        steps = [other for other in committed_steps(run_dir) if step is None or other <= step]
        if not steps or step not in (None, steps[-1]):
            wanted = "" if step is None else f" of step {step}"
            held = ", ".join(map(str, committed_steps(run_dir))) or "none"
            raise UserError(
                f"{run_dir} has no committed checkpoint{wanted}; it has {held}: name a run, and a step of it"
            )
        checkpoints = [Checkpoint.of_step(run_dir, other) for other in steps]
        self.newest = checkpoints[-1]
        self.config = from_yaml(self.newest.meta.config)
        for checkpoint in checkpoints:
            _check_same_run(checkpoint, self.newest, self.config)
            _check_clock(checkpoint, self.config)
        decays = self.config.ema.decays
        self.stored = [
            Stored(checkpoint, kind, state)
            for checkpoint in checkpoints
            for kind, state in enumerate(map(averages.states(checkpoint, decays).get, decays))
            if state is not None
        ]
        if len(self.stored) < 2:
            raise UserError(
                f"{run_dir} holds {len(self.stored)} average{'s' * (len(self.stored) != 1)}, too few to make another "
                "of: train with two (ema.decays), and keep more checkpoints (train.keep_every)"
            )

    def fit(self, width: float) -> Fit:
        """The nearest combination of `stored` to the power function of a relative width at `newest`."""
        last, ema = self.newest.meta.step, self.config.ema
        kept = [ema_profile.tracked(last, decay**self.config.ema_power, ema.warmup) for decay in ema.decays]
        target = ema_profile.power_function(last, width)
        log_decays = self._without_skipped(np.vstack([*kept, target]))
        kinds, steps = [s.kind for s in self.stored], [s.checkpoint.meta.step for s in self.stored]
        return ema_profile.fit(log_decays[:-1], kinds, steps, log_decays[-1])

    def _without_skipped(self, log_decays: Array) -> Array:
        """(K, n + 1): the steps whose batches were stepped over updated nothing."""
        batch = self.config.train.global_batch_size
        for first, end in self.newest.meta.skipped:
            log_decays[:, first // batch + 1 : end // batch + 1] = 0.0
        return log_decays

    def check(self, width: float, fit: Fit) -> None:
        """Raises UserError for a combination that is too far from what it should be, with the widths that are not."""
        if fit.error <= MAX_ERROR:
            return
        others = [f"{other:g}" for other in _WIDTHS if self.fit(other).error <= MAX_ERROR]
        instead = f"; {', '.join(others)} can be made of them" if others else ""
        raise UserError(
            f"--width {width:g} at step {self.newest.meta.step} is out of reach of the {self.described()}: the profile "
            f"would be off by {fit.error:.1%}, at most {MAX_ERROR:.0%} is allowed{instead}. Keep more checkpoints "
            "(train.keep_every) and averages of more lengths (ema.decays, ema.warmup)"
        )

    def described(self) -> str:
        """How many averages of which steps, in words."""
        steps = sorted({s.checkpoint.meta.step for s in self.stored})
        span = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
        return f"{len(self.stored)} averages in {len(steps)} checkpoint{'s' * (len(steps) > 1)} ({span})"


def _check_same_run(checkpoint: Checkpoint, newest: Checkpoint, config: Config) -> None:
    old = config if checkpoint.meta.config == newest.meta.config else from_yaml(checkpoint.meta.config)
    changed = differences(config, newest.meta.manifest_hash, old, checkpoint.meta.manifest_hash)
    if changed or checkpoint.shapes != newest.shapes:
        keys = ", ".join(f"{key} is {there} there and {here} here" for key, (there, here) in changed.items())
        raise UserError(
            f"{checkpoint.url} is of another run than {newest.url}: {keys or 'their nets differ'}. Move it elsewhere"
        )
    if old.ema != config.ema or old.train.global_batch_size != config.train.global_batch_size:
        raise UserError(
            f"{checkpoint.url} kept its averages otherwise than {newest.url} (ema, train.global_batch_size): no width "
            "can be made of both. Give a --step before the change, or move the older checkpoints elsewhere"
        )


def _check_clock(checkpoint: Checkpoint, config: Config) -> None:
    """Which steps updated the averages must be known but for a few, whose place matters little."""
    meta, batch = checkpoint.meta, config.train.global_batch_size
    if meta.images_seen != meta.step * batch:
        raise UserError(f"{checkpoint.url}: train.global_batch_size changed on its way, so no width can be made of it")
    stepped_over = sum(min(end, meta.images_seen) - min(first, meta.images_seen) for first, end in meta.skipped)
    skipped = meta.step - stepped_over // batch - meta.optimizer_steps
    if skipped > _MAX_SKIPPED * meta.step:
        raise UserError(
            f"{checkpoint.url}: {skipped} of {meta.step} steps were skipped, and which ones is not recorded; up to "
            f"{_MAX_SKIPPED:.0%} their averages are known well enough to make another of"
        )


def combine(stored: Sequence[Stored], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """{parameter: fp32 tensor of its shape}: sums of averages in fp64, read range by range.

    Raises:
        UserError: the run has removed a checkpoint meanwhile.
    """
    weights = {}
    for name, shape in stored[0].checkpoint.shapes.items():
        flat = torch.empty(int(np.prod(shape, dtype=np.int64)))
        for start in range(0, flat.numel(), _CHUNK):
            part = flat[start : start + _CHUNK]
            part.copy_(_combined(stored, coefficients, name, start, part.numel()))
        weights[name] = flat.view(shape)
    return weights


def _combined(stored: Sequence[Stored], coefficients: Sequence[float], name: str, start: int, numel: int) -> Tensor:
    """(numel,), fp64."""
    total = torch.zeros(numel, dtype=torch.float64)
    for average, coefficient in zip(stored, coefficients, strict=True):
        try:
            total.add_(average.checkpoint.read(average.state, name, start, numel), alpha=coefficient)
        except (FileNotFoundError, DamagedCheckpointError) as error:
            if storage.exists(storage.join(average.checkpoint.url, COMMITTED)):
                raise
            raise UserError(f"the run has removed {average.checkpoint.url} meanwhile: start again") from error
    return total


def write(
    source: str, out: str, width: float, step: int | None = None, format: str = "safetensors", vae: str | None = None
) -> str:
    """Writes the average of a relative width at a step of a run (None: its newest) as `export.write` does.

    Returns:
        What it was made of and how well, in words.

    Raises:
        UserError: no run folder, a width that is out of range or not reached to `MAX_ERROR`, or as `History`.
    """
    export.check_out(out, format, vae)
    if not 0.0 < width < MAX_WIDTH:
        raise UserError(f"--width {width:g} must lie between 0 and {MAX_WIDTH:.3f}, where all steps weigh alike")
    if export.is_export(source) or export.is_checkpoint(source):
        raise UserError(f"--width {width:g} takes averages of several steps: name the run folder, not {source}")
    history = History(source, step)
    fit = history.fit(width)
    history.check(width, fit)
    meta = history.newest.meta
    weights = combine(history.stored, fit.coefficients)
    origin = Origin(history.config.run.name, meta.step, meta.images_seen, width=width)
    export.write(ModelSpec.from_json(meta.spec), weights, out, format, origin, vae)
    return f"width {width:g} at step {meta.step} from {history.described()}: its profile is off by {fit.error:.2g}"
