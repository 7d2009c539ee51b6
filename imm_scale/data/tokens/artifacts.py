"""Samples of tokens as texts, or as the images they stand for.

Legend: N samples, T tokens.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from imm_scale.data.spaces import Artifacts, png
from imm_scale.errors import UserError


def ids_file(ids_T: NDArray[Any]) -> bytes:
    """A npy file of int32 ids (T,)."""
    stream = io.BytesIO()
    np.save(stream, ids_T.astype(np.int32), allow_pickle=False)
    return stream.getvalue()


class Texts(Artifacts):
    """Ids and the text they stand for.

    Args:
        ids: from samples (N, ...) to ids (N, T).
        decode: from the ids (T,) of a sample to its text.
    """

    formats = ("text", "npz", "jsonl", "webdataset")

    def __init__(self, ids: Callable[[Tensor], Tensor], decode: Callable[[NDArray[Any]], str]):
        self._ids, self._decode = ids, decode

    def __call__(self, x_N: Tensor) -> Tensor:
        raise UserError("these samples are texts and no images: draw them by imm-scale sample --format text")

    def files(self, x_N: Tensor) -> list[dict[str, bytes]]:
        """tokens.npy and txt, of each."""
        ids = self._ids(x_N).cpu().numpy()
        return [{"tokens.npy": ids_file(row), "txt": self._decode(row).encode()} for row in ids]


class TokenImages(Artifacts):
    """Ids and the image they stand for.

    Args:
        ids: from samples (N, ...) to ids (N, T).
        decode: from ids (N, T) to uint8 images (N, H, W, channels).
    """

    formats = ("grid", "npz", "folder", "jsonl", "webdataset")

    def __init__(self, ids: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]):
        self._ids, self._decode = ids, decode

    def __call__(self, x_N: Tensor) -> Tensor:
        return self._decode(self._ids(x_N).cpu())

    def files(self, x_N: Tensor) -> list[dict[str, bytes]]:
        """tokens.npy and png, of each."""
        ids = self._ids(x_N).cpu()
        pairs = zip(ids.numpy(), self._decode(ids).numpy(), strict=True)
        return [{"tokens.npy": ids_file(row), "png": png(image)} for row, image in pairs]
