"""The learning rate as a function of the clock, images seen."""

import math

from imm_scale.config.schema import Config


def learning_rate(config: Config, images_seen: int) -> float:
    """Of the step that ends at `images_seen`: a linear rise from 0 over the warm-up, then the schedule.

    constant: lr. cosine: lr (1 + cos(pi u)) / 2 with u from 0 after the warm-up to 1 at train.max_steps.
    inverse_sqrt: lr / sqrt(max(images_seen / reference, 1)), as EDM2 does (Karras et al., arXiv 2312.02696).
    """
    o = config.optimizer
    if images_seen < o.warmup_images:
        return o.lr * images_seen / o.warmup_images
    if o.schedule == "cosine":
        total = config.train.max_steps * config.train.global_batch_size
        done = (images_seen - o.warmup_images) / max(total - o.warmup_images, 1)
        return o.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    if o.schedule == "inverse_sqrt":
        return o.lr / math.sqrt(max(images_seen / o.reference_images, 1.0))
    return o.lr
