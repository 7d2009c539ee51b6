"""The information profile of a masked net as an evaluation keeps it, and the step sizes it says cost least.

RUN/profiles/step-NNNNNNNN-HASH.json, HASH of the weights: `imm-scale evaluate` writes it, `sampling.grid=best` reads
it.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from imm_scale import storage
from imm_scale.config.schema import SamplingConfig
from imm_scale.errors import UserError
from imm_scale.methods.tokens import schedules
from imm_scale.sampling.source import Source

FOLDER = "profiles"


@dataclass(frozen=True)
class StoredProfile:
    """Of one set of weights, in nats a token.

    Attributes:
        weights: their hash.
        visible, nll, error: number of visible tokens, the mean of -log p of a masked one, and its standard error.
        fitted: (T,) non-increasing, of every number of visible tokens.
    """

    weights: str
    visible: tuple[int, ...]
    nll: tuple[float, ...]
    error: tuple[float, ...]
    fitted: tuple[float, ...]

    def save(self, run_dir: str, step: int | None) -> None:
        """Writes it into a run folder."""
        storage.write_text(_url(run_dir, step, self.weights), json.dumps(asdict(self), indent=1))

    def best_sizes(self, steps: int) -> tuple[int, ...]:
        """Sizes of the steps that cost least. Raises UserError for more steps than tokens."""
        length = len(self.fitted)
        if not 1 <= steps <= length:
            raise UserError(f"{steps} steps for {length} tokens: a step draws at least one; use at most {length}")
        return schedules.best_schedules(np.array(self.fitted), steps).sizes(steps)


def _url(run_dir: str, step: int | None, weights: str) -> str:
    return storage.join(run_dir, FOLDER, f"step-{step or 0:08d}-{weights[:12]}.json")


def load(url: str) -> StoredProfile:
    """Raises UserError for a file that is no profile."""
    try:
        fields: dict[str, Any] = json.loads(storage.read_bytes(url))
        lists = {key: tuple(value) for key, value in fields.items() if key != "weights"}
        return StoredProfile(weights=fields["weights"], **lists)
    except FileNotFoundError as error:
        raise UserError(f"there is no profile at {url}: write one by imm-scale evaluate") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{url} is no profile of a masked net ({error}): imm-scale evaluate writes one") from error


def find(source: Source, config: SamplingConfig, weights: str | None) -> StoredProfile:
    """The profile for `grid=best`: that of `sampling.profile`, else of the run's checkpoint.

    Args:
        weights: hash of the weights it has to be of; None where they are not read yet.

    Raises:
        UserError: none there, or one of other weights.
    """
    if config.profile is not None:
        profile = load(config.profile)
        if weights is not None and profile.weights != weights:
            raise UserError(
                f"sampling.profile={config.profile} is of other weights ({profile.weights[:12]}, not {weights[:12]}): "
                "evaluate these, or take another grid"
            )
        return profile
    names = [] if source.run_dir is None else storage.list_names(storage.join(source.run_dir, FOLDER))
    ending = ".json" if weights is None else f"-{weights[:12]}.json"
    fitting = [name for name in names if name.startswith(f"step-{source.step or 0:08d}-") and name.endswith(ending)]
    if not fitting:
        raise UserError(
            f"grid=best needs the profile of these weights, and {source.url} has none: run imm-scale evaluate "
            "first, or name one by sampling.profile"
        )
    return load(storage.join(source.run_dir or "", FOLDER, fitting[0]))


def written_out(
    source: Source, config: SamplingConfig, step_counts: Sequence[int], weights: str | None
) -> dict[int, SamplingConfig]:
    """The `sampling` section for each step count, the sizes of `grid=best` in it. Raises UserError as `find`."""
    if config.grid != "best":
        return dict.fromkeys(step_counts, config)
    profile = find(source, config, weights)
    sizes = {steps: ",".join(map(str, profile.best_sizes(steps))) for steps in step_counts}
    return {steps: dataclasses.replace(config, grid=grid) for steps, grid in sizes.items()}
