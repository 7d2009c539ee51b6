"""What a config means for a manifest and a number of ranks, known and checked before anything starts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from imm_scale import build
from imm_scale import config as configs
from imm_scale.build import ModelSpec
from imm_scale.config.schema import Config
from imm_scale.data import sample_order
from imm_scale.data.dataset import Dataset
from imm_scale.data.loader import check_flip
from imm_scale.data.manifest import Manifest, TokenCodec, check_expectations
from imm_scale.data.sample_order import Layout, holdout_count, steps_per_epoch
from imm_scale.errors import UserError
from imm_scale.parallel.zero_config import check_settings, deepspeed_config
from imm_scale.planner import flops


@dataclass(frozen=True)
class PreparedRun:
    """Everything that follows from a config, a manifest and a world, before anything is started.

    Attributes:
        held_out: the samples of `data.holdout_manifest`, None where there is none.
    """

    config: Config
    dataset: Dataset
    layout: Layout
    spec: ModelSpec
    held_out: Dataset | None = None

    @property
    def manifest(self) -> Manifest:
        """The data set's description."""
        return self.dataset.manifest

    @property
    def num_held_out(self) -> int:
        """Samples that are never trained on, of the data set or of `data.holdout_manifest`."""
        own = self.manifest.num_samples - trained_samples(self.config, self.manifest)
        return own if self.held_out is None else len(self.held_out)

    @property
    def cautions(self) -> list[str]:
        """What is allowed and seldom meant, a sentence each."""
        config = self.config
        images = config.train.max_steps * config.train.global_batch_size
        return config.method.cautions(images) + config.model.cautions(config.method.takes_tangents)


def prepare(config: Config, world_size: int) -> PreparedRun:
    """Raises UserError for whatever can be known to be wrong before training."""
    if config.data.manifest is None:
        raise UserError("data.manifest is not set: give the manifest.json that imm-scale encode wrote")
    check_settings(config)
    # Opens every index and compares every shard's size: a short shard is found now and not after days.
    dataset = Dataset(config.data.manifest)
    manifest = dataset.manifest
    check_expectations(
        manifest,
        codec=config.data.codec,
        latent_shape=None if config.data.latent_shape is None else tuple(config.data.latent_shape),
        num_classes=config.data.num_classes,
        vocabulary=config.data.vocabulary,
    )
    check_flip(config.data.flip, manifest)
    train = config.train
    layout = Layout(train.global_batch_size, config.method.group_size, world_size, train.micro_batch_size)
    steps_per_epoch(layout.global_batch_size, trained_samples(config, manifest))
    spec = build.model_spec(config, manifest)
    with torch.device("meta"):
        build.net(spec)  # a method says here what it cannot use
    return PreparedRun(config, dataset, layout, spec, _held_out(config, manifest))


def trained_samples(config: Config, manifest: Manifest) -> int:
    """Samples of an epoch: all that are not held out."""
    return manifest.num_samples - holdout_count(manifest.num_samples, config.data.holdout)


def held_out_index(config: Config, dataset: Dataset) -> NDArray[np.int64]:
    """Which samples of a data set are held out: all of `data.holdout_manifest`, else the share of `data.holdout`."""
    if config.data.holdout_manifest is not None:
        return np.arange(len(dataset))
    return sample_order.held_out(dataset.shard_samples, config.data.block_samples, config.seed, config.data.holdout)


def _held_out(config: Config, trained: Manifest) -> Dataset | None:
    """What `data.holdout_manifest` names, which must be samples of the same kind and others."""
    url = config.data.holdout_manifest
    if url is None:
        return None
    held_out = Dataset(url)
    manifest = held_out.manifest
    if manifest.hash == trained.hash:
        raise UserError(f"data.holdout_manifest={url} is what data.manifest trains on: name samples that are held out")
    pairs = {key: (getattr(manifest, key), getattr(trained, key)) for key in ("latent_shape", "num_classes")}
    pairs["codec"] = (manifest.codec.kind, trained.codec.kind)
    if isinstance(manifest.codec, TokenCodec) and isinstance(trained.codec, TokenCodec):
        pairs |= trained.codec.unlike(manifest.codec)
    for key, (there, here) in pairs.items():
        if there == here:
            continue
        raise UserError(
            f"data.holdout_manifest={url} holds other samples than data.manifest: {key} {there}, not {here}; name "
            "samples packed or encoded alike"
        )
    return held_out


def describe(prepared: PreparedRun) -> str:
    """The resolved config, DeepSpeed's settings and what they mean on its ranks, as `--dry-run` prints it."""
    config, world_size = prepared.config, prepared.layout.world_size
    layout, net, samples = prepared.layout, prepared.spec.net, trained_samples(config, prepared.manifest)
    counted, forward = flops.parameters(net), flops.forward_multiply_adds(net)
    passes = flops.step_passes(config.method, net, layout.alignment)
    step = flops.training_multiply_adds(net, passes, layout.global_batch_size)
    micro, unit = layout.samples_per_micro_batch, config.data.space.UNIT
    lines = [
        f"global batch       {layout.global_batch_size} = micro-batch {micro} x accumulation {layout.accumulation} "
        f"x {world_size} ranks" + (" (the last slots of some ranks stay empty)" if _has_padding(layout) else ""),
        f"groups             {layout.num_groups} of {layout.particles} particles, {layout.slots_per_rank} on a rank",
        f"parameters         {counted.total + counted.fixed:,}"
        + f" ({counted.fixed:,} of them fixed)" * (counted.fixed > 0),
        f"forward pass       {forward / 1e9:.4g} G multiply-adds per {unit[:-1]}",
        f"training step      {step / 1e12:.4g} T multiply-adds, {passes.forwards:.4g} forward passes a sample"
        + flops.spared(config.method, net, layout.alignment),
        f"data               {samples:,} {unit}, {samples // layout.global_batch_size} steps per epoch, "
        f"{config.train.max_steps * layout.global_batch_size / samples:.4g} epochs in all"
        + (f"; {prepared.num_held_out:,} {unit} held out" if prepared.num_held_out else ""),
        f"run folder         {config.run_dir}",
        *(f"note               {caution}" for caution in prepared.cautions),
    ]
    settings = yaml.safe_dump({"deepspeed": _deepspeed_settings(prepared)}, sort_keys=False)
    return configs.to_yaml(config) + "\n" + settings + "\n" + "\n".join(lines)


def _deepspeed_settings(prepared: PreparedRun) -> dict[str, Any]:
    layout = prepared.layout
    unit = flops.parameters(prepared.spec.net).block
    samples = layout.samples_per_micro_batch
    return deepspeed_config(prepared.config, layout.world_size, layout.accumulation, samples, unit)


def _has_padding(layout: Layout) -> bool:
    return layout.slots * layout.world_size > layout.num_groups
