"""What a checkpoint costs training: `python -m benchmarks.checkpoint` (one rank; more under torchrun).

Peer: DeepSpeed's own `save_checkpoint`, synchronous, of the same engine in the same run, in turn with ours. Prints the
time the loop stands still for a save (ours: the call, and what the next optimizer step waits for its copy) over a
step's, and what is written over the state (16 bytes a parameter: weights, two moments, one average).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from data_tools import pack
from imm_scale import build
from imm_scale import config as configs
from imm_scale.checkpoint.async_saver import Saver
from imm_scale.parallel import world
from imm_scale.parallel.deepspeed_engine import Engine
from imm_scale.parallel.ema import ShardedEma
from imm_scale.preflight import prepare
from imm_scale.training.run_log import RunLog


def _manifest(folder: str) -> str:
    assert pack.main(["--source", "digits", "--out", f"{folder}/images"]) == 0
    # As a world of its own: the ranks of this one would share the shards out among them.
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "data_tools.encode", "--images", f"{folder}/images", "--out", f"{folder}/latents"]
    subprocess.run([*command, "--codec", "pixels"], env=alone, check=True)
    return f"{folder}/latents/manifest.json"


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Run:
    """A run that steps on random images and saves in either way."""

    def __init__(self, folder: str, width: int, depth: int, stage: int):
        self.world = world.detect()
        world.init(self.world)
        shared = [folder]
        if self.world.size > 1:
            dist.broadcast_object_list(shared)
        self.folder = Path(shared[0])
        manifest = _manifest(str(self.folder)) if self.world.is_main else f"{self.folder}/latents/manifest.json"
        world.barrier()
        batch = 16 * self.world.size
        overrides = [f"model.width={width}", f"model.depth={depth}", "model.heads=4", f"zero.stage={stage}"]
        overrides += [f"train.global_batch_size={batch}", "train.micro_batch_size=16", "wandb.mode=disabled"]
        overrides += [f"data.manifest={manifest}", f"run.dir={self.folder}/run", "train.keep_last=2"]
        self.config = configs.load([], overrides).config
        prepared = prepare(self.config, self.world.size)
        flow_map = build.net(prepared.spec)
        self.engine = Engine(self.config, flow_map, build.method(prepared.spec), prepared.layout)
        self.ema = ShardedEma(self.engine.master_slices(), self.config.ema.decays)
        self.saver = Saver(prepared, self.world, self.engine, self.ema.saved_slices())
        self.log = RunLog(self.config, 0, self.world)
        self.steps, self.held = 0, 0.0
        self._wait_for_copy, self.engine.before_update = self.engine.before_update, self._hold
        parameters = torch.tensor(sum(shard.numel for shard in self.engine.master_slices()))
        self.state_bytes = 16 * int(world.all_sum(parameters))

    def step(self) -> None:
        from imm_scale.data.loader import Batch

        x, label = 0.5 * torch.randn(16, 1, 8, 8), torch.zeros(16, dtype=torch.int64)
        self.engine.step([Batch(0, x, label, torch.arange(16), torch.ones(4))], 1e-4)
        self.ema.update()
        self.steps += 1

    def _hold(self) -> None:
        began = time.perf_counter()
        self._wait_for_copy()
        self.held += time.perf_counter() - began

    def save(self) -> None:
        self.saver.save(self.steps, self.steps * 64, (), self.log)

    def save_as_deepspeed_does(self) -> None:
        self.engine._engine.save_checkpoint(str(self.folder / "peer"), tag="now", save_latest=False)


def _seconds(action: Callable[[], None]) -> float:
    world.barrier()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure(run: Run, rounds: int, between: int) -> dict[str, list[float]]:
    """Seconds of steps alone, of saves, and of the steps after a save, which share the machine with its thread."""
    times: dict[str, list[float]] = {"step": [], "ours": [], "beside": [], "peer": []}
    for _ in range(3):
        run.step()
    run.save()  # makes the host copy
    run.saver.wait()
    for _ in range(rounds):
        times["step"] += [_seconds(run.step) for _ in range(between)]
        run.held = 0.0
        called = _seconds(run.save)
        times["beside"] += [_seconds(run.step) for _ in range(between)]
        times["ours"].append(called + run.held)
        run.saver.finish()
        times["peer"].append(_seconds(run.save_as_deepspeed_does))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--between", type=int, default=6, help="steps between saves")
    parser.add_argument("--folder", help="where checkpoints are written; default a temporary folder")
    args = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "disabled")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = Run(folder, args.width, args.depth, args.stage)
        times = measure(run, args.rounds, args.between)
        median = {name: statistics.median(values) for name, values in times.items()}
        if run.world.is_main:
            newest = max((run.folder / "run" / "checkpoints").iterdir())
            peer_bytes = _bytes(run.folder / "peer" / "now")
            print(f"state                         {run.state_bytes / 1e6:.1f} MB, ZeRO stage {args.stage}")
            print(f"stall of a save / step        {median['ours'] / median['step']:.3f}")
            print(f"stall of DeepSpeed's / step   {median['peer'] / median['step']:.3f}")
            print(f"stall / DeepSpeed's stall     {median['ours'] / median['peer']:.3f}")
            print(f"step beside a save / step     {median['beside'] / median['step']:.3f}")
            print(f"bytes written / state         {_bytes(newest) / run.state_bytes:.3f}")
            print(f"DeepSpeed's bytes / its state {peer_bytes / (run.state_bytes * 12 / 16):.3f}")
        run.engine.close()
    world.shutdown()


if __name__ == "__main__":
    main()
