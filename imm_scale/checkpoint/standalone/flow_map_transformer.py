"""A flow map around a diffusion transformer: f_{s,t} takes samples at time t straight to time s.

    f_{s,t}(x_t) = c_skip x_t + c_out G(c_in x_t, t, s, label)

As in "Inductive Moment Matching" (arXiv 2503.07565, appendix C.5), around the transformer of arXiv 2212.09748. This
file needs torch and diffusers alone; its weights and config lie beside it, and pipeline.py samples from it. It was
written by imm-scale, and is for sampling: no dropout.

Legend: N samples, T tokens, D width. Times are floats from 0 (data) to 1 (noise).
"""

import math
from collections import OrderedDict
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

TIME_FREQUENCIES = 128
MAX_PERIOD = 10000.0


def product(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """A layer in the precision of its weights: around the matrix products of 16 bits all else stays in fp32."""
    return layer(x.to(layer.weight.dtype))


def modulate(x_NTD: Tensor, shift_ND: Tensor, scale_ND: Tensor) -> Tensor:
    """x (1 + scale) + shift, (N, T, D)."""
    return x_NTD * (1.0 + scale_ND[:, None]) + shift_ND[:, None]


class Fp32Linear(nn.Linear):
    """A layer of the conditioning, computed in fp32 whatever its weights are: in 16 bits close times would be one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


def modulation(width: int, parts: int) -> nn.Sequential:
    """DiT's adaLN projection, whose SiLU all blocks share."""
    return nn.Sequential(OrderedDict({"1": Fp32Linear(width, parts * width)}))


def position_table(width: int, rows: int, columns: int) -> Tensor:
    """(rows * columns, width) sin-cos positions: the first half encodes the column, sin before cos."""
    quarter = width // 4
    frequencies = 1.0 / MAX_PERIOD ** (torch.arange(quarter, dtype=torch.float64) / quarter)

    def encode(position: Tensor) -> Tensor:
        angles = position[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij")
    return torch.cat([encode(column.flatten()), encode(row.flatten())], dim=1).float()


class TimeEmbedder(nn.Module):
    """A time as cosines, then sines, then two layers; or so many numbers, each as these."""

    def __init__(self, width: int, frequencies: list[float] | None, numbers: int = 1):
        super().__init__()
        steps = [i / TIME_FREQUENCIES for i in range(TIME_FREQUENCIES)]
        self.frequencies = frequencies or [math.exp(-math.log(MAX_PERIOD) * step) for step in steps]
        self.mlp = nn.Sequential(Fp32Linear(2 * numbers * TIME_FREQUENCIES, width), nn.SiLU(), Fp32Linear(width, width))

    def forward(self, *times: float) -> Tensor:
        """(1, D). The angles are in fp64, for rounding them would be rounding the time."""
        angles = torch.tensor(times, dtype=torch.float64).outer(torch.tensor(self.frequencies, dtype=torch.float64))
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).reshape(1, -1)
        return self.mlp(waves.float().to(next(self.parameters()).device))


class Attention(nn.Module):
    """Multi-head self-attention with an optional RMS norm of queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x_NTD: Tensor) -> Tensor:
        n, t, d = x_NTD.shape
        q, k, v = product(self.qkv, x_NTD).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v)
        return product(self.proj, mixed.transpose(1, 2).reshape(n, t, d))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        return product(self.fc2, F.gelu(product(self.fc1, x_NTD), approximate="tanh"))


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x_NTD: Tensor, condition_ND: Tensor) -> Tensor:
        parts = self.adaLN_modulation(condition_ND).chunk(6, dim=1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        x_NTD = x_NTD + gate_a[:, None] * self.attn(modulate(self.norm1(x_NTD), shift_a, scale_a))
        return x_NTD + gate_m[:, None] * self.mlp(modulate(self.norm2(x_NTD), shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch_size: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_size * patch_size * channels)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x_NTD: Tensor, condition_ND: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition_ND).chunk(2, dim=1)
        return product(self.linear, modulate(self.norm_final(x_NTD), shift, scale))


class FlowMapTransformer(ModelMixin, ConfigMixin):
    """f_{s,t}, a DiT told where it stands and where to land.

    Args:
        width, depth, heads, patch_size, mlp_ratio, qk_norm: of the transformer.
        channels, height, image_width: of a sample as the net sees it.
        num_classes: labels are 0 to num_classes - 1.
        unconditional: whether the label num_classes was trained as "no label", which guidance needs.
        trajectory: ot_fm, x_t = (1 - t) x + t eps, or vp_cosine, x_t = cos(pi t / 2) x + sin(pi t / 2) eps.
        parameterization: what G predicts: identity the data, epsilon the noise, the others a velocity.
        second_time: what G is told of s: s, t_minus_s or none.
        time_scale: times are multiplied by this before they are embedded.
        time_input: what is embedded of a time: t itself, or ddpm_step, the step of DDPM's linear schedule as noisy.
        frequencies: of the time embedding; None: 128, geometric from 1 to 1 / 10000.
        largest_guidance: the largest scale of a net that is told its guidance, in one evaluation; None: it is not.
        t_min, t_max: times sampling ends and starts at.
        two_step_grid: times visited in two steps where none are asked for: uniform or eta_1.4.
        sigma_data: standard deviation of samples and noise, as the net sees them.
        mean, std: per channel; a sample is std / sigma_data * (what the net sees) + mean.
        codec: pixels, a sample is an image, or vae, it is an autoencoder's latent without scaling factor.
        pixel_range: black and white of the image or of the autoencoder's: signed -1 and 1, unit 0 and 1.
    """

    _no_split_modules: ClassVar[list[str]] = ["Block"]

    @register_to_config
    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        patch_size: int,
        channels: int,
        height: int,
        image_width: int,
        num_classes: int,
        unconditional: bool,
        trajectory: str,
        parameterization: str,
        second_time: str,
        time_scale: float,
        t_min: float,
        t_max: float,
        two_step_grid: str,
        sigma_data: float,
        mean: list[float],
        std: list[float],
        codec: str,
        pixel_range: str = "signed",
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        time_input: str = "t",
        frequencies: list[float] | None = None,
        largest_guidance: float | None = None,
    ):
        super().__init__()
        self.x_embedder = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.t_embedder = TimeEmbedder(width, frequencies)
        self.s_embedder = None if second_time == "none" else TimeEmbedder(width, frequencies)
        self.y_embedder = nn.Embedding(num_classes + 1, width)  # the last row is "no label"
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size, channels)
        self.guidance_embedder = None if largest_guidance is None else TimeEmbedder(width, frequencies, 3)
        table = position_table(width, height // patch_size, image_width // patch_size)
        self.register_buffer("pos_embed", table[None], persistent=False)

    # --- the trajectory ---

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """Coefficients of data and noise at a time."""
        if self.config.trajectory == "ot_fm":
            return 1.0 - t, t
        return math.cos(t * (math.pi / 2)), math.sin(t * (math.pi / 2))

    def time_of_eta(self, eta: float) -> float:
        """The time at which sigma / alpha is eta."""
        return eta / (1.0 + eta) if self.config.trajectory == "ot_fm" else math.atan(eta) * (2 / math.pi)

    def coefficients(self, s: float, t: float) -> tuple[float, float, float]:
        """c_in, c_skip and c_out of f_{s,t}."""
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.alpha_sigma(s), self.alpha_sigma(t)
        norm, sigma_data = math.hypot(alpha_t, sigma_t), self.config.sigma_data
        # alpha_s sigma_t - sigma_s alpha_t, without its cancellation
        determinant = t - s if self.config.trajectory == "ot_fm" else math.sin((t - s) * (math.pi / 2))
        c_in = 1.0 / (sigma_data * norm)
        if self.config.parameterization in ("euler_fm", "velocity"):
            c_in = c_in if self.config.parameterization == "euler_fm" else 1.0 / sigma_data
            return c_in, 1.0, -sigma_data * determinant
        if self.config.parameterization == "epsilon":
            return c_in, alpha_s / alpha_t, -sigma_data * determinant / alpha_t
        if self.config.parameterization == "simple_edm":
            return c_in, (alpha_s * alpha_t + sigma_s * sigma_t) / norm**2, -sigma_data * determinant / norm
        return (c_in, sigma_s / sigma_t, determinant / sigma_t) if sigma_t else (c_in, 1.0, 0.0)

    # --- the net ---

    def told(self, t: float) -> float:
        """A time as the net is told it, before it is scaled."""
        if self.config.time_input == "t":
            return t
        # Beta from 1e-4 to 0.02 in 1,000 steps (arXiv 2006.11239); step -1 is data, and between steps log alpha-bar
        # is linear.
        log_alpha_bar = np.append(0.0, np.log1p(-np.linspace(1e-4, 0.02, 1000)).cumsum())
        alpha, sigma = self.alpha_sigma(t)
        noisiness = math.log1p((sigma / alpha) ** 2) if alpha else math.inf
        return float(np.interp(noisiness, -log_alpha_bar, np.arange(-1.0, 1000.0)))

    def predict(
        self, x_NCHW: Tensor, s: float, t: float, class_labels_N: Tensor, guidance: tuple[float, float, float]
    ) -> Tensor:
        """G, (N, C, H, W) fp32; guidance is 1 - 1 / w and the interval, which only nets that are told it look at."""
        scale, p = self.config.time_scale, self.config.patch_size
        s, t = self.told(s), self.told(t)
        times = self.t_embedder(scale * t)
        if self.s_embedder is not None:
            times = times + self.s_embedder(scale * (s if self.config.second_time == "s" else t - s))
        if self.guidance_embedder is not None:
            times = times + self.guidance_embedder(*guidance)
        condition = F.silu(times + self.y_embedder(class_labels_N))
        tokens = product(self.x_embedder, x_NCHW).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens.float(), condition)
        n, c, h, w = x_NCHW.shape
        patches = self.final_layer(tokens, condition).view(n, h // p, w // p, p, p, c)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w).float()

    def forward(
        self,
        x_NCHW: Tensor,
        s: float,
        t: float,
        class_labels_N: Tensor,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """f_{s,t}(x_t), (N, C, H, W) in the dtype of x_t (fp64 is best).

        Args:
            x_NCHW: samples at time t.
            s, t: where to land and where they are, s <= t.
            class_labels_N: (N,) labels.
            guidance_scale: w replaces G by w G(label) + (1 - w) G(no label); 1 is off and costs nothing.
            guidance_interval: its times, for a net that is told both, and has guidance in one evaluation.
        """
        c_in, c_skip, c_out = self.coefficients(s, t)
        scaled = (c_in * x_NCHW).float()
        told = self.guidance_embedder is not None
        strength = 1.0 - 1.0 / self.checked(guidance_scale, guidance_interval) if told else 0.0
        out = self.predict(scaled, s, t, class_labels_N, (strength, *guidance_interval)).to(x_NCHW.dtype)
        if guidance_scale != 1.0 and not told:
            if not self.config.unconditional:
                raise ValueError(f"guidance_scale={guidance_scale}: this net was never trained without labels; use 1")
            no_label = torch.full_like(class_labels_N, self.config.num_classes)
            other = self.predict(scaled, s, t, no_label, (0.0, 0.0, 1.0)).to(x_NCHW.dtype)
            out = guidance_scale * out + (1.0 - guidance_scale) * other
        return c_skip * x_NCHW + c_out * out

    def checked(self, guidance_scale: float, guidance_interval: tuple[float, float]) -> float:
        """The scale, where the net was told such guidance."""
        low, high = guidance_interval
        if not 1.0 <= guidance_scale <= self.config.largest_guidance:
            raise ValueError(
                f"guidance_scale={guidance_scale}: this net was told scales from 1 to {self.config.largest_guidance}"
            )
        if guidance_scale != 1.0 and not low <= 0.5 <= high:
            raise ValueError(f"guidance_interval={(low, high)}: this net was told intervals around 0.5")
        return guidance_scale
