"""The diffusion transformer (DiT, arXiv 2212.09748) with (t, s, label) conditioning."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imm_scale.choices import BackboneConfig, option
from imm_scale.data.spaces import SampleSpace
from imm_scale.errors import UserError
from imm_scale.models import tangent
from imm_scale.models.base import Architecture, Context
from imm_scale.models.block_mixer import BranchMlp, MixerLayer
from imm_scale.models.layers import (
    ATTENTIONS,
    Block,
    FinalLayer,
    GuidanceEmbedder,
    TimeEmbedder,
    position_table,
)
from imm_scale.models.mlp_branches import MlpBranches
from imm_scale.models.streams import CausalBlock, StreamBlock
from imm_scale.registry import register_backbone

# name: width, depth, heads
SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
PATCH_SIZES = (2, 4, 8)
_LABELS = "y_embedder.weight"
_SECOND_TIME, _GUIDANCE = "s_embedder.", "guidance_embedder."


@dataclass(frozen=True)
class ModelConfig(BackboneConfig):
    """The `model` section of a DiT."""

    name: str = option("dit", "")
    size: str = option("DiT-S/2", "Row of the size table: DiT-{S,B,L,XL}/{2,4,8}; the other keys override its numbers.")
    width: int | None = option(None, "Channels of the transformer; null takes the size's.", range="[4, inf)")
    depth: int | None = option(None, "Number of blocks; null takes the size's.", range="[1, inf)")
    heads: int | None = option(
        None, "Attention heads, a divisor of the width; null takes the size's.", range="[1, inf)"
    )
    patch_size: int | None = option(None, "Side of a patch in latent pixels; null takes the size's.", range="[1, inf)")
    mlp_ratio: float = option(4.0, "Hidden width of the MLP over the width.", range="(0, inf)")
    qk_norm: bool = option(False, "RMS-normalize queries and keys: steadier at high learning rates, not in the paper.")
    dropout: float = option(0.0, "Dropout inside the blocks; both branches of IMM share the mask.", range="[0, 1)")
    attention: Literal["sdpa", "xformers"] = option(
        "sdpa", "Attention kernel: torch's, or xformers' where CUDA and the package are there."
    )
    time_embedding: Literal["positional", "fourier"] = option(
        "positional", "Sinusoids of the times: geometric frequencies (stable) or random ones of scale 16."
    )
    blocks: int = option(
        1,
        "J, blocks of whole rows of patches that a sample is drawn in, each given the ones before; 1 draws it at once.",
        range="[1, inf)",
    )
    branch: Literal["transformer", "mlp"] = option(
        "transformer",
        "What draws a block given those before: the transformer itself, or a small MLP on its states, which runs once.",
    )
    branch_depth: int | None = option(None, "Layers of that MLP; null is 3.", range="[1, inf)")
    branch_width: int | None = option(None, "Channels of that MLP; null takes the model's.", range="[1, inf)")

    @property
    def title(self) -> str:
        return self.size

    def cautions(self, takes_tangents: bool) -> list[str]:
        if self.attention != "xformers":
            return []
        if self.blocks > 1:
            return [f"model.attention=xformers serves one block alone: with model.blocks={self.blocks} torch's masks"]
        if not takes_tangents:
            return []
        return [
            "model.attention=xformers computes attention's value alone: its tangent takes torch's matrix products, "
            "with the scores of all pairs of tokens in memory for one block at a time, under either choice"
        ]

    def validate(self) -> None:
        side = self.patch_size or max(PATCH_SIZES)  # of samples it fits: what they are is not known here
        size_config(self.size, **self.given, height=side, image_width=side, mlp_ratio=self.mlp_ratio)
        _check_branch(self.branch, self.branch_depth, self.branch_width, self.blocks)

    @property
    def given(self) -> dict[str, int]:
        """The numbers that stand in place of the size's."""
        numbers = {key: getattr(self, key) for key in ("width", "depth", "heads", "patch_size")}
        return {key: value for key, value in numbers.items() if value is not None}


