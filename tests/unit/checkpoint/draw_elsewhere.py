"""Run where imm_scale cannot be imported: loads folders as diffusers does, and draws what a file of jobs says.

    python draw_elsewhere.py JOBS.json OUT.npz

A job is {"name", "folder", "load": arguments of from_pretrained, "vae", "guide": a folder or none, "call": arguments of
the pipeline}; OUT holds the samples of each by its name.
"""

import json
import sys
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline


def _draw(job: dict[str, Any]) -> np.ndarray:
    vae = {} if job["vae"] is None else {"vae": AutoencoderKL.from_pretrained(job["vae"])}
    guide = {}
    if job["guide"] is not None:
        guide["guide"] = DiffusionPipeline.from_pretrained(job["guide"], **job["load"]).transformer
    pipeline = DiffusionPipeline.from_pretrained(job["folder"], **job["load"], **vae, **guide)
    pipeline.set_progress_bar_config(disable=True)
    call = dict(job["call"])
    if "latents" in call:
        call["latents"] = torch.tensor(call["latents"])
    images = pipeline(**call).images
    return images.numpy() if isinstance(images, torch.Tensor) else np.stack([np.asarray(image) for image in images])


if __name__ == "__main__":
    try:
        import imm_scale
    except ImportError:
        pass
    else:
        raise SystemExit(f"imm_scale can be imported here: {imm_scale.__file__}")
    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    np.savez(sys.argv[2], **{job["name"]: _draw(job) for job in jobs})
