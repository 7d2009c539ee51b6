"""Pickles as the authors of IMM release them, made of stand-ins for their classes, and hostile ones.

The stand-ins have the names, attributes and nesting of the released objects. Their forward pass is written from the
specification by other means than ours: unfolded patches, one-hot labels, einsum attention, loops for positions.
"""

import enum
import math
import pickle
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

CHANNELS, SIDE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 4, 8, 2, 32, 2, 4, 5
MODULES: dict[str, types.ModuleType] = {}


def _published(module: str) -> Any:
    """Lets pickles name a class or function as one of `module`, which exists only while pickles are written."""

    def rename(thing: Any) -> Any:
        thing.__module__, thing.__qualname__ = module, thing.__name__
        setattr(MODULES.setdefault(module, types.ModuleType(module)), thing.__name__, thing)
        return thing

    return rename


@_published("torch_utils.persistence")
def _reconstruct_persistent_obj(meta: dict) -> None:
    raise AssertionError("nothing in a pickle is called")


@_published("dnnlib.util")
class EasyDict(dict):
    pass


@_published("timm.layers.format")
class Format(enum.StrEnum):
    NCHW = "NCHW"

    def __reduce_ex__(self, protocol: int) -> tuple:
        return Format, (self.value,)  # as Python 3.9 writes it


@_published("timm.layers.patch_embed")
class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.img_size, self.patch_size, self.num_patches = (SIDE, SIDE), (PATCH, PATCH), (SIDE // PATCH) ** 2
        self.flatten, self.output_fmt = True, Format.NCHW
        self.proj = nn.Conv2d(CHANNELS, WIDTH, PATCH, stride=PATCH)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        patches = nn.functional.unfold(x, PATCH, stride=PATCH)  # (N, C * P * P, T)
        return torch.einsum("ncl,wc->nlw", patches, self.proj.weight.flatten(1)) + self.proj.bias


@_published("timm.models.vision_transformer")
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.scale, self.fused_attn = self.head_dim**-0.5, True
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.q_norm, self.k_norm, self.attn_drop = nn.Identity(), nn.Identity(), nn.Dropout(0.0)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = []
        for head in range(HEADS):
            rows = torch.arange(head * self.head_dim, (head + 1) * self.head_dim)
            q, k, v = (x @ self.qkv.weight[o + rows].T + self.qkv.bias[o + rows] for o in (0, WIDTH, 2 * WIDTH))
            scores = torch.einsum("nid,njd->nij", q, k) * self.scale
            heads.append(scores.softmax(-1) @ v)
        return torch.cat(heads, -1) @ self.proj.weight.T + self.proj.bias


@_published("timm.layers.mlp")
class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Dropout(0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        gelu = h * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))
        return self.fc2(gelu)


def _normalized(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@_published("training.dit")
class TimestepEmbedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.use_mlp, self.hidden_size, self.frequency_embedding_size = True, WIDTH, 256
        self.embedding_type = "positional"
        self.mlp = nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, time: Tensor) -> Tensor:
        angles = torch.stack([time * 10000 ** (-i / 128) for i in range(128)], dim=1)
        features = torch.cat([angles.cos(), angles.sin()], dim=1).float()
        return self.mlp[2](_silu(self.mlp[0](features)))


@_published("training.dit")
class LabelEmbedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding_table = nn.Embedding(CLASSES + 1, WIDTH)
        self.num_classes, self.dropout_prob = CLASSES + 1, 0.0


@_published("training.dit")
class DiTBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.skip_linear = None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        m = self.adaLN_modulation[1](_silu(condition)).unflatten(1, (6, 1, WIDTH))
        x = x + m[:, 2] * self.attn(_normalized(x) * (1 + m[:, 1]) + m[:, 0])
        return x + m[:, 5] * self.mlp(_normalized(x) * (1 + m[:, 4]) + m[:, 3])


@_published("training.dit")
class FinalLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_final = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(WIDTH, PATCH * PATCH * CHANNELS)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        m = self.adaLN_modulation[1](_silu(condition)).unflatten(1, (2, 1, WIDTH))
        return self.linear(_normalized(x) * (1 + m[:, 1]) + m[:, 0])