@dataclass(frozen=True)
class DiTConfig(Architecture):
    """Everything that shapes the net; travels inside exported weights."""

    width: int
    depth: int
    heads: int
    patch_size: int
    channels: int = 4
    height: int = 32
    image_width: int = 32
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    dropout: float = 0.0
    attention: str = "sdpa"
    time_embedding: str = "positional"
    second_time: bool = True
    guidance: bool = False
    blocks: int = 1
    branch: str = "transformer"
    branch_depth: int | None = None
    branch_width: int | None = None

    OF_THE_DATA = frozenset({"channels", "height", "image_width", "num_classes"})
    MAY_DIFFER = frozenset(
        {"dropout", "attention", "num_classes", "height", "image_width", "second_time", "guidance", "blocks"}
    )

    def __post_init__(self) -> None:
        for key in ("width", "depth", "heads", "patch_size", "blocks"):
            if getattr(self, key) < 1:
                raise UserError(f"model.{key}={getattr(self, key)} must be at least 1")
        if int(self.width * self.mlp_ratio) < 1:
            raise UserError(f"model.mlp_ratio={self.mlp_ratio} leaves the MLP of width {self.width} nothing: raise it")
        if self.width % self.heads or self.width % 4:
            raise UserError(f"model.width={self.width} must be a multiple of model.heads={self.heads} and of 4")
        if self.height % self.patch_size or self.image_width % self.patch_size:
            raise UserError(
                f"model.patch_size={self.patch_size} must divide the latent's {self.height} x {self.image_width}"
            )
        self._check_blocks()
        _check_branch(self.branch, self.branch_depth, self.branch_width, self.blocks)
        if self.attention not in ATTENTIONS:
            raise UserError(f"model.attention={self.attention!r} is unknown; choose one of {', '.join(ATTENTIONS)}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model.dropout={self.dropout} must be in [0, 1)")

    def _check_blocks(self) -> None:
        rows, columns = self.grid
        if rows % self.blocks:
            raise UserError(
                f"model.blocks={self.blocks} must cut the {rows} x {columns} patches of a sample into blocks of whole "
                f"rows: take a divisor of {rows}"
            )
        if self.blocks > 1 and self.guidance:
            raise UserError(
                f"model.blocks={self.blocks} and method.guidance.kind=condition: a net of several blocks is not told "
                "its guidance; use model.blocks=1, or another method"
            )

    def build(self) -> "DiT":
        return DiT(self)

    def example(self, samples: int) -> tuple[Any, ...]:
        x = torch.zeros(samples, self.channels, self.height, self.image_width)
        times = torch.zeros(samples, dtype=torch.float64)
        label = torch.zeros(samples, dtype=torch.int64)
        if self.blocks > 1:
            second = times if self.second_time else None
            of_blocks = [None if u is None else u[:, None].expand(-1, self.blocks) for u in (times, second)]
            return x, *of_blocks, label, None, None, Context(x, times, second)
        needed = x, times, times if self.second_time else None, label
        return (*needed, None, torch.zeros(samples, 3, dtype=torch.float64)) if self.guidance else needed

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch_size, self.image_width // self.patch_size

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def sequence_blocks(self) -> int:
        return self.blocks

    @property
    def at_once(self) -> "DiTConfig":
        return replace(self, blocks=1, branch="transformer", branch_depth=None, branch_width=None)

    @property
    def branches_apart(self) -> bool:
        return self.branch == "mlp"

    @property
    def kept_elements(self) -> int:
        """Of all blocks but the last, and of all but the last two, whose layers go once the new ones stand beside."""
        if self.blocks == 1:
            return 0
        tokens = 2 * self.tokens - 3 * self.block_tokens
        if self.branches_apart:  # the learned block before the first is kept as well
            tokens += 2 * self.block_tokens
        return 2 * self.width * self.depth * tokens

    @property
    def hidden(self) -> tuple[int, int]:
        pairs, seen = self.tokens**2, self.tokens * (self.tokens + self.block_tokens) // 2
        of_a_pair = 2 * self.width  # a score, and a value
        if self.branches_apart:  # states of the last layer are wanted, and an MLP has no mask
            return of_a_pair * self.depth * (pairs - seen), 0
        # The clean stream ends with the keys and values of the last block, before attention.
        return of_a_pair * (self.depth - 1) * (pairs - seen), of_a_pair * self.depth * (2 * pairs - seen)

    @property
    def block_tokens(self) -> int:
        """Tokens of one of the blocks that a sample is drawn in."""
        return self.tokens // self.blocks


_BRANCHES, _BRANCH_DEPTH = ("transformer", "mlp"), 3


