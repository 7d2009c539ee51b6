"""DeepSpeed's settings, as they follow from ours."""

from collections.abc import Mapping
from typing import Any

from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.models.base import Backbone

# Elements of the buffers gradients are reduced in. DeepSpeed's own 5e8 would hold 1.9 GiB, under autocast 3.7, whatever
# the size of the net; 200 MB are as long a message as links ask for.
REDUCE_BUCKET = 50_000_000
# What the program builds on and therefore sets itself, and the config keys that decide it.
_OWN_SETTINGS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size, from which accumulation follows",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.schedule and optimizer.warmup_images",
    "fp16": "precision",
    "bf16": "precision",
    "torch_autocast.enabled": "precision",
    "torch_autocast.dtype": "precision",
    "torch_autocast.lower_precision_safe_modules": "zero.reduce_precision",
    "communication_data_type": "zero.reduce_precision",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer.device": "zero.offload",
    "zero_optimization.offload_param.device": "zero.offload",
}


def deepspeed_config(
    config: Config, world_size: int, accumulation: int, samples_per_micro_batch: int, block_numel: int
) -> dict[str, Any]:
    """DeepSpeed's settings for a run.

    Args:
        world_size: ranks.
        accumulation: micro-batches per step.
        samples_per_micro_batch: samples a rank runs at once.
        block_numel: of `block_numel`.
    """
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "reduce_bucket_size": REDUCE_BUCKET,
        # DeepSpeed's own default is to reduce beside the backward pass at stage 3 alone, and after it below.
        "overlap_comm": world_size > 1,
    }
    if config.zero.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.zero.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    if config.zero.stage == 3:
        # Both branches run a block one after the other: keep it gathered for the second, and let go of it then.
        zero["stage3_max_reuse_distance"] = block_numel
        zero["stage3_max_live_parameters"] = 2 * block_numel
        zero["stage3_prefetch_bucket_size"] = block_numel
        zero["stage3_param_persistence_threshold"] = 0
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": samples_per_micro_batch,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "timers": {"throughput": {"enabled": False}},  # waits for the device at each forward pass and step
        "data_types": {"grad_accum_dtype": "fp32"},
        # DeepSpeed's own default is to clip at 1. At stage 0 `Engine` clips.
        "gradient_clipping": (config.train.grad_clip or 0.0) if config.zero.stage > 0 else 0.0,
    }
    if config.precision in ("bf16", "fp16"):
        # Autocast rather than a cast of the module: the master weights, the conditioning and the loss stay fp32.
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": {"bf16": "bfloat16", "fp16": "float16"}[config.precision],
        }
    return _merge(settings, config.zero.extra)


def halves_gradients(config: Config) -> bool:
    """Whether gradients of autocast's layers are summed over ranks in 16 bits."""
    return config.zero.reduce_precision == "autocast"


def overlaps(config: Config, world_size: int) -> bool:
    """Whether gradients are reduced beside the backward pass: wherever there is something to reduce, above stage 0."""
    zero: Any = config.zero.extra.get("zero_optimization", {})
    return config.zero.stage > 0 and bool(zero.get("overlap_comm", world_size > 1))


def check_settings(config: Config) -> None:
    """Raises UserError where `zero.extra` sets what another key decides, or gradients have no 16 bits to travel in."""
    if halves_gradients(config) and config.precision not in ("bf16", "fp16"):
        raise UserError(f"zero.reduce_precision=autocast with precision={config.precision}: leave it at fp32")
    if halves_gradients(config) and config.zero.stage == 0:
        raise UserError("zero.reduce_precision=autocast with zero.stage=0, which sums in fp32: use stage 1 to 3")
    for key, decided_by in _OWN_SETTINGS.items():
        if _has(config.zero.extra, key):
            raise UserError(f"zero.extra.{key} is not for zero.extra: set {decided_by}")


def _has(settings: Mapping[str, Any], key: str) -> bool:
    first, _, rest = key.partition(".")
    inner = settings.get(first)
    return first in settings and (not rest or (isinstance(inner, Mapping) and _has(inner, rest)))


def block_numel(net: Backbone) -> int:
    """Parameters of the largest block, the unit in which stage 3 gathers weights."""
    return max(sum(p.numel() for p in block.parameters()) for block in net.blocks)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return merged