def _positions() -> Tensor:
    table = np.zeros((1, (SIDE // PATCH) ** 2, WIDTH))
    quarter = WIDTH // 4
    for token in range(table.shape[1]):
        for half, place in enumerate((token % (SIDE // PATCH), token // (SIDE // PATCH))):  # column, then row
            for i in range(quarter):
                angle = place / 10000 ** (i / quarter)
                table[0, token, half * 2 * quarter + i] = math.sin(angle)
                table[0, token, half * 2 * quarter + quarter + i] = math.cos(angle)
    return torch.from_numpy(table).float()


@_published("training.dit")
class DiT_XL_2(nn.Module):  # noqa: N801 - the released class is called so
    def __init__(self):
        super().__init__()
        self.in_channels = self.out_channels = CHANNELS
        self.patch_size, self.num_heads, self.skip, self.s_embed = PATCH, HEADS, False, True
        self.s_embedder = TimestepEmbedder()
        self.x_embedder = PatchEmbed()
        self.t_embedder = TimestepEmbedder()
        self.y_embedder = LabelEmbedder()
        self.pos_embed = nn.Parameter(_positions(), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(DEPTH))
        self.final_layer = FinalLayer()

    def forward(self, x: Tensor, time: Tensor, second: Tensor, one_hot: Tensor) -> Tensor:
        unconditional = 1 - one_hot.sum(1, keepdim=True)
        label = torch.cat([one_hot, unconditional], 1) @ self.y_embedder.embedding_table.weight
        condition = self.t_embedder(time) + self.s_embedder(second) + label
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, condition)
        tokens = self.final_layer(x, condition)
        image = torch.empty(len(x), CHANNELS, SIDE, SIDE)
        for token in range(tokens.shape[1]):
            top, left = token // (SIDE // PATCH) * PATCH, token % (SIDE // PATCH) * PATCH
            for pixel in range(PATCH * PATCH):
                values = tokens[:, token, pixel * CHANNELS : (pixel + 1) * CHANNELS]
                image[:, :, top + pixel // PATCH, left + pixel % PATCH] = values
        return image


class Preconditioner(nn.Module):
    """Pickled as EDM's persistent classes are: source text, class name and state."""

    source = ""  # what the authors' loader would execute

    def __init__(self, noise_schedule: str = "fm", f_type: str = "euler_fm", temb_type: str = "identity"):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = SIDE, CHANNELS, CLASSES
        self.use_mixed_precision, self.mixed_precision = True, torch.float16
        self.noise_schedule, self.f_type, self.temb_type = noise_schedule, f_type, temb_type
        self.T, self.eps, self.sigma_data, self.time_scale = 0.994, 0.0, 0.5, 1000.0
        self.nt_low, self.nt_high = 0.0, 165.67
        self.model = DiT_XL_2()
        self._init_args, self._init_kwargs = (), {"model_type": "DiT_XL_2", "f_type": f_type, "eps": 0.0}

    def __reduce__(self) -> tuple:
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": "IMMPrecond"}
        return _reconstruct_persistent_obj, ({**meta, "state": self.__dict__},)

    @torch.no_grad()
    def forward(self, x: Tensor, s: float, t: float, one_hot: Tensor) -> Tensor:
        """f_{s,t}(x) by the formulas of appendix C.5 as they stand there, in Python floats."""
        cosine = self.noise_schedule == "vp_cosine"
        alpha = [math.cos(u * math.pi / 2) if cosine else 1 - u for u in (s, t)]
        sigma = [math.sin(u * math.pi / 2) if cosine else u for u in (s, t)]
        norm = math.hypot(alpha[1], sigma[1])
        second = {"identity": s, "stride": t - s}[self.temb_type]
        times = (torch.full((len(x),), 1000.0 * u, dtype=torch.float64) for u in (t, second))
        out = self.model(x / (self.sigma_data * norm), *times, one_hot)
        if self.f_type == "identity":
            return sigma[0] / sigma[1] * x + (alpha[0] - alpha[1] * sigma[0] / sigma[1]) * out
        if self.f_type == "euler_fm":
            return x - self.sigma_data * (t - s) * out
        c_skip = (alpha[0] * alpha[1] + sigma[0] * sigma[1]) / norm**2
        return c_skip * x - self.sigma_data * (alpha[0] * sigma[1] - sigma[0] * alpha[1]) / norm * out


def preconditioner(seed: int = 0, **settings: str) -> Preconditioner:
    """A stand-in with weights large enough that every one of them matters."""
    torch.manual_seed(seed)
    net = Preconditioner(**settings).eval().requires_grad_(False)
    for name, parameter in net.named_parameters():
        if not name.endswith("pos_embed"):
            nn.init.normal_(parameter, std=0.15)
    return net


def dump(document: Any, protocol: int = 4) -> bytes:
    """A pickle in which the stand-ins are called as the authors' classes are."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in MODULES.items():
            patch.setitem(sys.modules, name.partition(".")[0], types.ModuleType(name.partition(".")[0]))
            patch.setitem(sys.modules, name, module)
        return pickle.dumps(document, protocol)


def write(path: Path, net: Any, **others: Any) -> str:
    """A released file: a dict whose `ema` is the preconditioner."""
    path.write_bytes(dump({"ema": net, **others}))
    return str(path)


def short(text: str) -> bytes:
    """The instruction that puts a string on a pickle's stack."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


def stack_global(module: str, name: str) -> bytes:
    return short(module) + short(name) + b"\x93"


def called(function: bytes, *arguments: bytes) -> bytes:
    """Instructions that call what `function` names with arguments, each given by its instructions."""
    return function + b"(" + b"".join(arguments) + b"tR"


def binbytes(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def pickled(*instructions: bytes) -> bytes:
    return b"\x80\x04" + b"".join(instructions) + b"."


def in_a_storage(instructions: bytes) -> bytes:
    """A pickle whose tensor bytes are torch's header, then a pickle of these instructions."""
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."
    inner = magic + b"\x80\x02" + instructions + b"." + b"\x80\x02]."
    return pickled(called(stack_global("torch.storage", "_load_from_bytes"), binbytes(inner)))
