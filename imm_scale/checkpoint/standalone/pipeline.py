"""Samples of a flow map, in few steps: a diffusers pipeline that needs torch and diffusers alone.

    pipeline = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    images = pipeline(class_labels=[0, 1, 2], num_inference_steps=2, seed=0).images

Algorithms 4 and 5 of "Inductive Moment Matching" (arXiv 2503.07565). It was written by imm-scale: with `seed`, sample i
is the one that `imm-scale sample --seed` calls i.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Jump = Callable[[Tensor, float, float], Tensor]
Renoise = Callable[[Tensor, float, int], Tensor]
DECODED_AT_ONCE = 8


# --- noise ---


def numbered_normals(seed: int, purpose: str, indices: Any, shape: Sequence[int], stream: int = 0) -> Tensor:
    """Standard normals (N, *shape) in fp32, each row a function of (seed, purpose, its index, stream) alone.

    Philox4x32-10 (Salmon et al., SC 2011), then Box and Muller's transform.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    key = [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")]
    mask, shift, size = np.uint64(0xFFFFFFFF), np.uint64(32), math.prod(shape)
    number = np.asarray(indices, np.uint64)[:, None]
    block = np.arange(-(-size // 4), dtype=np.uint64)[None]
    words = list(np.broadcast_arrays(block, np.uint64(stream), number & mask, number >> shift))
    for _ in range(10):
        a, b = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        k0, k1 = map(np.uint64, key)
        words = [(b >> shift) ^ words[1] ^ k0, b & mask, (a >> shift) ^ words[3] ^ k1, a & mask]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    radii = [np.sqrt(-2.0 * np.log((word + 0.5) * 2.0**-32)) for word in words[::2]]
    angles = [word * (2.0 * math.pi * 2.0**-32) for word in words[1::2]]
    parts = [r * f(a) for f in (np.cos, np.sin) for r, a in zip(radii, angles, strict=True)]
    normals = np.stack(parts, axis=-1).reshape(len(number), -1)[:, :size]
    return torch.from_numpy(normals.astype(np.float32)).reshape(-1, *shape)


# --- times ---


def time_grid(transformer: Any, kind: str | Sequence[float], steps: int) -> list[float]:
    """Decreasing times, steps + 1 of them: `uniform`, `edm`, `eta_1.4` (two steps), `auto`, or the times themselves."""
    if not isinstance(kind, str):
        times = [float(time) for time in kind]
        if len(times) != steps + 1 or not all(1 >= t > s >= 0 for t, s in itertools.pairwise(times)):
            raise ValueError(f"grid={times} must be {steps + 1} times that fall, from at most 1 to at least 0")
        return times
    config = transformer.config
    first, last = config.t_max, config.t_min
    if kind == "auto":
        kind = config.two_step_grid if steps == 2 else "uniform"
    if kind == "uniform":
        return [first + (last - first) * (i / steps) for i in range(steps)] + [last]
    if kind == "edm" and first < 1:
        highest, lowest = (
            math.pow(sigma / alpha, 1 / 7) for alpha, sigma in map(transformer.alpha_sigma, (first, last))
        )
        etas = [(highest + (lowest - highest) * (i / steps)) ** 7 for i in range(1, steps)]
        return [first, *map(transformer.time_of_eta, etas), last]
    if kind == "eta_1.4" and steps == 2 and last < transformer.time_of_eta(1.4) < first:
        return [first, transformer.time_of_eta(1.4), last]
    raise ValueError(
        f"grid={kind!r} with {steps} steps from t={first} to {last}: choose auto, uniform, edm (from below 1), eta_1.4 "
        "(two steps), or give the times"
    )


# --- samplers ---


def pushforward(jump: Jump, x: Tensor, times: Sequence[float], renoise: Renoise) -> Tensor:
    """From each time straight to the next, (N, C, H, W)."""
    for t, s in itertools.pairwise(times):
        x = jump(x, s, t)
    return x


def restart(jump: Jump, x: Tensor, times: Sequence[float], renoise: Renoise) -> Tensor:
    """To the end, fresh noise up to the next time, and again, (N, C, H, W)."""
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        x = jump(x, times[-1], t)
        if step < len(times) - 2:
            x = renoise(x, s, step)
    return x


def pushforward_restart(jump: Jump, x: Tensor, times: Sequence[float], renoise: Renoise) -> Tensor:
    """The first half of the steps, rounded up, by pushforward, the rest by restart, (N, C, H, W)."""
    middle = len(times) // 2
    x = pushforward(jump, x, times[: middle + 1], renoise)
    return restart(jump, x, times[middle:], renoise) if middle < len(times) - 1 else x


def heun(jump: Jump, x: Tensor, times: Sequence[float], renoise: Renoise) -> Tensor:
    """Second-order steps along the velocity, the last one Euler's, (N, C, H, W): for nets without a second time."""
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        euler = jump(x, s, t)
        if step == len(times) - 2:
            return euler
        velocity = (euler - jump(euler, times[-1], s)) / (s - times[-1])
        x = 0.5 * (x + euler - (t - s) * velocity)
    return x


SAMPLERS = {"pushforward": pushforward, "restart": restart, "pushforward_restart": pushforward_restart, "heun": heun}


# --- the pipeline ---


class FlowMapPipeline(DiffusionPipeline):
    """Class-conditional images in one to a few steps.

    Args:
        transformer: a FlowMapTransformer.
        vae: the AutoencoderKL whose latents it draws; nets that draw pixels need none.
        guide: a weaker FlowMapTransformer of the same samples that guidance leads away from (autoguidance, arXiv
            2406.02507); without one it leads away from the net's own answer without a label.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae", "guide"]

    def __init__(self, transformer: Any, vae: Any = None, guide: Any = None):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, guide=guide)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        num_inference_steps: int = 1,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        sampler: str = "pushforward",
        grid: str | Sequence[float] = "auto",
        seed: int | None = None,
        first_index: int = 0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draws a sample for each label.

        Args:
            class_labels: one or N labels.
            num_inference_steps: steps; each costs one evaluation of the net, two under guidance it is not told of.
            guidance_scale: w of w G(label) + (1 - w) G(no label), or of w f + (1 - w) guide; 1 is off.
            guidance_interval: (low, high] of the times at which guidance is in force.
            sampler: pushforward, restart, pushforward_restart or heun.
            grid: auto, uniform, edm, eta_1.4, or the times themselves.
            seed, first_index: noise by number: image k depends on seed and first_index + k alone.
            generator: noise as elsewhere in diffusers, in place of `seed`.
            latents: (N, C, H, W) standard normals to start from, in place of drawn ones.
            output_type: pil, np (N, H, W, C) or pt (N, C, H, W) in [0, 1], or latent, what the net draws, fp32.
            return_dict: an ImagePipelineOutput with `images`, rather than a tuple.
        """
        labels = self._labels(class_labels)
        self._check_guide()
        self._check(num_inference_steps, sampler, output_type)
        if seed is not None and generator is not None:
            raise ValueError("give seed or generator, not both")
        low, high = guidance_interval
        device, dtype = labels.device, torch.float32 if labels.device.type == "mps" else torch.float64
        indices = first_index + np.arange(len(labels))

        def noise(purpose: str, stream: int = 0) -> Tensor:
            config = self.transformer.config
            shape = (config.channels, config.height, config.image_width)
            if seed is not None:
                normals = numbered_normals(seed, purpose, indices, shape, stream)
            else:
                normals = randn_tensor((len(labels), *shape), generator, device)
            return config.sigma_data * normals.to(device, dtype)

        def jump(x: Tensor, s: float, t: float) -> Tensor:
            if self.transformer.config.largest_guidance is not None:
                return self.transformer(x, s, t, labels, guidance_scale, (low, high))
            scale = guidance_scale if low < t <= high else 1.0
            if self.guide is None or scale == 1.0:
                return self.transformer(x, s, t, labels, scale)
            return scale * self.transformer(x, s, t, labels) + (1.0 - scale) * self.guide(x, s, t, labels)

        def renoise(x: Tensor, t: float, step: int) -> Tensor:
            alpha, sigma = self.transformer.alpha_sigma(t)
            return alpha * x + sigma * noise("restart", step)

        start = noise("sample") if latents is None else self.transformer.config.sigma_data * latents.to(device, dtype)
        times = time_grid(self.transformer, grid, num_inference_steps)
        images = self._images(SAMPLERS[sampler](jump, start, times, renoise), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, class_labels: int | Sequence[int] | Tensor) -> Tensor:
        labels = torch.as_tensor(class_labels, device=self._execution_device).reshape(-1).long()
        known = self.transformer.config.num_classes
        if not len(labels) or labels.min() < 0 or labels.max() >= known:
            raise ValueError(f"class_labels={labels.tolist()}: the net knows classes 0 to {known - 1}")
        return labels

    def _check(self, steps: int, sampler: str, output_type: str) -> None:
        config = self.transformer.config
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps} must be at least 1")
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler={sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
        velocity = config.parameterization in ("euler_fm", "velocity") and config.second_time == "none"
        if sampler == "heun" and not velocity:
            raise ValueError("sampler='heun' follows a velocity, which this net is not; use pushforward")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} is unknown; choose one of pil, np, pt, latent")
        if config.codec == "vae" and self.vae is None and output_type != "latent":
            raise ValueError(
                "the net draws an autoencoder's latents: load it with vae=..., or use output_type='latent'"
            )

    def _check_guide(self) -> None:
        same = (
            "channels",
            "height",
            "image_width",
            "num_classes",
            "trajectory",
            "sigma_data",
            "mean",
            "std",
            "codec",
            "pixel_range",
        )
        nets = [net for net in (self.guide, self.transformer) if net is not None]
        if self.guide is not None and any(net.config.largest_guidance is not None for net in nets):
            raise ValueError("a net that is told its guidance has no guide, and is none: leave guide out")
        if self.guide is not None and any(self.guide.config[key] != self.transformer.config[key] for key in same):
            raise ValueError(
                f"the guide draws other samples than the transformer: both need the same {', '.join(same)}"
            )

    def _images(self, x_NCHW: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x_NCHW.float()
        config = self.transformer.config
        mean, std = (torch.tensor(v, device=x_NCHW.device).view(-1, 1, 1) for v in (config.mean, config.std))
        raw = x_NCHW.float() / config.sigma_data * std + mean
        if config.codec == "vae":
            raw = torch.cat([self.vae.decode(z.to(self.vae.dtype)).sample for z in raw.split(DECODED_AT_ONCE)])
        images = (raw.float() if config.pixel_range == "unit" else raw.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        return arrays if output_type == "np" else self.numpy_to_pil(arrays)
