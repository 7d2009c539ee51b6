"""Ranks, under the name launch scripts import them by; they live in `imm_scale.parallel.world`."""

from imm_scale.parallel.world import detect, device

__all__ = ["detect", "device"]
