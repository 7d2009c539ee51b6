"""Backbones. Importing this registers them."""

from imm_scale.models.dit import DiT
from imm_scale.models.token_transformer import TokenTransformer

__all__ = ["DiT", "TokenTransformer"]
