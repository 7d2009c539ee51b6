"""State dicts as DiT and SiT publish them, of a small net, and what they compute, in float64 numpy.

Written from the papers and the published code's behaviour by other means than ours: loops over patches, heads and
positions, labels as rows of a table, no module of torch.
"""

import argparse
import math

import numpy as np
import torch
from torch import Tensor

CHANNELS, SIDE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 4, 8, 2, 16, 2, 2, 5
GRID = SIDE // PATCH


def positions() -> np.ndarray:
    table, quarter = np.zeros((GRID * GRID, WIDTH)), WIDTH // 4
    for token in range(GRID * GRID):
        for half, place in enumerate((token % GRID, token // GRID)):  # column, then row
            for i in range(quarter):
                angle = place / 10000 ** (i / quarter)
                table[token, half * 2 * quarter + i] = math.sin(angle)
                table[token, half * 2 * quarter + quarter + i] = math.cos(angle)
    return table


def state_dict(seed: int = 0, out_channels: int = 2 * CHANNELS) -> dict[str, Tensor]:
    """Random weights large enough that every one of them matters, under the published names."""
    shapes = {
        "x_embedder.proj": (WIDTH, CHANNELS, PATCH, PATCH),
        "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
        "final_layer.linear": (PATCH * PATCH * out_channels, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }
    for block in range(DEPTH):
        parts = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 4, "adaLN_modulation.1": 6}
        shapes |= {f"blocks.{block}.{name}": (n * WIDTH, WIDTH) for name, n in parts.items()}
        shapes[f"blocks.{block}.mlp.fc2"] = (WIDTH, 4 * WIDTH)
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    weights = {f"{name}.weight": drawn(*shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": drawn(shape[0]) for name, shape in shapes.items()}
    weights["y_embedder.embedding_table.weight"] = drawn(CLASSES + 1, WIDTH)
    weights["pos_embed"] = torch.from_numpy(positions()).float()[None]
    return weights


def checkpoint(weights: dict[str, Tensor], **arguments: object) -> dict:
    """What the training scripts save."""
    raw = {name: value + 1 for name, value in weights.items()}
    return {"model": raw, "ema": weights, "opt": {"state": {}}, "args": argparse.Namespace(**arguments)}


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _normalized(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


class Net:
    """Answers of all output channels, float64, for one image at a time."""

    def __init__(self, weights: dict[str, Tensor]):
        self.w = {name: value.double().numpy() for name, value in weights.items()}

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def _attention(self, block: str, x: np.ndarray) -> np.ndarray:
        qkv, head = self._linear(f"{block}.attn.qkv", x), WIDTH // HEADS
        answers = []
        for h in range(HEADS):
            q, k, v = (qkv[:, part * WIDTH + h * head : part * WIDTH + (h + 1) * head] for part in range(3))
            scores = np.exp(q @ k.T / math.sqrt(head))
            answers.append(scores / scores.sum(1, keepdims=True) @ v)
        return self._linear(f"{block}.attn.proj", np.concatenate(answers, 1))

    def _mlp(self, block: str, x: np.ndarray) -> np.ndarray:
        h = self._linear(f"{block}.mlp.fc1", x)
        return self._linear(f"{block}.mlp.fc2", 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))))

    def _patches(self, x: np.ndarray) -> np.ndarray:
        kernel = self.w["x_embedder.proj.weight"]
        rows = []
        for token in range(GRID * GRID):
            top, left = token // GRID * PATCH, token % GRID * PATCH
            rows.append((kernel * x[:, top : top + PATCH, left : left + PATCH]).sum((1, 2, 3)))
        return np.array(rows) + self.w["x_embedder.proj.bias"]

    def __call__(self, x: np.ndarray, time: float, label: int) -> np.ndarray:
        """(out_channels, SIDE, SIDE) of x (CHANNELS, SIDE, SIDE); label CLASSES is none."""
        angles = np.array([time * 10000 ** (-i / 128) for i in range(128)])
        embedded = self._linear("t_embedder.mlp.0", np.concatenate([np.cos(angles), np.sin(angles)]))
        condition = self._linear("t_embedder.mlp.2", _silu(embedded))
        condition = _silu(condition + self.w["y_embedder.embedding_table.weight"][label])
        tokens = self._patches(x) + self.w["pos_embed"][0]
        for index in range(DEPTH):
            block = f"blocks.{index}"
            m = self._linear(f"{block}.adaLN_modulation.1", condition).reshape(6, WIDTH)
            tokens = tokens + m[2] * self._attention(block, _normalized(tokens) * (1 + m[1]) + m[0])
            tokens = tokens + m[5] * self._mlp(block, _normalized(tokens) * (1 + m[4]) + m[3])
        m = self._linear("final_layer.adaLN_modulation.1", condition).reshape(2, WIDTH)
        out = self._linear("final_layer.linear", _normalized(tokens) * (1 + m[1]) + m[0])
        channels = out.shape[1] // PATCH**2
        image = np.empty((channels, SIDE, SIDE))
        for token in range(GRID * GRID):
            top, left = token // GRID * PATCH, token % GRID * PATCH
            for pixel in range(PATCH * PATCH):
                values = out[token, pixel * channels : (pixel + 1) * channels]
                image[:, top + pixel // PATCH, left + pixel % PATCH] = values
        return image
