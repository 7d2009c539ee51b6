"""Samples of a run or an exported file: their latents, images, grids of images and .npz files."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from imm_scale import distributed, storage
from imm_scale.build import ModelSpec
from imm_scale.config import SamplingConfig
from imm_scale.data import codec as codecs
from imm_scale.data.codec import ImageCodec
from imm_scale.distributed import World
from imm_scale.errors import UserError
from imm_scale.flow_map import FlowMap
from imm_scale.sampling.grids import default_grid, time_grid
from imm_scale.sampling.samplers import SAMPLERS, Guidance, fresh_noise, starting_noise

ALONE = World()


@dataclass(frozen=True)
class SamplingPlan:
    """Everything that decides the samples.

    Attributes:
        steps: steps of the sampler.
        grid: kind of time grid, or the times themselves.
        labels: image i has label labels[i mod n].
        guidance_interval: (low, high] of t in which guidance is in force.
        sampler, num, seed, guidance_scale, batch_size: as in the `sampling` section of the config.
    """

    steps: int
    grid: str = "uniform"
    labels: tuple[int, ...] = (0,)
    num: int = 64
    seed: int = 0
    guidance_scale: float = 1.0
    batch_size: int = 64
    sampler: str = "pushforward"
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UserError(f"sampler={self.sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")

    @property
    def guidance(self) -> Guidance:
        return Guidance(self.guidance_scale, *self.guidance_interval)

    def function_evaluations(self, times: Tensor) -> int:
        """Forward passes of the network per image along a time grid."""
        calls = [2 if self.guidance.at(t) != 1.0 else 1 for t in times[:-1]]
        return sum(calls) + (sum(calls[1:]) if self.sampler == "heun" else 0)


def times_of(flow_map: FlowMap, spec: ModelSpec, plan: SamplingPlan) -> Tensor:
    """The plan's time grid for this model."""
    return time_grid(flow_map.interp, plan.grid, plan.steps, spec.t_min, spec.t_max)


def plan_of(config: SamplingConfig, spec: ModelSpec, steps: int, num: int, seed: int) -> SamplingPlan:
    """The `sampling` section of a config, resolved for a model and a step count. Raises UserError for bad labels."""
    return SamplingPlan(
        steps=steps,
        grid=default_grid(spec.objective, steps) if config.grid == "auto" else config.grid,
        labels=parse_labels(config.labels, spec.net.num_classes),
        num=num,
        seed=seed,
        guidance_scale=config.guidance_scale,
        batch_size=config.batch_size,
        sampler=config.sampler,
        guidance_interval=(config.guidance_interval[0], config.guidance_interval[1]),
    )


def parse_labels(text: str, num_classes: int) -> tuple[int, ...]:
    """Classes of "all", "0-9" or "3,7,1-2". Raises UserError for anything else or a class outside the table."""
    if text == "all":
        return tuple(range(num_classes))
    labels: list[int] = []
    for part in str(text).split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise UserError(f"labels={text!r}: give all, a range (0-9) or a list (3,7)")
        labels += range(int(first), int(last or first) + 1)
    outside = [label for label in labels if label >= num_classes]
    if outside or not labels:
        raise UserError(f"labels={text!r}: the model knows classes 0 to {num_classes - 1}, not {outside or 'none'}")
    return tuple(labels)


def sample(
    flow_map: FlowMap, spec: ModelSpec, plan: SamplingPlan, world: World = ALONE, progress: str | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's share of the samples, batch by batch.

    A batch always has batch_size samples and holds the same ones, whatever `num` and the number of ranks: image i is
    computed in one way only. Batches go to ranks in turn.

    Yields:
        (index, label, z): (n,) and (n,) int64 and (n, C, H, W) fp64 normalized latents, all on CPU.

    Raises:
        UserError: a grid that does not fit, or guidance with a net trained without label drop.
    """
    if plan.guidance_scale != 1.0 and flow_map.null_label is None:
        raise UserError(
            f"guidance_scale={plan.guidance_scale} needs a net trained with objective.label_drop above 0; use 1"
        )
    device = next(flow_map.parameters()).device
    grid = times_of(flow_map, spec, plan)
    labels = torch.tensor(plan.labels)
    starts = range(world.rank * plan.batch_size, plan.num, world.size * plan.batch_size)
    hidden = None if progress is not None and world.is_main else True  # None: shown on a terminal only
    for start in tqdm(starts, desc=progress, unit="batch", disable=hidden, leave=False):
        index = torch.arange(start, start + plan.batch_size)
        label = labels[index % len(labels)]
        noise = starting_noise(flow_map, spec.latent_shape, index.to(device), plan.seed)
        fresh = fresh_noise(flow_map, spec.latent_shape, index.to(device), plan.seed)
        z = SAMPLERS[plan.sampler](flow_map, noise, grid, label.to(device), plan.guidance, fresh).cpu()
        kept = index < plan.num
        yield index[kept], label[kept], z[kept]


def collect(
    flow_map: FlowMap, spec: ModelSpec, plan: SamplingPlan, world: World, progress: str | None = None
) -> Tensor:
    """All samples in order, (num, C, H, W) fp32 latents, on every rank."""
    out = torch.zeros(plan.num, *spec.latent_shape)
    for index, _, z in sample(flow_map, spec, plan, world, progress):
        out[index] = z.float()
    return distributed.all_sum(out)


def image_grid(images: np.ndarray, labels: Sequence[int], cell: int = 0) -> Image.Image:
    """A row a class, a column a sample; small images are enlarged to `cell` pixels without smoothing.

    Args:
        images: (N, H, W, 3 or 1) uint8, image i of class labels[i mod n].
        cell: least side of a cell; 0 keeps the size.
    """
    rows, columns = len(labels), -(-len(images) // len(labels))
    height, width, channels = images.shape[1:]
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 128, np.uint8)
    for i, image in enumerate(images):
        row, column = i % rows * (height + 1), i // rows * (width + 1)
        sheet[row : row + height, column : column + width] = image
    picture = Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet)
    factor = max(1, -(-cell // height))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def write(out_dir: str, spec: ModelSpec, plan: SamplingPlan, z: Tensor, image_codec: ImageCodec) -> list[str]:
    """Decodes the samples and writes steps-N.png and steps-N.npz (images, labels, latents, and how they were made)."""
    parts = [codecs.decode(part, spec.codec, image_codec, spec.sigma_data) for part in z.split(plan.batch_size)]
    images = torch.cat(parts).numpy()
    stem = f"steps-{plan.steps}" + ("" if plan.guidance_scale == 1.0 else f"-guidance-{plan.guidance_scale:g}")
    picture = io.BytesIO()
    image_grid(images, plan.labels, cell=32).save(picture, "PNG")
    arrays = io.BytesIO()
    label = np.array([plan.labels[i % len(plan.labels)] for i in range(plan.num)], np.int64)
    np.savez_compressed(
        arrays,
        images=images,
        labels=label,
        latents=z.numpy(),
        steps=plan.steps,
        seed=plan.seed,
        guidance_scale=plan.guidance_scale,
    )
    names = [storage.join(out_dir, f"{stem}{ending}") for ending in (".png", ".npz")]
    storage.write_bytes(names[0], picture.getvalue())
    storage.write_bytes(names[1], arrays.getvalue())
    return names
