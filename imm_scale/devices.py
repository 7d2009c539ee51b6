"""CUDA's current device, which belongs to a thread."""

import torch


def use_device(device: torch.device) -> None:
    """Makes it this thread's current GPU, for CUDA's current device belongs to a thread; nothing on CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
