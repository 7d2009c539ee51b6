"""What a GPU could do: its data sheet's row, by the name the driver gives it."""

import re

import torch

from imm_scale.planner.hardware import GPUS, Gpu

_OTHERS = {"nvl", "mig", "laptop", "d"}  # share a name with a row, but not its figures


def data_sheet(name: str, memory: float) -> Gpu | None:
    """The row of the planner's table, or None for a GPU it does not know.

    Args:
        name: as CUDA gives it, "NVIDIA H100 80GB HBM3".
        memory: bytes, which tells variants of one name apart.
    """
    tokens = re.split(r"[\s-]+", name.lower().replace("rtx ", "rtx"))
    if _OTHERS & set(tokens):
        return None
    rows = [gpu for gpu in GPUS.values() if gpu.name.partition("-")[0] in tokens]
    # A card for a PCIe slot is slower than its namesake where the table has a row for it.
    slots = [gpu for gpu in rows if gpu.name.endswith("pcie") == ("pcie" in tokens)] or rows
    return min(slots, key=lambda gpu: abs(gpu.memory - memory), default=None)


def data_sheet_of(device: torch.device) -> Gpu | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return data_sheet(properties.name, properties.total_memory)
