"""CUDA's current device, which belongs to a thread."""

import torch


def numbered(device: torch.device) -> torch.device:
    """A GPU with its number: "cuda" alone is this thread's current one, and may be another in another thread."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def use_device(device: torch.device) -> None:
    """Makes it this thread's current GPU, for CUDA's current device belongs to a thread; nothing on CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
