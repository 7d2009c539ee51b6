"""Engines over random latents, without a trainer around them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.problem import CLASSES, wake
from benchmarks.gpu.report import Context
from imm_scale import build
from imm_scale import config as configs
from imm_scale.data.loader import Batch, Loader
from imm_scale.data.manifest import Codec, Manifest
from imm_scale.data.shards import LATENT_DTYPE, write_shard
from imm_scale.methods.flow_map import FlowMap
from imm_scale.models.dit import DiT
from imm_scale.parallel import deepspeed_engine as engines
from imm_scale.parallel import world as distributed
from imm_scale.parallel.deepspeed_engine import Engine
from imm_scale.preflight import PreparedRun, prepare
from imm_scale.training import trainer

_CHANNELS = 4


def write_latents(folder: Path, samples: int, side: int) -> str:
    """Random latents (4, side, side) of ten classes as one shard; the URL of their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (_CHANNELS, side, side)
    latents = np.random.default_rng(0).standard_normal((samples, *shape)).astype(LATENT_DTYPE)
    labels = [i % CLASSES for i in range(samples)]
    shard = write_shard(str(folder), "00000.tar", [f"{i:06d}" for i in range(samples)], latents, labels)
    codec = Codec("pixels", "", side, _CHANNELS, 1, (0.0,) * _CHANNELS, (1.0,) * _CHANNELS)
    Manifest(codec, shape, CLASSES, (), (shard,)).save(str(folder / "manifest.json"))
    return str(folder / "manifest.json")


def fresh_folder(path: Path) -> Path:
    """The path, with nothing there from an earlier command."""
    shutil.rmtree(path, ignore_errors=True)
    return path


def base_overrides(context: Context, manifest: str) -> list[str]:
    """Overrides of a small run, in the form `imm-scale train` takes."""
    width, depth, heads, samples = (32, 2, 2, 32) if context.small else (256, 6, 4, 64)
    return [
        f"data.manifest={manifest}",
        f"model.width={width}",
        f"model.depth={depth}",
        f"model.heads={heads}",
        "method.k=6",  # a step from t to r long enough that rounding a product moves the gradient by about as much
        "method.min_gap=1e-4",
        f"train.global_batch_size={samples}",
        f"train.micro_batch_size={samples // 2}",
        "train.log_every=1",
        "optimizer.lr=1e-3",
        "optimizer.eps=1e-4",  # above the gradients' rounding, out of which Adam would make steps of a learning rate
        "ema.decays=[0.99]",
        "wandb.mode=disabled",
    ]


def allow_all_precisions(context: Context) -> None:
    """CPUs compute fp16 slowly but rightly, and bf16 at stage 0 with another sum: both are refused for real runs."""
    if context.small:
        engines.check_device = trainer.check_device = lambda config: None


@contextmanager
def opened(*overrides: str) -> Iterator[tuple[Engine, Iterator[list[Batch]], PreparedRun]]:
    """An engine on one rank, its steps of micro-batches, and what the config came to."""
    world = distributed.detect()
    distributed.init(world)
    config = configs.load([], overrides).config
    prepared = prepare(config, world.size)
    layout, seed = prepared.layout, config.seed
    engine = Engine(config, _flow_map(prepared), build.method(prepared.spec), layout)
    try:
        with Loader(
            prepared.dataset, layout, world.rank, seed, config.data.block_samples, device=engine.device
        ) as loader:
            yield engine, (batch.micro_batches(layout.accumulation) for batch in loader), prepared
    finally:
        engine.close()


def _flow_map(prepared: PreparedRun) -> FlowMap:
    """The engine's alone, so that `close` ends it."""
    flow_map = build.net(prepared.spec, prepared.config.seed)
    assert isinstance(flow_map.model, DiT)
    wake(flow_map.model)
    return flow_map


def states(engine: Engine) -> dict[tuple[str, str], Tensor]:
    """Copies of weights and moments, by state and parameter."""
    return {
        (state, shard.name): tensor.detach().clone()
        for shard in engine.held_slices()
        for state, tensor in shard.states.items()
    }


def same(a: dict[tuple[str, str], Tensor], b: dict[tuple[str, str], Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(tensor, b[key]) for key, tensor in a.items())
