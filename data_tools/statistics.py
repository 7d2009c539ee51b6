"""Channel mean and standard deviation of a data set, from sums that can be kept per shard and added."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from imm_scale.data.codec import posterior
from imm_scale.data.manifest import Codec


@dataclass(frozen=True)
class ChannelSums:
    """Per channel, in fp64: the sum of the expected raw value and of its expected square, over `count` values."""

    count: int
    total: list[float]
    total_squares: list[float]

    @classmethod
    def zero(cls, channels: int) -> "ChannelSums":
        """The sums over no samples."""
        return cls(0, [0.0] * channels, [0.0] * channels)

    @classmethod
    def of(cls, stored_N: NDArray[np.float16], codec: Codec) -> "ChannelSums":
        """Sums of stored arrays (N, C', H, W). Of a posterior, E[raw^2] = mean^2 + std^2 of each element."""
        mean, std = posterior(torch.from_numpy(stored_N).double(), codec)
        values = mean.numpy()
        squares = values**2 if std is None else values**2 + std.numpy() ** 2
        return cls(
            count=values.size // values.shape[1],
            total=values.sum(axis=(0, 2, 3)).tolist(),
            total_squares=squares.sum(axis=(0, 2, 3)).tolist(),
        )

    def __add__(self, other: "ChannelSums") -> "ChannelSums":
        return ChannelSums(
            self.count + other.count,
            [a + b for a, b in zip(self.total, other.total, strict=True)],
            [a + b for a, b in zip(self.total_squares, other.total_squares, strict=True)],
        )

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Channel means, and standard deviations of all values together (dividing by their number)."""
        mean = np.array(self.total) / self.count
        variance = np.maximum(np.array(self.total_squares) / self.count - mean**2, 0.0)
        return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())
