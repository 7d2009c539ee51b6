"""A torch profiler trace of a few steps."""

import logging
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from imm_scale import storage
from imm_scale.parallel.world import World

log = logging.getLogger("imm_scale")
_FOLDER = "profile"


class Profiler:
    """Traces steps `first` to `last` on rank 0 into RUN/profile/steps-F-L.json, for chrome://tracing or Perfetto.

    Args:
        steps: [first, last], or empty to trace none.
    """

    def __init__(self, run_dir: str, steps: Sequence[int], world: World):
        self._run_dir = run_dir
        self._first, self._last = (steps[0], steps[1]) if steps and world.is_main else (0, -1)
        self._profile: Any = None

    def before_step(self, step: int) -> None:
        if self._first <= step <= self._last and self._profile is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profile.start()
            self._began = step

    def after_step(self, step: int) -> None:
        if self._profile is not None and step >= self._last:
            self.finish(step)

    def finish(self, step: int) -> None:
        """Writes what was traced so far, if anything; call when the loop is left."""
        if self._profile is None:
            return
        self._profile.stop()
        url = storage.join(self._run_dir, _FOLDER, f"steps-{self._began}-{step}.json")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "trace.json")
            self._profile.export_chrome_trace(path)
            with open(path, "rb") as file:
                storage.write_bytes(url, file.read())
        log.info("trace of steps %d to %d: %s", self._began, step, url)
        self._profile = None
