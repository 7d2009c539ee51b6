"""Backbones. Importing this registers them."""

from imm_scale.models.dit import DiT

__all__ = ["DiT"]
