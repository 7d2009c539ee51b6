"""On what, with what and when: `machine.json`."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

NAME = "machine.json"
_COMMAND = "IMM_GPU_COMMAND"  # environment variable that hands the command line down to the sections' processes


def remember_command() -> None:
    """Call in the process that was started by hand."""
    os.environ[_COMMAND] = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])


def note(out: Path) -> None:
    """Writes the file, unless an earlier section of this command did."""
    if not (out / NAME).exists():
        (out / NAME).write_text(json.dumps(describe(), indent=1))


def describe() -> dict[str, Any]:
    """Card, driver, versions, date, commit and command; None where there is no such thing here."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None,
        "capability": list(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None,
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "deepspeed", "triton", "xformers", "diffusers")},
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "commit": _output_of("git", "rev-parse", "HEAD"),
        "command": os.environ.get(_COMMAND),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output_of(*command: str) -> str | None:
    """What a tool prints, None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.strip() or None
