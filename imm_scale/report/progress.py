"""How a run's samples come to be: a picture of each checkpoint, always from the same noises, kept in RUN/progress/."""

import hashlib
import html
import io

import numpy as np
import torch

from imm_scale import storage
from imm_scale.checkpoint import format as checkpoints
from imm_scale.config.schema import SamplingConfig
from imm_scale.evaluation import gallery
from imm_scale.report.page import image
from imm_scale.sampling.job import Model
from imm_scale.sampling.outputs import image_grid
from imm_scale.sampling.source import Source, config_of

_FOLDER = "progress"
_ROWS = 4  # the fewest of sampling.steps, which cost least
_SHOWN = 8  # pictures of a run on a page


def draw_missing(run_dir: str, device: torch.device) -> None:
    """Draws what the committed checkpoints have no picture of yet, oldest first.

    One that the run removes meanwhile is left out.

    Raises:
        UserError: samples that are not finite, or no decoder for them.
    """
    for step in checkpoints.committed_steps(run_dir):
        try:
            name = _name(run_dir, step)
            if name not in _names(run_dir):
                storage.write_bytes(storage.join(run_dir, _FOLDER, name), _picture(run_dir, step, device))
                _remove_others(run_dir, name)
        except (checkpoints.DamagedCheckpointError, FileNotFoundError):
            if step in checkpoints.committed_steps(run_dir):
                raise


def _name(run_dir: str, step: int) -> str:
    """File name of a checkpoint's picture; it has a hash of the checkpoint, for a step can be trained anew."""
    committed = storage.read_bytes(storage.join(checkpoints.folder(run_dir, step), checkpoints.COMMITTED))
    return f"step-{step:08d}-{hashlib.sha256(committed).hexdigest()[:12]}.png"


def _names(run_dir: str) -> list[str]:
    names = storage.list_names(storage.join(run_dir, _FOLDER))
    return sorted(name for name in names if name.startswith("step-") and name.endswith(".png"))


def _step(name: str) -> int:
    return int(name.split("-")[1])


def _remove_others(run_dir: str, name: str) -> None:
    """Removes what was drawn of this step, and of later ones, before the run was trained anew."""
    for other in _names(run_dir):
        if other != name and _step(other) >= _step(name):
            storage.remove(storage.join(run_dir, _FOLDER, other))


def _rows(sampling: SamplingConfig) -> list[int]:
    return sorted(set(sampling.steps))[:_ROWS]


def _picture(run_dir: str, step: int, device: torch.device) -> bytes:
    """PNG with a row for each step count and a column for each noise and its class."""
    source = Source(run_dir, run_dir, step)
    sampling = config_of(source, [], ["sampling."]).sampling
    model = Model.load(source, sampling, device)
    steps = _rows(sampling)
    drawn = [model.decode(gallery.draw(model, sampling, n, gallery.COLUMNS)).numpy() for n in steps]
    rows = [row for row, images in enumerate(drawn) for _ in images]
    stream = io.BytesIO()
    image_grid(np.concatenate(drawn), rows, cell=32).save(stream, "PNG")
    return stream.getvalue()


def section(run_dir: str, sampling: SamplingConfig) -> str:
    """HTML of a run's pictures, evenly spread over what there are, the newest first; "" where there are none."""
    names = _names(run_dir)
    if not names:
        return ""
    chosen = [names[i] for i in np.linspace(len(names) - 1, 0, min(len(names), _SHOWN)).round().astype(int)]
    counts = ", ".join(map(str, _rows(sampling)))
    parts = []
    for name in chosen:
        picture = image("image/png", storage.read_bytes(storage.join(run_dir, _FOLDER, name)), name)
        parts.append(f"<figure>{picture}<figcaption>after {_step(name):,} steps of training</figcaption></figure>")
    return f'<p>Rows: {html.escape(counts)} sampling steps.</p><div class="progress">{"".join(parts)}</div>'
