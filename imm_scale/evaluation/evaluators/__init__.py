"""Evaluations of weights: distances of samples, or likelihoods of held-out tokens; `choose` says which a model has."""

from imm_scale.checkpoint import export
from imm_scale.checkpoint.format import committed_steps
from imm_scale.config.schema import Config
from imm_scale.data.tokens.spaces import TokenSpace
from imm_scale.evaluation.evaluators.base import Announce, Evaluator
from imm_scale.evaluation.evaluators.distances import DistanceEvaluator
from imm_scale.evaluation.evaluators.tokens import TokenEvaluator
from imm_scale.evaluation.records import FOLDER
from imm_scale.parallel.world import World
from imm_scale.registry import SPACES
from imm_scale.sampling.source import Source


def measures_tokens(source: Source, config: Config) -> bool:
    """Whether a source's samples, or those of a run that is still to come, are tokens."""
    if source.run_dir is not None and not committed_steps(source.run_dir):
        return issubclass(SPACES.get(config.data.space.name), TokenSpace)
    return isinstance(export.read_spec(source.at_newest().weights_url, config.sampling.ema)[0].space, TokenSpace)


def choose(source: Source, config: Config, world: World, announce: Announce, folder: str = FOLDER) -> Evaluator:
    """The evaluator of a source's samples; arguments as of `Evaluator`. Raises UserError as its classes do."""
    kind = TokenEvaluator if measures_tokens(source, config) else DistanceEvaluator
    return kind(source, config, world, announce, folder)
