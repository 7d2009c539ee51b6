"""Runs on random latents, made of the program's own parts: what a training process holds, and its loop's steps."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed  # noqa: F401 - takes seconds: with this module, while the section before is still running
import torch

from benchmarks import random_shards
from benchmarks.gpu.case import PARTICLES, make_net, net_config
from benchmarks.gpu.report import Context
from imm_scale import config as configs
from imm_scale.config.schema import Config
from imm_scale.data.loader import Batch
from imm_scale.data.sample_order import Layout
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.models.dit import DiTConfig
from imm_scale.parallel import world as distributed
from imm_scale.parallel.deepspeed_engine import Engine
from imm_scale.parallel.world import World
from imm_scale.preflight import prepare
from imm_scale.registry import METHODS
from imm_scale.training import loop as loops
from imm_scale.training import stop_signals, watchdog
from imm_scale.training.loop import Loop, RunContext
from imm_scale.training.state import State
from imm_scale.training.stop_signals import StopSignals

_NEVER = 10**9  # steps
_SHARDS = 4


def samples_of(context: Context, full: int = 64) -> int:
    """Samples of a micro-batch."""
    return 2 * PARTICLES if context.small else full


def manifest(context: Context) -> str:
    """URL of a data set as an autoencoder's latents are stored, which all sections share."""
    folder = context.out / f"latents-{context.size}"
    if not (folder / "manifest.json").exists():
        net = net_config(context, "DiT-S/2")
        shape = (2 * net.channels, net.height, net.image_width)
        samples = 64 if context.small else random_shards.SHARD
        random_shards.write(str(folder), "vae", _SHARDS, samples, shape, net.num_classes)
    return str(folder / "manifest.json")


def config(context: Context, size: str, samples: int, *overrides: str) -> Config:
    """A run of one micro-batch a step in bf16; neither a record nor a checkpoint is ever due by itself.

    Args:
        overrides: as on the command line.
    """
    net = net_config(context, size)
    shape = {"width": net.width, "depth": net.depth, "heads": net.heads, "patch_size": net.patch_size}
    own = [f"model.{key}={value}" for key, value in shape.items()]
    own += ["precision=bf16", f"train.global_batch_size={samples}", f"train.micro_batch_size={samples}"]
    own += [f"train.max_steps={_NEVER}", f"train.log_every={_NEVER}", f"train.checkpoint_every={_NEVER}"]
    own += [f"data.manifest={manifest(context)}", f"run.dir={context.out}/runs/{size.replace('/', '-')}"]
    return configs.load([], [*own, "wandb.mode=disabled", "train.keep_last=1", *overrides]).config


@contextlib.contextmanager
def training_state(settings: Config) -> Iterator[State]:
    """Engine, averages and saver of a run of one rank, from step 0 in an empty folder, which goes when it is over."""
    world = World()
    distributed.init(world)
    shutil.rmtree(settings.run_dir, ignore_errors=True)
    Path(settings.run_dir).mkdir(parents=True)
    state = State(prepare(settings, world.size), world, None)
    try:
        yield state
    finally:
        state.engine.close()
        shutil.rmtree(settings.run_dir)  # a checkpoint of the largest net is 11 GB


@contextlib.contextmanager
def loop_steps(state: State) -> Iterator[Callable[[], None]]:
    """One step of training after another, with all that watches over them, read from the data set."""
    context = RunContext(*watchdog.hosts_and_call(state.world), StopSignals([]), stop_signals.deadline(None))
    loop = Loop(state, context)
    try:
        with loop.watchdog, loops._loader(state) as loader:
            yield lambda: loop._step(loader)
    finally:
        loop.run_log.close()


@contextlib.contextmanager
def training_engine(context: Context, settings: Config, size: str) -> Iterator[tuple[Engine, Batch]]:
    """An engine alone, whose net is made where it will run, and a micro-batch there."""
    distributed.init(World())
    net = make_net(net_config(context, size), context.device)
    flow_map = FlowMap(net, OTFlowMatching(), null_label=net.null_label)
    train = settings.train
    layout = Layout(train.global_batch_size, PARTICLES, 1, train.micro_batch_size)
    method = METHODS.get(settings.method.name)(settings.method.resolved(settings.precision))
    engine = Engine(settings, flow_map, method, layout)
    try:
        yield engine, random_batch(net.config, train.micro_batch_size, context.device)
    finally:
        engine.close()


def random_batch(net: DiTConfig, samples: int, device: torch.device) -> Batch:
    """A micro-batch on the device."""
    x = 0.5 * torch.randn(samples, net.channels, net.height, net.image_width, device=device)
    label = torch.randint(net.num_classes, (samples,), device=device)
    weight = torch.ones(samples // PARTICLES, device=device)
    return Batch(0, x, label, torch.arange(samples, device=device), weight)
