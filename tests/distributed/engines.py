"""Engines without a trainer around them, for tests that run inside a rank."""

from collections.abc import Iterator
from contextlib import contextmanager

from imm_scale import build
from imm_scale import config as configs
from imm_scale.config.schema import Config
from imm_scale.data.loader import Batch, Loader
from imm_scale.parallel import world as distributed
from imm_scale.parallel.deepspeed_engine import Engine
from imm_scale.preflight import prepare


@contextmanager
def opened(*argv: str) -> Iterator[tuple[Config, Engine, Iterator[list[Batch]]]]:
    """Config, engine and this rank's steps of micro-batches, for `key=value` words."""
    world = distributed.detect()
    distributed.init(world)
    config = configs.load([], argv).config
    prepared = prepare(config, world.size)
    layout, objective = prepared.layout, build.method(prepared.spec)
    # The net is the engine's alone, so that `close` ends it.
    engine = Engine(config, build.net(prepared.spec, config.seed), objective, layout)
    manifest = config.data.manifest
    assert manifest is not None
    try:
        with Loader(manifest, layout, world.rank, config.seed, config.data.block_samples) as loader:
            yield config, engine, (batch.micro_batches(layout.accumulation) for batch in loader)
    finally:
        engine.close()
