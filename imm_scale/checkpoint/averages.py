"""The moving averages a checkpoint holds: under which name each lies, and how much of it is still initial weights."""

from collections import Counter
from collections.abc import Sequence

from imm_scale.checkpoint.format import Checkpoint
from imm_scale.config.load import from_yaml
from imm_scale.parallel import ema

YOUNG = 0.1  # share of the initial weights above which an average is said to be young


def state_of(checkpoint: Checkpoint, decay: float) -> str | None:
    """The checkpoint's state of a decay; None where its run kept no such average."""
    return states(checkpoint, from_yaml(checkpoint.meta.config).ema.decays).get(decay)


def states(checkpoint: Checkpoint, decays: Sequence[float]) -> dict[float, str]:
    """{decay: state} of the averages that are there, of the decays of the checkpoint's config.

    Runs up to version 0.1 wrote six digits of a decay, so a name alone does not say which it is: the config does.
    """
    held, older = set(checkpoint.states), Counter(map(ema.older_state_name, decays))
    found = {}
    for decay in decays:
        name = ema.older_state_name(decay)
        if ema.state_name(decay) in held:
            found[decay] = ema.state_name(decay)
        elif name in held and older[name] == 1:
            found[decay] = name
    return found


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
