"""What makes a run the run it is, and may not change when it goes on."""

import dataclasses
from typing import Any

from imm_scale import config as configs
from imm_scale.config.schema import Config
from imm_scale.errors import UserError

# Sections and keys that make a run what it is; every other key may change when it goes on.
IDENTITY = (
    "model",
    "method",
    "data.space",
    "seed",
    "data.block_samples",
    "data.flip",
    "data.holdout",
    "train.global_batch_size",
    "optimizer",
    "ema",
)
_ELASTIC = ("model.attention",)
_OF_COSINE = "train.max_steps"  # where a cosine ends, and so part of every step's learning rate


def identity(config: Config) -> dict[str, Any]:
    """The keys that may not differ when a run goes on, with their values; the method's as the precision resolves it."""
    resolved = dataclasses.replace(config, method=config.method.resolved(config.precision))
    parts = (*IDENTITY, _OF_COSINE) if config.optimizer.schedule == "cosine" else IDENTITY
    return {
        key: value
        for key, value in configs.flatten(resolved).items()
        if key not in _ELASTIC and any(key == part or key.startswith(f"{part}.") for part in parts)
    }


def differences(config: Config, manifest_hash: str, old: Config, old_manifest_hash: str) -> dict[str, tuple[Any, Any]]:
    """{key: (before, now)} of what makes a run another one, but for what the new `run.allow_change` allows."""
    before = {**identity(old), "data.manifest (contents)": old_manifest_hash}
    now = {**identity(config), "data.manifest (contents)": manifest_hash}
    allowed = [configs.renamed(key) for key in config.run.allow_change]

    def is_allowed(key: str) -> bool:
        return any(key.split(" ")[0] == part or key.startswith(f"{part}.") for part in allowed)

    # The keys of another class are not there: its name tells it all.
    shared = [key for key in before if key in now]
    return {key: (before[key], now[key]) for key in shared if before[key] != now[key] and not is_allowed(key)}


def check_identity(config: Config, manifest_hash: str, old: Config, old_manifest_hash: str) -> None:
    """Raises UserError, with the keys, where a run folder was started with something else."""
    differing = differences(config, manifest_hash, old, old_manifest_hash)
    if differing:
        lines = "\n".join(f"  {key}: {before} -> {now}" for key, (before, now) in differing.items())
        if _OF_COSINE in differing:
            lines += "\n  (a cosine reaches 0 at train.max_steps: with another, the learning rate jumps here)"
        keys = ",".join(key.split(" ")[0] for key in differing)
        raise UserError(
            f"{config.run_dir} holds a run with another config:\n{lines}\n"
            f"Choose another run.dir (or run.name), or go on with the change on purpose: run.allow_change=[{keys}]"
        )
