"""The factor that lifts fp16 gradients out of underflow (arXiv 1710.03740, section 3.2).

Ours and not `torch.amp.GradScaler`, which DeepSpeed gives each rank for itself: there a rank sees the overflow of its
own partition only, clipping meets gradients that are still scaled, and a step that is skipped never lowers the factor.
"""

GROWTH_INTERVAL = 2000
_INITIAL_SCALE, _MIN_SCALE, _MAX_SCALE = 2.0**16, 1.0, 2.0**24


class LossScale:
    """A factor fed with what all ranks agreed on, so that it is the same on all of them.

    Attributes:
        value: multiply the loss by this, divide the gradients by it.
        good_steps: steps since it last changed.
    """

    def __init__(self, value: float = _INITIAL_SCALE, good_steps: int = 0):
        self.value, self.good_steps = value, good_steps

    def update(self, overflowed: bool) -> None:
        """Halves it after an overflow, doubles it after `GROWTH_INTERVAL` steps without one."""
        if overflowed:
            self.value, self.good_steps = max(self.value / 2.0, _MIN_SCALE), 0
            return
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.value, self.good_steps = min(self.value * 2.0, _MAX_SCALE), 0
