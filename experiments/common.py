"""What the experiments share: calling the project's own commands as a person would, reading runs, Markdown tables."""

import shlex
import statistics
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from imm_scale import config as configs
from imm_scale import storage
from imm_scale.checkpoint import run_folder
from imm_scale.checkpoint.export import load_net
from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.evaluation.records import arithmetic, read_evaluations
from imm_scale.parallel import world
from imm_scale.sampling.draw import collect, plan_of


def run(*words: str) -> None:
    """`python -m WORDS`, shown before it runs. Raises CalledProcessError when it fails."""
    print("+ python -m " + shlex.join(words), flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True)


def sweep(path: Path, document: Mapping[str, Any], at_once: int) -> None:
    """Writes a sweep file and runs what of it is not there yet, so many cells side by side."""
    storage.write_text(str(path), yaml.safe_dump(dict(document), sort_keys=False))
    for action in ("submit", "retry"):  # what is interrupted, then what failed
        run("launchers.sweep", action, str(path), "--local", str(at_once))


def chosen(text: str, known: Collection[str]) -> tuple[str, ...]:
    """Names of a comma-separated list. Raises UserError for one that is unknown."""
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise UserError(f"{name!r} is unknown; choose from {', '.join(known)}")
    return names


def config_of(run_dir: str) -> Config:
    """The config a run was started with."""
    return configs.from_yaml(storage.read_text(storage.join(run_dir, "config.yaml")))


def distances(run_dir: str) -> dict[int, dict[str, Any]]:
    """{steps: result} of the newest checkpoint's evaluations in fp32."""
    evaluations = read_evaluations(run_dir)
    newest = max(e["step"] for e in evaluations)
    return {r["steps"]: r for e in evaluations if e["step"] == newest for r in e["results"] if not arithmetic(r)}


def training_minutes(run_dir: str) -> float:
    """The steps' times of a run added up, without starts and stops."""
    seconds, before = 0.0, 0
    for record in run_folder.read_metrics(run_dir):
        seconds += record["step_seconds"] * (record["step"] - before)
        before = record["step"]
    return seconds / 60


def minutes(run_dirs: Sequence[str]) -> float:
    """Of training and measuring, without starts."""
    measuring = sum(e.get("seconds", 0.0) for run_dir in run_dirs for e in read_evaluations(run_dir))
    return sum(map(training_minutes, run_dirs)) + measuring / 60


def deviation(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 of one alone."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def strips(run_dir: str, step_counts: Sequence[int], count: int, grids: Sequence[str] = ()) -> list[np.ndarray]:
    """The first samples of a run side by side, for each step count from the same noise: (H, count W, 3) or so.

    Args:
        grids: `sampling.grid` of each step count, where it is not the run's own.
    """
    config = config_of(run_dir)
    spec, flow_map = load_net(run_dir)
    draw = spec.space.artifacts(config.sampling.vae, torch.device("cpu"))
    settings = [replace(config.sampling, grid=grid) for grid in grids or [config.sampling.grid] * len(step_counts)]
    plans = [plan_of(one, spec, steps, count, seed=0) for one, steps in zip(settings, step_counts, strict=True)]
    return [torch.cat(list(draw(collect(flow_map, spec, plan, world.World()))), dim=1).numpy() for plan in plans]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def plural(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")
