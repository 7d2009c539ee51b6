"""The held-out tokens that a run's likelihoods are of.

Legend: N samples, T tokens.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from imm_scale.config.schema import Config, DataConfig
from imm_scale.data.dataset import Dataset
from imm_scale.data.tokens.spaces import TokenSpace
from imm_scale.errors import UserError
from imm_scale.preflight import held_out_index


@dataclass(frozen=True)
class HeldOutTokens:
    """Samples never trained on.

    Attributes:
        ids_NT: int64.
        label_N: int64.
        url: of the manifest they are from.
        hash: of ids and labels.
    """

    ids_NT: Tensor
    label_N: Tensor
    url: str

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(self.ids_NT.numpy().tobytes() + self.label_N.numpy().tobytes()).hexdigest()


def check(data: DataConfig) -> None:
    """Raises UserError where a config names no held-out tokens."""
    if data.holdout_manifest is None and (data.manifest is None or data.holdout == 0):
        raise UserError(
            "there are no held-out tokens to measure: set data.holdout_manifest (imm-scale pack-tokens writes one), or "
            "evaluate a run that was trained with data.holdout"
        )


def read(config: Config, space: TokenSpace, most: int | None) -> HeldOutTokens:
    """Held-out tokens, `most` of them at random (None: all). Raises UserError where there are none, or of others."""
    check(config.data)
    url = config.data.holdout_manifest or config.data.manifest
    assert url is not None
    dataset = Dataset(url)
    space.reading(dataset.manifest)
    index = held_out_index(config, dataset)
    if most is not None and most < len(index):
        index = np.sort(np.random.default_rng(config.seed).permutation(index)[:most])
    ids = torch.from_numpy(dataset.gather(index).astype(np.int64))
    return HeldOutTokens(ids, torch.from_numpy(dataset.labels[index]), url)
