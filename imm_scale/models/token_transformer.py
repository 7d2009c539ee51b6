"""A transformer over tokens, from the DiT's blocks: bidirectional for masked tokens, causal for the next ones.

Legend: N samples, T tokens, D width, V vocabulary, B tokens that a causal net predicts at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imm_scale.choices import BackboneConfig, option
from imm_scale.data.spaces import SampleSpace
from imm_scale.errors import UserError
from imm_scale.models import heads
from imm_scale.models.base import Architecture, Backbone
from imm_scale.models.dit import SIZES
from imm_scale.models.heads import HeadConfig
from imm_scale.models.layers import ATTENTIONS
from imm_scale.models.token_layers import KeyValues, TokenAttention, TokenBlock
from imm_scale.registry import register_backbone

_HEAD = "head."
_CONDITION_WIDTH = 128  # a label says less than a time: the projections to the blocks can be narrow


@dataclass(frozen=True)
class TokenModelConfig(BackboneConfig):
    """The `model` section of a token transformer."""

    name: str = option("token_transformer", "")
    size: Literal["S", "B", "L", "XL"] = option("S", "Row of the DiT's size table; other keys override its numbers.")
    width: int | None = option(None, "Channels of the transformer; null takes the size's.", range="[4, inf)")
    depth: int | None = option(None, "Number of blocks; null takes the size's.", range="[1, inf)")
    heads: int | None = option(
        None, "Attention heads, a divisor of the width; null takes the size's.", range="[1, inf)"
    )
    mlp_ratio: float = option(4.0, "Hidden width of the MLP over the width.", range="(0, inf)")
    causal: bool = option(False, "Each token sees those before it alone, as method.name=next_block needs.")
    block: int = option(1, "Tokens that a causal net predicts at once; 1 is plain autoregression.", range="[1, inf)")
    positions: Literal["auto", "learned", "rotary", "both"] = option(
        "auto",
        "Positions: a learned vector each, or rotations of queries and keys by their distance, by which masks alone "
        "cannot be told apart; both tell places, and find neighbours soonest. auto: both, of a causal net rotary.",
    )
    qk_norm: bool = option(False, "RMS-normalize queries and keys: steadier at high learning rates.")
    dropout: float = option(0.0, "Dropout inside the blocks, keyed by sample.", range="[0, 1)")
    attention: Literal["sdpa", "xformers"] = option(
        "sdpa", "Attention kernel of bidirectional nets: torch's, or xformers' where CUDA and the package are there."
    )
    head: HeadConfig = field(default_factory=HeadConfig)

    @property
    def title(self) -> str:
        return f"{self.size} {self.head.kind}"

    def cautions(self, takes_tangents: bool) -> list[str]:
        notes = []
        if self.causal and self.attention == "xformers":
            notes.append("model.attention=xformers is for bidirectional nets: a causal one takes torch's kernel")
        if self.causal and self.block == 1 and self.head.kind == "chain":
            notes.append(
                "model.head.kind=chain with model.block=1 goes on to no second token: its transitions never learn"
            )
        return notes

    def validate(self) -> None:
        if self.block > 1 and not self.causal:
            raise UserError(f"model.block={self.block} is for causal nets: set model.causal=true, or model.block=1")
        self.head.validate()
        self.architecture(length=self.block, vocabulary=2, num_classes=1)

    def architecture(self, **of_the_data: int) -> "TokenArchitecture":
        """The net for tokens of a length, vocabulary and number of classes. Raises UserError where keys do not fit."""
        width, depth, heads = SIZES[self.size]
        given = {key: value for key in ("width", "depth", "heads") if (value := getattr(self, key)) is not None}
        shared = ("mlp_ratio", "causal", "block", "qk_norm", "dropout", "attention", "head")
        chosen = "rotary" if self.causal else "both"
        positions = chosen if self.positions == "auto" else self.positions
        numbers: dict[str, Any] = {"width": width, "depth": depth, "heads": heads, **given, **of_the_data}
        return TokenArchitecture(**numbers, positions=positions, **{key: getattr(self, key) for key in shared})


@dataclass(frozen=True)
class TokenArchitecture(Architecture):
    """Everything that shapes the net; travels inside exported weights."""

    width: int
    depth: int
    heads: int
    length: int
    vocabulary: int
    num_classes: int
    mlp_ratio: float = 4.0
    causal: bool = False
    block: int = 1
    positions: str = "rotary"
    qk_norm: bool = False
    dropout: float = 0.0
    attention: str = "sdpa"
    head: HeadConfig = field(default_factory=HeadConfig)

    OF_THE_DATA = frozenset({"length", "vocabulary", "num_classes"})
    MAY_DIFFER = frozenset({"dropout", "attention"})

    def __post_init__(self) -> None:
        if isinstance(self.head, dict):  # by way of JSON
            object.__setattr__(self, "head", HeadConfig(**self.head))
        if self.width % self.heads or self.width // self.heads % 2:
            raise UserError(
                f"model.width={self.width} over model.heads={self.heads} must be an even number of channels a head"
            )
        if int(self.width * self.mlp_ratio) < 1:
            raise UserError(f"model.mlp_ratio={self.mlp_ratio} leaves the MLP of width {self.width} nothing: raise it")
        if self.block > self.length:
            raise UserError(f"model.block={self.block} is longer than the sequences, of {self.length} tokens")
        if self.attention not in ATTENTIONS:
            raise UserError(f"model.attention={self.attention!r} is unknown; choose one of {', '.join(ATTENTIONS)}")

    def build(self) -> "TokenTransformer":
        return TokenTransformer(self)

    def example(self, samples: int) -> tuple[Any, ...]:
        x = torch.zeros(samples, self.length, dtype=torch.int64)
        taught = (samples * self.length, self.block) if self.causal else x.shape
        uniform = torch.zeros(taught, dtype=torch.float64) if self.head.kind == "uniform_conditioned" else None
        scored = torch.ones_like(x, dtype=torch.bool if self.causal else torch.int64)
        return x, torch.zeros(samples, dtype=torch.int64), x, scored, None, uniform

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def kept_elements(self) -> int:
        """Of a sequence and a block beyond, from the beginning."""
        return 2 * self.width * self.depth * (self.length + self.block) * self.causal


@register_backbone("token_transformer")
class TokenTransformer(Backbone):
    """States of tokens, and a head that draws tokens from them. Under autocast as the DiT: the residual stream is fp32.

    Token ids are 0 to V - 1; V stands for a masked token in a bidirectional net and for the beginning of a causal one's
    sequence.
    """

    Config = TokenModelConfig
    Architecture = TokenArchitecture

    @classmethod
    def architecture(cls, config: TokenModelConfig, space: SampleSpace, second_time: bool) -> TokenArchitecture:
        vocabulary = getattr(space, "vocabulary", None)
        if len(space.shape) != 1 or vocabulary is None:
            raise UserError(
                f"model.name=token_transformer works on tokens, as data.space.name=tokens has them, not on samples of "
                f"shape {space.shape}"
            )
        if second_time:
            raise UserError("model.name=token_transformer is told no times: use method.name=masked or next_block")
        return config.architecture(length=space.shape[0], vocabulary=vocabulary, num_classes=space.num_classes)

    def __init__(self, config: TokenArchitecture):
        super().__init__()
        self.config = c = config
        self.has_dropout = c.dropout > 0
        self.x_embedder = nn.Embedding(c.vocabulary + 1, c.width)
        self.position_embedder = nn.Embedding(c.length, c.width) if c.positions != "rotary" else None
        self.y_embedder = nn.Embedding(c.num_classes + 1, _CONDITION_WIDTH)  # the last row is "no label"
        self.blocks = nn.ModuleList(
            TokenBlock(
                c.width,
                _CONDITION_WIDTH,
                c.mlp_ratio,
                c.dropout,
                TokenAttention(c.width, c.heads, c.qk_norm, c.attention, c.causal, c.positions != "learned"),
            )
            for _ in range(c.depth)
        )
        self.norm_final = nn.LayerNorm(c.width, eps=1e-6)
        self.ahead = nn.Linear(c.width, c.block * c.width) if c.block > 1 else None
        self._initialize()
        self.head = heads.build(c.head, c.width, c.vocabulary, c.heads)  # which initializes itself

    @torch.no_grad()
    def _initialize(self) -> None:
        """Blocks that do something from the first step on, whatever the label.

        The DiT's gates of 0 do as well: over three seeds of a small masked net no difference was seen (docs/log.md).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)  # beside what a block adds
        nn.init.normal_(self.y_embedder.weight, std=1.0)  # it alone reaches the projections, behind a SiLU
        for block in self.blocks:
            assert isinstance(block, TokenBlock)
            block.open_gates()

    @property
    def null_label(self) -> int:  # type: ignore[override]
        return self.config.num_classes

    def adapted(
        self, weights: dict[str, Tensor], source: Any, classes: Sequence[int | None], null_is_trained: bool
    ) -> tuple[dict[str, Tensor], list[str]]:
        """As in the base: of a head of another kind what has the same name and shape, the rest new."""
        if source.head == self.config.head:
            return weights, []
        head = {name: value for name, value in self.state_dict().items() if name.startswith(_HEAD)}
        shared = {name for name in head if name in weights and weights[name].shape == head[name].shape}
        made = {name: value for name, value in weights.items() if not name.startswith(_HEAD)}
        made |= {name: weights[name] if name in shared else value for name, value in head.items()}
        return made, [f"the head is new, of kind {self.config.head.kind}, but for {len(shared)} of its weights"]

    def forward(
        self,
        x: Tensor,
        label: Tensor,
        target: Tensor | None = None,
        scored: Tensor | None = None,
        dropout_key: Tensor | None = None,
        uniform: Tensor | None = None,
    ) -> Any:
        """States (N, T, D) of tokens x (N, T), ids up to V; with a target the head's `HeadOutput`.

        Args:
            label: (N,), up to the null label.
            target: (N, T) ids below V. A bidirectional net scores all that `scored` (N, T) names, at once, or each set
                that it numbers; a causal one all blocks of B tokens that begin at a token that `scored` names, and
                answers for (N T,) blocks.
            dropout_key: (N,) keys of the dropout masks.
            uniform: (N, T) fp64 uniforms for heads that are taught with some; (N T, B) for a causal net.
        """
        h = self._states(x, label, dropout_key)
        if target is None or scored is None:
            return h
        if not self.config.causal:
            return self.head(h, target, scored, uniform)
        return self.head(self.states_ahead(h).flatten(0, 1), *_blocks(target, scored, self.config.block), uniform)

    def _states(self, x_NT: Tensor, label_N: Tensor, dropout_key: Tensor | None = None) -> Tensor:
        place_NT = torch.arange(x_NT.shape[1], device=x_NT.device).expand_as(x_NT)
        h, condition = self._embedded(x_NT, place_NT), F.silu(self.y_embedder(label_N))
        for block, key in zip(self.blocks, self.dropout_keys(dropout_key), strict=True):
            h = self.run_block(block, h, condition, place_NT, key)
        return self.norm_final(h)

    def _embedded(self, x_NT: Tensor, place_NT: Tensor) -> Tensor:
        h = self.x_embedder(x_NT)
        if self.position_embedder is None:
            return h
        return h + self.position_embedder(place_NT.clamp_max(self.config.length - 1))

    def states_ahead(self, h: Tensor) -> Tensor:
        """(..., B, D), a state for each of the B tokens ahead of each state (..., D)."""
        if self.ahead is None:
            return h[..., None, :]
        return h[..., None, :] + F.silu(self.ahead(h)).unflatten(-1, (self.config.block, self.config.width))

    # --- sampling ---

    def empty_cache(self, samples: int) -> list[KeyValues]:
        """Room for the keys and values of so many sequences and a block beyond, a part for each of the net's blocks."""
        c, like = self.config, self.x_embedder.weight
        if like.device.type != "meta" and torch.is_autocast_enabled(like.device.type):
            like = like.new_empty(0, dtype=torch.get_autocast_dtype(like.device.type))
        return [KeyValues.empty(samples, c.length + c.block, c.heads, c.width // c.heads, like) for _ in self.blocks]

    def states_kept(self, x_NT: Tensor, place_NT: Tensor, label_N: Tensor, cache: list[KeyValues]) -> Tensor:
        """States (N, T, D) of a few tokens at these places of a causal net, which see what is kept of those before.

        Places may reach a block beyond the end of the sequence.
        """
        assert self.config.causal, "only a causal net's keys stay true when tokens come after them"
        h, condition = self._embedded(x_NT, place_NT), F.silu(self.y_embedder(label_N))
        for block, kept in zip(self.blocks, cache, strict=True):
            h = block(h, condition, place_NT, None, kept)
        return self.norm_final(h)


def _blocks(target_NT: Tensor, scored_NT: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The B tokens from each one on, (N T, B), and which of them are scored: none beyond the end."""
    length = target_NT.shape[1]
    place = torch.arange(length, device=target_NT.device)[:, None] + torch.arange(size, device=target_NT.device)
    tokens = F.pad(target_NT, (0, size - 1))[:, place]
    return tokens.flatten(0, 1), (scored_NT[:, :, None] & (place < length)).flatten(0, 1)