def _check_branch(branch: str, depth: int | None, width: int | None, blocks: int) -> None:
    """Raises UserError for an unknown branch, one that has nothing to branch from, and settings of one there is not."""
    if branch not in _BRANCHES:
        raise UserError(f"model.branch={branch!r} is unknown; choose one of {', '.join(_BRANCHES)}")
    if branch == "mlp" and blocks == 1:
        raise UserError(
            "model.branch=mlp draws a block from the states of those before, and with model.blocks=1 there are none: "
            "set model.blocks above 1, or leave model.branch at transformer"
        )
    for key, value in (("branch_depth", depth), ("branch_width", width)):
        if value is not None and branch != "mlp":
            raise UserError(f"model.{key}={value} is of model.branch=mlp, not of {branch}: leave it out")
        if value is not None and value < 1:
            raise UserError(f"model.{key}={value} must be at least 1")


def size_config(size: str, **overrides: Any) -> DiTConfig:
    """The row of the size table for "DiT-S/2" and the like, with overrides. Raises UserError for an unknown size."""
    family, _, patch = size.removeprefix("DiT-").partition("/")
    if not size.startswith("DiT-") or family not in SIZES or not patch.isdecimal() or int(patch) not in PATCH_SIZES:
        known = ", ".join(f"DiT-{name}/{p}" for name in SIZES for p in PATCH_SIZES)
        raise UserError(f"model.size={size!r} is unknown; choose one of {known}")
    width, depth, heads = SIZES[family]
    return DiTConfig(**{"width": width, "depth": depth, "heads": heads, "patch_size": int(patch), **overrides})


