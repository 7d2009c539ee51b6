"""Pictures of what a model draws: the same noises at other steps, checkpoints and sizes; nearest training images.

RUN/gallery/ holds gallery.json and a PNG per strip; `section` is what the report shows of it.
"""

import base64
import dataclasses
import html
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imm_scale import storage
from imm_scale.checkpoint.format import committed_steps
from imm_scale.config.schema import Config, GuideConfig, SamplingConfig
from imm_scale.data.dataset import REFERENCE_POSTERIOR, Dataset, read_indexed
from imm_scale.errors import UserError
from imm_scale.evaluation import networks
from imm_scale.evaluation.extractors import Extractor
from imm_scale.evaluation.metrics import neighbours
from imm_scale.evaluation.records import arithmetic
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World
from imm_scale.sampling.draw import Drawer, plan_of
from imm_scale.sampling.job import Model
from imm_scale.sampling.source import Source

COLUMNS = 10  # samples of a strip
OLDER_CHECKPOINTS = 4
NEAREST = 3
_COMPARED = 1000  # training images whose own nearest neighbours are looked for
_FOLDER = "gallery"


@dataclass(frozen=True)
class Strip:
    """Some images in a row, and what they are."""

    caption: str
    images: np.ndarray

    def png(self) -> bytes:
        """The row as a PNG, small images enlarged without smoothing."""
        _, height, width, channels = self.images.shape
        row = np.full((height, len(self.images) * (width + 1) - 1, channels), 128, np.uint8)
        for i, image in enumerate(self.images):
            row[:, i * (width + 1) : i * (width + 1) + width] = image
        picture = Image.fromarray(row.squeeze(-1) if channels == 1 else row)
        factor = max(1, -(-48 // height))
        stream = io.BytesIO()
        size = (picture.width * factor, picture.height * factor)
        picture.resize(size, Image.Resampling.NEAREST).save(stream, "PNG")
        return stream.getvalue()


def write(
    source: Source, others: Sequence[Source], config: Config, world: World, announce: Callable[[str], None]
) -> None:
    """Draws and writes the gallery of a run; rank 0 does it.

    Args:
        others: runs, checkpoints or exports drawn beside it from the same noises.

    Raises:
        UserError: no run folder to write to, or sources whose latents have other shapes.
    """
    if source.run_dir is None:
        raise UserError(f"{source.url} has no run folder: a gallery is written into one")
    if world.is_main:
        folder = storage.join(source.run_dir, _FOLDER)
        same = list(_same_noise(source, others, config, distributed.device(world)))
        nearest, summary = _nearest(source, config, distributed.device(world)) if config.data.manifest else ([], "")
        _save(folder, {"same_noise": same, "nearest": nearest}, summary)
        announce("\n".join([folder, summary]).rstrip())
    distributed.barrier()


def _save(folder: str, strips: dict[str, list[Strip]], summary: str) -> None:
    storage.remove(storage.join(folder, "gallery.json"))  # should this be interrupted, there is none
    document: dict[str, Any] = {"words": summary}
    for kind, group in strips.items():
        document[kind] = [{"caption": s.caption, "file": f"{kind}-{i:03d}.png"} for i, s in enumerate(group)]
        for entry, strip in zip(document[kind], group, strict=True):
            storage.write_bytes(storage.join(folder, entry["file"]), strip.png())
    storage.write_text(storage.join(folder, "gallery.json"), json.dumps(document, indent=1))


# --- the same noise ---


def _same_noise(source: Source, others: Sequence[Source], config: Config, device: torch.device) -> Iterator[Strip]:
    """Strips of every step count; of older checkpoints at the greatest one; of other sources at every one."""
    sampling = config.sampling
    newest = source.at_newest()
    assert newest.run_dir is not None
    shape = None
    older = [step for step in committed_steps(newest.run_dir) if newest.step is None or step < newest.step]
    earlier = [Source(source.url, newest.run_dir, step) for step in older[-OLDER_CHECKPOINTS:]]
    requests = [(newest, sampling.steps), *((one, [max(sampling.steps)]) for one in earlier)]
    requests += [(one.at_newest(), sampling.steps) for one in others]
    for one, step_counts in requests:
        ours = one.run_dir == newest.run_dir
        model = Model.load(one, sampling if ours else _of_others(sampling), device)
        shape = shape or model.spec.latent_shape
        if model.spec.latent_shape != shape:
            raise UserError(f"{one.url} draws latents of {model.spec.latent_shape}, {source.url} of {shape}")
        for steps in step_counts:
            yield Strip(_caption(one, steps, sampling), model.decode(draw(model, sampling, steps, COLUMNS)).numpy())


def _of_others(sampling: SamplingConfig) -> SamplingConfig:
    """For other runs: their own first average, and guided by the null label."""
    return dataclasses.replace(sampling, ema=None, guide=GuideConfig())


def _caption(source: Source, steps: int, sampling: SamplingConfig) -> str:
    where = storage.name(source.url) + (f" at step {source.step}" if source.step is not None else "")
    computed = arithmetic({"precision": sampling.precision, "compile": sampling.compile})
    return f"{where}, {steps} step" + ("" if steps == 1 else "s") + (f", {computed}" if computed else "")


def draw(model: Model, sampling: SamplingConfig, steps: int, num: int) -> Tensor:
    """The first samples of a plan, (n, C, H, W) fp64 normalized latents."""
    plan = plan_of(dataclasses.replace(sampling, grid="auto"), model.spec, steps, num, sampling.seed)
    return Drawer(model.net, model.spec, plan).draw(0, min(num, plan.num))[2]


# --- nearest training images ---


def _nearest(source: Source, config: Config, device: torch.device) -> tuple[list[Strip], str]:
    """A strip per sample: itself, then its nearest training images; and whether samples lie closer than images do."""
    assert config.data.manifest is not None
    sampling = config.sampling
    model = Model.load(source.at_newest(), sampling, device)
    extractor = networks.open_extractor(config.evaluation.extractor, device)
    dataset = Dataset(config.data.manifest)
    steps = max(sampling.steps)
    z = draw(model, sampling, steps, COLUMNS)
    training = _Training(dataset, config.seed, model, extractor)
    own = training.first(_COMPARED)
    distances, index = training.nearest(torch.cat([training.features(z), own]), NEAREST + 1)
    samples, images = model.decode(z).numpy(), training.images(index[: len(z), :NEAREST])
    strips = [
        Strip(f"sample {i}; then training images {', '.join(map(str, index[i, :NEAREST].tolist()))}", row)
        for i, row in enumerate(np.concatenate([samples[:, None], images], axis=1))
    ]
    # A training image's nearest is itself: the second is its nearest other.
    ours, theirs = float(distances[: len(z), 0].median()), float(distances[len(z) :, 1].median())
    summary = (
        f"Median distance of a sample ({steps} steps) to its nearest training image: {ours:.3g}; of a training image "
        f"to its nearest other: {theirs:.3g} (features: {extractor.name}). Copies would lie near 0."
    )
    return strips, summary


class _Training:
    """The training images' features, read in passes."""

    def __init__(self, dataset: Dataset, seed: int, model: Model, extractor: Extractor):
        self._dataset, self._seed, self._model, self._extractor = dataset, seed, model, extractor

    def features(self, z: Tensor) -> Tensor:
        return self._extractor(z if self._extractor.takes == "latents" else self._model.decode(z)).features

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index, z, _ in read_indexed(self._dataset, 64, self._seed, self._model.spec.space):
            yield index, z

    def first(self, num: int) -> Tensor:
        """Features of the first `num` images."""
        features: list[Tensor] = []
        for index, z in self._chunks():
            if int(index[0]) >= num:
                break
            features.append(self.features(z))
        return torch.cat(features)[:num]

    def nearest(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Distances and numbers (n, k) of the training images nearest to features (n, F)."""
        distance = torch.full((len(x), k), torch.inf, dtype=torch.float64)
        number = torch.full((len(x), k), -1)
        for index, z in self._chunks():
            chunk_distance = neighbours.distances(x, self.features(z))
            distance = torch.cat([distance, chunk_distance], dim=1)
            number = torch.cat([number, index.expand(len(x), -1)], dim=1)
            distance, order = distance.topk(k, dim=1, largest=False)
            number = number.gather(1, order)
        return distance, number

    def images(self, number: Tensor) -> np.ndarray:
        """(n, k, H, W, C) images of numbers (n, k)."""
        spec = self._model.spec
        stored = [torch.from_numpy(self._dataset.read(i, i + 1)) for i in number.flatten().tolist()]
        index = number.flatten()
        z = spec.space.reading(self._dataset.manifest).from_stored(
            torch.cat(stored), self._seed, REFERENCE_POSTERIOR, index
        )
        images = self._model.decode(z).numpy()
        return images.reshape(*number.shape, *images.shape[1:])


# --- for the report ---


def section(run_dir: str) -> str:
    """HTML of a run's gallery, "" where there is none; images are inside."""
    url = storage.join(run_dir, _FOLDER, "gallery.json")
    if not storage.exists(url):
        return ""
    document = json.loads(storage.read_text(url))
    titles = {"same_noise": "The same noise", "nearest": "Samples and their nearest training images"}
    parts = []
    for kind, title in titles.items():
        rows = "".join(
            _row(storage.join(run_dir, _FOLDER, entry["file"]), entry["caption"]) for entry in document[kind]
        )
        parts += [f"<h3>{title}</h3>{rows}"] if rows else []
    return "".join([*parts, f"<p>{html.escape(document['words'])}</p>"])


def _row(url: str, caption: str) -> str:
    data = base64.b64encode(storage.read_bytes(url)).decode()
    image = f'<img alt="" style="image-rendering: pixelated; max-width: 100%" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
