"""Prediction of the next B tokens from those before (Gloeckle et al., arXiv 2404.19737); B = 1 is autoregression.

Legend: N samples, T tokens, B tokens of a block.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from imm_scale import rng
from imm_scale.choices import option
from imm_scale.data.batch import Batch
from imm_scale.data.spaces import SampleSpace
from imm_scale.errors import UserError
from imm_scale.methods.base import GroupLosses, Method, Steps
from imm_scale.methods.tokens import token_net
from imm_scale.methods.tokens.blocks import blocks
from imm_scale.methods.tokens.masked import TokenMethodConfig
from imm_scale.methods.tokens.token_net import TokenNet
from imm_scale.methods.tokens.verified import verified
from imm_scale.models.base import Backbone
from imm_scale.registry import register_method

SAMPLERS = {"blocks": blocks, "verified": verified}


@dataclass(frozen=True)
class NextBlockConfig(TokenMethodConfig):
    SAMPLERS: ClassVar[tuple[str, ...]] = tuple(SAMPLERS)

    name: str = option("next_block", "")


@register_method("next_block")
class NextBlock(Method):
    """Cross entropy of the block that follows each token, each sample a group of its own."""

    Config = NextBlockConfig

    def wrap(self, backbone: Backbone, space: SampleSpace) -> TokenNet:
        return token_net.wrap(backbone, space, self.config.name, causal=True)

    def grid(self, kind: str, steps: int, space: SampleSpace) -> Tensor:
        """1 - n / T before each step, of blocks of one size, and after the last. Raises UserError for another kind."""
        if kind != "uniform":
            raise UserError(f"grid={kind!r}: a causal net draws blocks of one size; use auto or uniform")
        return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)

    def check(self, net: TokenNet, sampler: str, times: Tensor) -> None:
        block, steps = net.model.config.block, len(times) - 1
        needed = -(-net.length // block)  # the last block may be cut
        if steps != needed:
            raise UserError(
                f"{steps} steps: this net draws {net.length} tokens in blocks of model.block={block}; use {needed}"
            )

    def sample(self, net: TokenNet, start: Tensor, condition: Tensor, steps: Steps) -> Tensor:
        return SAMPLERS[steps.sampler](net, start, condition, steps)

    def loss(self, net: TokenNet, batch: Batch, seed: int) -> GroupLosses:
        """1/B of the sum over places of -log q(x^{n+1}, ..., x^{n+B} | x^{<=n}), which for B = 1 is -log p(x)."""
        model: Any = net.model
        key = rng.random_bits(seed, "dropout", batch.ordinal) if model.has_dropout else None
        out = model(
            self.before(net, batch.x),
            batch.condition,
            batch.x,
            torch.ones_like(batch.x, dtype=torch.bool),
            key,
            self._taught(net, batch.ordinal, seed),
        )
        block = model.config.block
        monitors = {name: value.unflatten(0, batch.x.shape).mean(dim=1) for name, value in out.monitors.items()}
        loss = out.nll.unflatten(0, batch.x.shape).sum(dim=1) / block
        return GroupLosses(loss, torch.zeros_like(loss), monitors)

    @staticmethod
    def before(net: TokenNet, x_NT: Tensor) -> Tensor:
        """(N, T): what a causal net is given so that its state at a place has seen the tokens before it."""
        return F.pad(x_NT[:, :-1], (1, 0), value=net.mask)

    @staticmethod
    def _taught(net: TokenNet, ordinal: Tensor, seed: int) -> Tensor | None:
        model: Any = net.model
        if not model.head.takes_uniforms:
            return None
        uniforms = rng.uniform(seed, "head", ordinal, net.length * model.config.block)
        return uniforms.reshape(-1, model.config.block)
