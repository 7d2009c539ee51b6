"""Evaluations of weights: distances of samples, or likelihoods of held-out tokens; `choose` says which a model has."""

from imm_scale.checkpoint import export
from imm_scale.config.schema import Config
from imm_scale.data.tokens.spaces import TokenSpace
from imm_scale.evaluation.evaluators.base import Announce, Evaluator
from imm_scale.evaluation.evaluators.distances import DistanceEvaluator
from imm_scale.evaluation.evaluators.tokens import TokenEvaluator
from imm_scale.evaluation.records import FOLDER
from imm_scale.parallel.world import World
from imm_scale.sampling.source import Source


def choose(source: Source, config: Config, world: World, announce: Announce, folder: str = FOLDER) -> Evaluator:
    """The evaluator of a source's samples; arguments as of `Evaluator`. Raises UserError as its classes do."""
    space = export.read_spec(source.at_newest().weights_url, config.sampling.ema)[0].space
    kind = TokenEvaluator if isinstance(space, TokenSpace) else DistanceEvaluator
    return kind(source, config, world, announce, folder)
