"""Heads of token nets: joint laws of several tokens given the net's states, behind one interface (`base.py`)."""

from dataclasses import dataclass
from typing import Literal

from imm_scale.choices import option
from imm_scale.errors import UserError
from imm_scale.models.heads.autoregressive import AutoregressiveHead
from imm_scale.models.heads.base import Head, HeadOutput
from imm_scale.models.heads.chain import ChainHead
from imm_scale.models.heads.factorized import FactorizedHead
from imm_scale.models.heads.mixture import MixtureHead
from imm_scale.models.heads.uniform_conditioned import UniformConditionedHead

__all__ = ["Head", "HeadConfig", "HeadOutput", "build"]


@dataclass(frozen=True)
class HeadConfig:
    """The keys of a head, below `model.head`."""

    kind: Literal["factorized", "mixture", "chain", "autoregressive", "uniform_conditioned"] = option(
        "factorized", "How tokens of one step depend on each other: not at all, or by a joint law of the given kind."
    )
    components: int = option(
        1, "Components of a mixture, hidden states of a chain: twice as many as are needed.", range="[1, 4096]"
    )
    depth: int = option(1, "Blocks of the autoregressive and of the uniform-conditioned head.", range="[1, 64]")
    group: int | None = option(
        None, "Neighbouring tokens of a step that share a component of a mixture; null: all.", range="[1, inf)"
    )

    def validate(self) -> None:
        """Raises UserError for keys that the kind does not have."""
        if self.components > 1 and self.kind not in ("mixture", "chain"):
            raise UserError(
                f"model.head.components={self.components} with model.head.kind={self.kind}, which has none: "
                "use kind=mixture or chain, or components=1"
            )
        if self.group is not None and self.kind != "mixture":
            raise UserError(
                f"model.head.group={self.group} with model.head.kind={self.kind}, which has no groups: "
                "use kind=mixture, or group=null"
            )


def build(config: HeadConfig, width: int, vocabulary: int, heads: int) -> Head:
    """The head, freshly initialized by torch's generator.

    Args:
        width: of the states.
        vocabulary: tokens that can be emitted; the mask is not among them.
        heads: attention heads of the kinds that have a transformer; they divide the width.

    Raises:
        UserError: keys that the kind does not have.
    """
    config.validate()
    if config.kind == "factorized":
        return FactorizedHead(width, vocabulary)
    if config.kind == "mixture":
        return MixtureHead(width, vocabulary, config.components, config.group)
    if config.kind == "chain":
        return ChainHead(width, vocabulary, config.components)
    made = AutoregressiveHead if config.kind == "autoregressive" else UniformConditionedHead
    return made(width, vocabulary, heads, config.depth)
