"""A token transformer as the methods for tokens wrap it."""

from typing import Any

from torch import nn

from imm_scale.data.spaces import SampleSpace
from imm_scale.errors import UserError
from imm_scale.models.base import Backbone


class TokenNet(nn.Module):
    """A backbone over tokens.

    Attributes:
        mask: the id that stands for a masked token, or for the beginning of a sequence.
        length: tokens of a sequence.
        null_label: always None: there is no guidance of tokens.
    """

    model: Any
    null_label: int | None = None

    def __init__(self, model: Backbone, mask: int, length: int):
        super().__init__()
        self.model = model
        self.mask = mask
        self.length = length


def wrap(backbone: Backbone, space: SampleSpace, method: str, causal: bool) -> TokenNet:
    """The net of a method. Raises UserError for samples that are no tokens, or a net that sees what it should not."""
    vocabulary = getattr(space, "vocabulary", None)
    if vocabulary is None or len(space.shape) != 1:
        raise UserError(
            f"method.name={method} draws tokens: it needs data.space.name=tokens and a manifest of imm-scale "
            f"pack-tokens, not samples of shape {space.shape}"
        )
    net: Any = getattr(backbone, "config", None)
    if not hasattr(backbone, "head"):
        raise UserError(f"method.name={method} needs a net over tokens: use model.name=token_transformer")
    if net.causal != causal:
        raise UserError(
            f"method.name={method} needs a net that sees {'tokens before each one alone' if causal else 'all tokens'}: "
            f"set model.causal={str(causal).lower()}"
        )
    return TokenNet(backbone, vocabulary, space.shape[0])