@register_backbone("dit")
class DiT(MlpBranches):
    """The network G. Under autocast the blocks run in 16 bits, conditioning and the residual stream in fp32."""

    Config = ModelConfig
    Architecture = DiTConfig
    CAN_TAKE_GUIDANCE = True
    pos_embed: Tensor

    @classmethod
    def architecture(
        cls, config: ModelConfig, space: SampleSpace, second_time: bool, guidance: bool = False
    ) -> DiTConfig:
        if len(space.shape) != 3:
            raise UserError(
                f"model.name=dit works on samples of (channels, height, width), not on {space.shape}: of tokens take a "
                "view by data.space.name=onehot or bits, or use model.name=token_transformer"
            )
        channels, height, width = space.shape
        return size_config(
            config.size,
            **config.given,
            channels=channels,
            height=height,
            image_width=width,
            num_classes=space.num_classes,
            mlp_ratio=config.mlp_ratio,
            qk_norm=config.qk_norm,
            dropout=config.dropout,
            attention=config.attention,
            time_embedding=config.time_embedding,
            second_time=second_time,
            guidance=guidance,
            blocks=config.blocks,
            branch=config.branch,
            branch_depth=config.branch_depth,
            branch_width=config.branch_width,
        )

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.has_dropout = config.dropout > 0
        self.takes_guidance = config.guidance
        self.sequence_blocks = config.blocks
        c = config
        self.x_embedder = nn.Conv2d(c.channels, c.width, c.patch_size, stride=c.patch_size)
        self.t_embedder = TimeEmbedder(c.width, c.time_embedding)
        self.s_embedder = TimeEmbedder(c.width, c.time_embedding) if c.second_time else None
        self.y_embedder = nn.Embedding(c.num_classes + 1, c.width)  # the last row is "no label"
        kind = CausalBlock if c.branches_apart else Block if c.blocks == 1 else StreamBlock
        self.blocks = nn.ModuleList(
            kind(c.width, c.heads, c.mlp_ratio, c.qk_norm, c.dropout, c.attention) for _ in range(c.depth)
        )
        last = c.branch_width or c.width
        self.final_layer = FinalLayer(last, c.patch_size, c.channels, c.width)
        self.block_mixer = None
        if c.branches_apart:
            depth = c.branch_depth or _BRANCH_DEPTH
            self.block_mixer = BranchMlp(c.channels, c.patch_size, c.block_tokens, last, depth, c.mlp_ratio, c.width)
        table = position_table(c.width, *c.grid)
        self.register_buffer("pos_embed", table[None], persistent=False)
        self._initialize()
        # Last: all else is drawn as for a net without.
        self.guidance_embedder = GuidanceEmbedder(c.width, c.time_embedding) if c.guidance else None

    @torch.no_grad()
    def _initialize(self) -> None:
        """DiT's initialization: adaLN-Zero, so that every block starts as the identity and the output as 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, TimeEmbedder):
                for layer in module.mlp:
                    if isinstance(layer, nn.Linear):
                        nn.init.normal_(layer.weight, std=0.02)
            if isinstance(module, Block | MixerLayer | FinalLayer):
                modulation = module.adaLN_modulation[-1]
                assert isinstance(modulation, nn.Linear)
                nn.init.zeros_(modulation.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @property
    def null_label(self) -> int:  # type: ignore[override]
        return self.config.num_classes

    def adapted(
        self, weights: dict[str, Tensor], source: DiTConfig, classes: Sequence[int | None], null_is_trained: bool
    ) -> tuple[dict[str, Tensor], list[str]]:
        """As in the base: rows of classes, embedders of a second time and guidance that answer 0, positions."""
        made, notes = dict(weights), self._notes_on_blocks(source)
        if source.grid != self.config.grid:
            there, here = (" x ".join(map(str, grid)) for grid in (source.grid, self.config.grid))
            notes.append(f"the net had {there} patches and has {here}: the sin-cos positions are computed for them")
        table = weights.get(_LABELS)
        if table is not None and (list(classes) != list(range(len(table) - 1)) or not null_is_trained):
            made[_LABELS], note = _label_rows(table, classes, null_is_trained)
            notes.append(note)
        if self.s_embedder is None:
            made = _without(made, _SECOND_TIME)
        elif not source.second_time:
            made |= _silent(self.s_embedder, _SECOND_TIME)
            notes.append("the embedder of the second time is new and answers 0 at first: the net starts as it was")
        if self.guidance_embedder is None and source.guidance:
            made = _without(made, _GUIDANCE)
            notes.append("the embedder of the guidance is left out: the net is no longer told of any")
        elif self.guidance_embedder is not None and not source.guidance:
            made |= _silent(self.guidance_embedder, _GUIDANCE)
            notes.append("the embedder of the guidance is new and answers 0 at first: the net starts as it was")
        return made, notes

    def _notes_on_blocks(self, source: DiTConfig) -> list[str]:
        """A sentence where samples are drawn in other blocks. Raises UserError for weights that miss their context."""
        there, here = source.blocks, self.config.blocks
        if there > 1 and here == 1:
            raise UserError(
                f"the net was trained with model.blocks={there}, every block but the first given those before, which "
                f"model.blocks=1 never shows it. Use model.blocks={there}, or start from other weights"
            )
        if there == here:
            return []
        return [f"samples were drawn in {there} blocks, and are in {here} here: the same weights see other tokens"]

    def _condition(
        self, c_noise_G: Tensor, second_G: Tensor | None, label_N: Tensor, guidance_G3: Tensor | None = None
    ) -> Tensor:
        """(N, D) SiLU of the sum of the embeddings, which every adaLN takes; times are embedded once per group."""
        assert (second_G is not None) == self.config.second_time, "the flow map and the net disagree on the second time"
        times = self.t_embedder(c_noise_G)
        if self.s_embedder is not None:
            times = times + self.s_embedder(second_G)
        times = self._with_guidance(times, guidance_G3)
        repeated = times.repeat_interleave(label_N.shape[0] // times.shape[0], dim=0)
        return F.silu(repeated + self.y_embedder(label_N))

    def _with_guidance(self, times_GD: Tensor, guidance_G3: Tensor | None) -> Tensor:
        """Added to the embedded times where the net is told it; it does not move with t, so a tangent stays."""
        assert (guidance_G3 is not None) == self.config.guidance, "the flow map and the net disagree on the guidance"
        return times_GD if self.guidance_embedder is None else times_GD + self.guidance_embedder(guidance_G3)

    def _condition_with_tangent(
        self,
        c_noise_G: Tensor,
        dc_noise_G: Tensor,
        second_G: Tensor | None,
        dsecond_G: Tensor | None,
        label_N: Tensor,
        guidance_G3: Tensor | None,
        live: bool,
    ) -> tuple[Tensor, Tensor]:
        times, dtimes = self.t_embedder.with_tangent(c_noise_G, dc_noise_G, live)
        if self.s_embedder is not None:
            assert second_G is not None and dsecond_G is not None, (
                "the flow map and the net disagree on the second time"
            )
            second, dsecond = self.s_embedder.with_tangent(second_G, dsecond_G, live)
            times, dtimes = times + second, dtimes + dsecond
        times = self._with_guidance(times, guidance_G3)
        particles = label_N.shape[0] // times.shape[0]
        times, dtimes = (part.repeat_interleave(particles, dim=0) for part in (times, dtimes))
        return tangent.silu(times + self.y_embedder(label_N), dtimes, live)

    def conditions(self, times: list[tuple[Tensor, Tensor | None]], label_N: Tensor) -> list[Tensor]:
        """As in the base: all times in one call of each embedder, and the labels in one."""
        assert all((second is not None) == self.config.second_time for _, second in times), "see `_condition`"
        sizes = [c_noise.numel() for c_noise, _ in times]
        embedded = self.t_embedder(torch.cat([c_noise.flatten() for c_noise, _ in times]))
        if self.s_embedder is not None:
            embedded = embedded + self.s_embedder(torch.cat([second.flatten() for _, second in times]))  # type: ignore[union-attr]
        label, found = self.y_embedder(label_N), []
        for part, (c_noise, _) in zip(embedded.split(sizes), times, strict=True):
            repeated = part.view(*c_noise.shape, -1).repeat_interleave(len(label_N) // len(c_noise), dim=0)
            found.append(F.silu(repeated + (label if c_noise.dim() == 1 else label[:, None])))
        return found

    @property
    def block_tokens(self) -> int:
        return self.config.block_tokens

    def tokens_of(self, x: Tensor, first: int = 0) -> Tensor:
        """(N, tokens, D) of x (N, C, H, W), or of some of its rows, of which `first` tokens come before."""
        # Contiguous: sums keep the layout of their first term, and every norm would copy a transposed residual stream.
        tokens = self.x_embedder(x).flatten(2).transpose(1, 2).contiguous()
        return tokens + self.pos_embed[:, first : first + tokens.shape[1]]

    def image_of(self, tokens_NTD: Tensor, condition: Tensor) -> Tensor:
        """What the final layer makes of tokens, as (N, C, H, W), or some of the rows."""
        return self._image(self.final_layer(tokens_NTD, condition))

    def _image(self, tokens_NTD: Tensor) -> Tensor:
        """Tokens whose channels are ordered (row in patch, column in patch, channel) back to (N, C, H, W)."""
        c, p = self.config, self.config.patch_size
        rows, columns = tokens_NTD.shape[1] // c.grid[1], c.grid[1]
        grid = tokens_NTD.view(-1, rows, columns, p, p, c.channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, c.channels, rows * p, c.image_width)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        second: Tensor | None,
        label: Tensor,
        dropout_key: Tensor | None = None,
        guidance: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """G, of the shape of x (N, C, H, W); c_noise and second (G,), label and dropout_key (N,), guidance (G, 3)."""
        assert (context is not None) == (self.sequence_blocks > 1), "the flow map and the net disagree on the blocks"
        if context is not None:
            return self.forward_in_context(x, c_noise, second, label, context, dropout_key)
        condition = self._condition(c_noise, second, label, guidance)
        x = self.tokens_of(x)
        for block, key in zip(self.blocks, self.dropout_keys(dropout_key), strict=True):
            x = self.run_block(block, x, condition, key)
        return self.image_of(x, condition)

    def pair(
        self,
        x_t: Tensor,
        x_r: Tensor,
        c_noise_t: Tensor,
        c_noise_r: Tensor,
        second_t: Tensor | None,
        second_r: Tensor | None,
        label: Tensor,
        dropout_key: Tensor | None = None,
        guidance: Tensor | None = None,
        context: Context | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both branches block by block, the second without gradient: sharded weights are gathered once for both.

        The branch without gradient goes first: DeepSpeed's hooks take a module's last call for the one that comes back
        in the backward pass, and let go of its gathered weights then. After the other order they keep all to its end.
        """
        if context is not None:
            times = (c_noise_t, second_t), (c_noise_r, second_r)
            return self.pair_in_context(x_t, x_r, *times, label, context, dropout_key)
        second = None if second_t is None or second_r is None else torch.cat([second_t, second_r])
        told = None if guidance is None else torch.cat([guidance, guidance[: len(c_noise_r)]])
        samples = [len(x_t), len(x_r)]
        both = self._condition(torch.cat([c_noise_t, c_noise_r]), second, torch.cat([label, label[: len(x_r)]]), told)
        condition_t, condition_r = both.split(samples)
        with torch.no_grad():
            x_r = self.tokens_of(x_r)
        x_t = self.tokens_of(x_t)
        for block, key in zip(self.blocks, self.dropout_keys(dropout_key), strict=True):
            x_t, x_r = self._both(block, x_t, condition_t, key, x_r, condition_r)
        with torch.no_grad():
            out_r = self.image_of(x_r, condition_r)
        return self.image_of(x_t, condition_t), out_r

    def _both(
        self, block: nn.Module, x_t: Tensor, condition_t: Tensor, key: Tensor | None, x_r: Tensor, condition_r: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both branches through a block in one call; apart where the one with gradient, alone, is to be recomputed."""
        if not self.recomputes:
            return block(x_t, condition_t, key, x_r, condition_r)
        with torch.no_grad():
            x_r = block(x_r, condition_r, key)
        return self.run_block(block, x_t, condition_t, key), x_r

    def with_tangent(
        self,
        x: Tensor,
        dx: Tensor,
        c_noise: Tensor,
        dc_noise: Tensor,
        second: Tensor | None,
        dsecond: Tensor | None,
        label: Tensor,
        dropout_key: Tensor | None = None,
        guidance: Tensor | None = None,
        live: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """`forward` and its tangent block by block: each block's weights are gathered once for both."""
        condition, dcondition = self._condition_with_tangent(c_noise, dc_noise, second, dsecond, label, guidance, live)
        with tangent.gradients(live):
            dx = tangent.affine_tangent(self.x_embedder, dx, row_dims=3).flatten(2).transpose(1, 2).contiguous()
        x = self.tokens_of(x)
        for block, key in zip(self.blocks, self.dropout_keys(dropout_key), strict=True):
            x, dx = self._block_with_tangent(block, x, dx, condition, dcondition, key, live)
        out, dout = self.final_layer(x, condition, dx, dcondition, live)
        return self._image(out), self._image(dout)

    def _block_with_tangent(
        self,
        block: nn.Module,
        x: Tensor,
        dx: Tensor,
        condition: Tensor,
        dcondition: Tensor,
        key: Tensor | None,
        live: bool,
    ) -> tuple[Tensor, Tensor]:
        """In one call; apart where the value, alone, is to be recomputed for the backward pass."""
        if live or not self.recomputes:
            return self.run_block(block, x, condition, key, None, None, dx, dcondition, live)
        with torch.no_grad():
            _, dx = block(x, condition, key, None, None, dx, dcondition)
        return self.run_block(block, x, condition, key), dx


def _without(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith(prefix)}


def _silent(embedder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Weights of a new embedder that answers 0."""
    new = {f"{prefix}{name}": value for name, value in embedder.state_dict().items()}
    return new | {
        f"{prefix}mlp.2.{name}": torch.zeros_like(new[f"{prefix}mlp.2.{name}"]) for name in ("weight", "bias")
    }


def _label_rows(table: Tensor, classes: Sequence[int | None], null_is_trained: bool) -> tuple[Tensor, str]:
    """Rows (classes + 1, D) of the source's (its classes + 1, D), and a sentence; the last is "no label" in both."""
    old, null = table[:-1], table[-1:] if null_is_trained else table[:-1].mean(dim=0, keepdim=True)
    rows = [len(old) if number is None else number for number in classes]
    new = sum(number is None for number in classes)
    blank = "its row for no label" if null_is_trained else "the mean of its classes, as it never trained without label"
    note = f"of {len(classes)} classes {len(classes) - new} start at rows of the source's {len(old)}"
    note += f", {new} are new and start at {blank}" if new else ""
    note += f"; so does the row for no label ({blank})" if not null_is_trained and not new else ""
    return torch.cat([old, null])[torch.tensor([*rows, len(old)], device=table.device)], note


def build(size: str, **overrides: Any) -> DiT:
    """A DiT of the size table, as in `build("DiT-S/2", num_classes=10)`; overrides are fields of DiTConfig."""
    return DiT(size_config(size, **overrides))


def parameter_count(config: DiTConfig) -> int:
    """Trainable parameters plus the fixed position table, as the DiT paper counts."""
    with torch.device("meta"):
        net = DiT(config)
    return sum(p.numel() for p in net.parameters()) + config.tokens * config.width
