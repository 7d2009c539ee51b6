"""The moving averages a checkpoint holds: under which name each lies, and how much of it is still initial weights."""

from imm_scale.checkpoint.format import Checkpoint
from imm_scale.config.load import from_yaml
from imm_scale.parallel import ema

YOUNG = 0.1  # share of the initial weights above which an average is said to be young


def state_of(checkpoint: Checkpoint, decay: float) -> str | None:
    """The checkpoint's state of a decay; None where its run kept no such average.

    Runs up to version 0.1 wrote six digits of a decay, so a name alone does not say which it is: the config does.
    """
    decays = from_yaml(checkpoint.meta.config).ema.decays
    older = [other for other in decays if ema.older_state_name(other) == ema.older_state_name(decay)]
    if decay not in decays:
        return None
    if ema.state_name(decay) in checkpoint.states:
        return ema.state_name(decay)
    name = ema.older_state_name(decay)
    return name if older == [decay] and name in checkpoint.states else None


def initial_share(checkpoint: Checkpoint, decay: float) -> float:
    """What part of an average is still the weights the run began with, between 0 and 1.

    Each update leaves decay^power of what was there (`parallel/ema.py`); with `ema.warmup` the first leaves nothing.
    """
    config = from_yaml(checkpoint.meta.config)
    if config.ema.warmup:
        return 0.0
    return float(decay ** (config.ema_power * checkpoint.meta.optimizer_steps))


def warning(checkpoint: Checkpoint, decay: float | None) -> str:
    """What to say of an average that is young, "" of any other.

    Args:
        decay: None for the first of the config; 0 for the raw weights, which are no average.
    """
    decay = from_yaml(checkpoint.meta.config).ema.decays[0] if decay is None else decay
    share = initial_share(checkpoint, decay) if decay else 0.0
    if share <= YOUNG:
        return ""
    return (
        f"the average of decay {decay!r} is still {share:.0%} initial weights at step {checkpoint.meta.step}: take a "
        "shorter one (--ema, 0 for the raw weights) or a later checkpoint, or train with ema.warmup=true"
    )
