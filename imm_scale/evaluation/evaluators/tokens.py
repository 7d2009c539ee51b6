"""Evaluations of token nets: what steps or blocks cost in nats of held-out tokens, and how far samples are from them.

A masked net is measured by nll@L under its own head, beside the information profile of its single-token conditionals:
what L steps of independent tokens cost at best is the floor. A causal net is measured by the likelihood of what its
sampler draws: blocks, or one token at a time, which is also the law of verified decoding. A sampler without a
likelihood is measured by the paired Brier score of its samples. Legend: N samples, T tokens, L steps.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from imm_scale import build, precision, rng
from imm_scale.checkpoint import export
from imm_scale.config.schema import Config, EvaluationConfig, SamplingConfig
from imm_scale.errors import UserError
from imm_scale.evaluation.evaluators.base import Announce, Evaluator
from imm_scale.evaluation.records import FOLDER, SCHEMA_VERSION, axes
from imm_scale.evaluation.tokens import brier, estimates, held_out, likelihood, scoring, work
from imm_scale.evaluation.tokens.estimates import Estimate
from imm_scale.evaluation.tokens.held_out import HeldOutTokens
from imm_scale.evaluation.tokens.profile import Profile, Scores, alarm, schedule_costs
from imm_scale.methods.base import Steps
from imm_scale.methods.samplers import SAMPLES_PER_CALL
from imm_scale.methods.tokens import masking, verified
from imm_scale.methods.tokens.masked import MaskedDiffusion
from imm_scale.methods.tokens.next_block import NextBlock
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World
from imm_scale.planner.flops import forward_multiply_adds, sampling_passes
from imm_scale.sampling import draw
from imm_scale.sampling.draw import SamplingPlan, plan_of, times_of
from imm_scale.sampling.profiles import StoredProfile
from imm_scale.sampling.source import Source

_NLL, _BRIER = "nll_per_token", "one_minus_brier_4"
_BRIER_CONTEXTS = 256  # where the Brier score is all there is, unless evaluation.brier says otherwise
_FEWEST = 4  # samples: two halves, each with a spread
_DECODED = 64  # samples by which verified decoding is measured
_OF_DISTANCES = ("evaluation.repeats", "evaluation.metrics", "evaluation.compared", "evaluation.reference")
Measures = dict[str, dict[str, Any]]


def check(config: Config) -> None:
    """Raises UserError where there is nothing to measure."""
    held_out.check(config.data)


class TokenEvaluator(Evaluator):
    """Likelihoods of held-out tokens.

    Raises:
        UserError: no committed checkpoint, or no held-out tokens.
    """

    def __init__(self, source: Source, config: Config, world: World, announce: Announce, folder: str = FOLDER):
        super().__init__(source, config, world, announce, folder)
        check(config)

    @cached_property
    def held_out(self) -> HeldOutTokens:
        """The held-out tokens, at most `evaluation.num` of them."""
        return held_out.read(self.config, self.model.spec.space, self.config.evaluation.num)

    @cached_property
    def method(self) -> Any:
        """As the weights were trained by."""
        return build.method(self.model.spec)

    @cached_property
    def scores(self) -> Scores:
        """The held-out pass of a masked net: single tokens at every number of visible ones."""
        x, label = self.held_out.ids_NT, self.held_out.label_N
        if len(x) < _FEWEST:
            raise UserError(
                f"{len(x)} held-out samples leave no standard errors: take at least {_FEWEST} (evaluation.num, --num), "
                "or a larger held-out set"
            )
        passes = scoring.enough_passes(*x.shape)
        scorer = likelihood.MaskedScorer(self.model.net, self.device)
        return scoring.score_labelled(scorer, x, label, passes, self.config.sampling.seed, self._collect)

    @cached_property
    def profile(self) -> StoredProfile:
        """What `sampling.grid=best` will read of it."""
        found = Profile(self.scores)
        errors = tuple(found.at(int(n)).error for n in found.nodes_M)
        visible, means, fitted = (tuple(values.tolist()) for values in (found.nodes_M, found.mean_M, found.fitted()))
        return StoredProfile(self.model.weights_id, visible, means, errors, fitted)

    def _collect(
        self, name: str, rows: Callable[[int, int], NDArray[np.float64]], total: int, *shape: int
    ) -> NDArray[np.float64]:
        """The values (total, *shape) of all rows, computed by all ranks in turns."""
        out = torch.zeros(total, *shape, dtype=torch.float64)
        starts = range(self.world.rank * SAMPLES_PER_CALL, total, self.world.size * SAMPLES_PER_CALL)
        hidden = None if self.world.is_main else True  # None: shown on a terminal only
        with precision.computing(self.config.sampling.precision, self.device):
            for start in tqdm(starts, desc=name, unit="call", disable=hidden, leave=False):
                stop = min(start + SAMPLES_PER_CALL, total)
                out[start:stop] = torch.from_numpy(rows(start, stop))
        return distributed.all_sum(out).numpy()

    def _each(self, name: str, of: Callable[[Tensor, Tensor, Tensor], Tensor], *shape: int) -> Tensor:
        """(N, *shape) fp64 of each held-out sample: `of` is given ids, labels and numbers of some."""
        x, label = self.held_out.ids_NT, self.held_out.label_N

        def rows(start: int, stop: int) -> NDArray[np.float64]:
            index = torch.arange(start, stop)
            return of(x[index].to(self.device), label[index].to(self.device), index).double().cpu().numpy()

        return torch.from_numpy(self._collect(name, rows, len(x), *shape))

    def _uniforms(self, index: Tensor) -> Tensor:
        """(N, T) of held-out samples of these numbers (N,)."""
        return likelihood.uniforms(self.config.sampling.seed, index, self.model.spec.space.length).to(self.device)

    # --- the file ---

    def _settings(self, sampling: SamplingConfig, evaluation: EvaluationConfig, steps: int) -> dict[str, Any]:
        meta = self.checkpoint.meta if self.checkpoint else None
        return {
            "schema_version": SCHEMA_VERSION,
            "step": self.source.step,
            "images_seen": meta.images_seen if meta else None,
            "objective": self.model.spec.method.name,
            "ema": export.ema_state(self.checkpoint, sampling.ema) if self.checkpoint else None,
            "training_data": meta.manifest_hash if meta else None,
            "source": None if meta else {"weights": self.model.weights_id},
            "held_out": self.held_out.hash,
            "extractor": self._what_is_compared(),
            "seed": sampling.seed,
            "sampler": self.model.spec.method.sampler_named(sampling.sampler),
            "order": sampling.order,
            "grid": sampling.grid,
            "labels": "all",
            "guidance_scale": 1.0,
            "guidance_interval": [0.0, 1.0],
            "precision": sampling.precision,
            "compile": False,
            "samples_per_call": SAMPLES_PER_CALL,
            "steps": steps,
            "num": evaluation.num,
            "brier": evaluation.brier,
        }

    def _what_is_compared(self) -> dict[str, Any]:
        codec = self.model.spec.space.codec
        return {"name": codec.tokenizer, "kind": "tokens", "id": codec.tokenizer_hash}

    def _provenance(self) -> dict[str, Any]:
        reference = {"id": self.held_out.hash, "count": len(self.held_out.ids_NT), "manifest": self.held_out.url}
        space = self.model.spec.space
        found = {"reference": reference, "codec": space.provenance, "tokens": space.length}
        if isinstance(self.method, MaskedDiffusion):
            found["profile"] = asdict(self.profile)
            if self.world.is_main and self.source.run_dir is not None:
                self.profile.save(self.source.run_dir, self.source.step)
        return found

    def _warnings(self, count: int) -> list[str]:
        messages = export.warnings(self.source.weights_url, self.config.sampling.ema)
        said = alarm(Profile(self.scores)) if isinstance(self.method, MaskedDiffusion) else None
        messages += [] if said is None else [said]
        for line in messages:
            self._announce(f"warning: {line}")
        return messages

    # --- one step count ---

    def _result(self, sampling: SamplingConfig, evaluation: EvaluationConfig, steps: int) -> dict[str, Any]:
        began, self._values = time.perf_counter(), {}
        plan = self._plan(sampling, steps)
        nll: Estimate | None = None
        measures: Measures = {}
        passes: float = plan.function_evaluations(times_of(self.model.spec, plan))
        if isinstance(self.method, MaskedDiffusion) and plan.order != "confidence":
            nll, measures = self._of_masked(plan)
        elif isinstance(self.method, NextBlock):
            nll, measures, passes = self._of_causal(plan)
        contexts = evaluation.brier or (_BRIER_CONTEXTS if nll is None else 0)
        if contexts:
            measures |= self._brier(plan, contexts)
        if nll is not None:
            measures = {_NLL: _measure(nll), **measures}
        return self._described(plan, measures, passes, time.perf_counter() - began)

    def _plan(self, sampling: SamplingConfig, steps: int) -> SamplingPlan:
        """With `best` sizes written out."""
        if sampling.grid == "best" and isinstance(self.method, MaskedDiffusion):
            sizes = self.profile.best_sizes(steps)
            sampling = dataclasses.replace(sampling, grid=",".join(map(str, sizes)))
        return plan_of(sampling, self.model.spec, steps, len(self.held_out.ids_NT), sampling.seed)

    def _of_masked(self, plan: SamplingPlan) -> tuple[Estimate, Measures]:
        length = self.model.spec.space.length
        by_kind = {cost.kind: cost for cost in schedule_costs(self.scores, [plan.steps])}
        net, counts = self.model.net, masking.visible_counts(plan.grid, plan.steps, length)

        def of(x: Tensor, label: Tensor, index: Tensor) -> Tensor:
            rank = likelihood.orders(plan.order, self.config.sampling.seed, index, length)
            return likelihood.of_steps(net, x, label, counts, rank.to(x.device), self._uniforms(index))

        nll_N = self._each(f"{plan.steps} steps", of)
        self._values = {"nll": nll_N.numpy()}
        nll = estimates.mean(nll_N)
        whole = Profile(self.scores).nll
        measures = {
            "nll_one_at_a_time": _measure(_over(whole, length)),
            "excess_per_token": _measure(_over(Estimate(nll.value - whole.value, nll.error), length)),
            "product_floor_per_token": _measure(_over(by_kind["best"].nll, length)),
            "product_uniform_per_token": _measure(_over(by_kind["uniform"].nll, length)),
        }
        return _over(nll, length), measures

    def _of_causal(self, plan: SamplingPlan) -> tuple[Estimate, Measures, float]:
        net, length = self.model.net, self.model.spec.space.length
        number = -(-length // net.model.config.block)
        blocks_NJ = self._each("blocks", lambda x, y, i: likelihood.of_blocks(net, x, y, self._uniforms(i)), number)
        single_NT = self._each("tokens", lambda x, y, _: likelihood.of_next_tokens(net, x, y), length)
        self._values = {"nll_of_blocks": blocks_NJ.numpy(), "nll_one_at_a_time": single_NT.numpy()}
        blocks, single = estimates.mean(blocks_NJ.sum(dim=1)), estimates.mean(single_NT.sum(dim=1))
        measures = {
            "nll_of_blocks": _measure(_over(blocks, length)),
            "nll_one_at_a_time": _measure(_over(single, length)),
        }
        if plan.sampler == "blocks":
            return _over(blocks, length), measures, plan.steps
        acceptance = self._acceptance(plan)
        measures["tokens_a_pass"] = _plain(acceptance.tokens_a_pass)
        rate = acceptance.accepted.double() / acceptance.drafted.clamp_min(1)
        measures |= {f"accepted_{place}": _plain(float(value)) for place, value in enumerate(rate, 1)}
        return _over(single, length), measures, float(acceptance.passes.double().mean())

    def _acceptance(self, plan: SamplingPlan) -> verified.Acceptance:
        """Of a few samples of the held-out classes, the same on every rank."""
        index = torch.arange(min(_DECODED, len(self.held_out.label_N)))
        there, space = index.to(self.device), self.model.spec.space
        steps = Steps(
            times_of(self.model.spec, plan),
            plan.sampler,
            uniform=lambda stream, count: rng.uniform(plan.seed, "tokens", there, count, stream),
        )
        start = space.prior(plan.seed, draw.STARTING_NOISE, there)
        with precision.computing(plan.precision, self.device):
            return verified.decode(self.model.net, start, self.held_out.label_N[index].to(self.device), steps)[1]

    def _brier(self, plan: SamplingPlan, contexts: int) -> Measures:
        """Two samples for each of so many held-out samples, of its class."""
        x = self.held_out.ids_NT[:contexts]
        labels = self.held_out.label_N[:contexts].repeat_interleave(2)
        plan = dataclasses.replace(plan, labels=tuple(labels.tolist()), num=len(labels), batch_size=SAMPLES_PER_CALL)
        space, ids = self.model.spec.space, torch.zeros(len(labels), x.shape[1], dtype=torch.int64)
        for index, _, z in draw.sample(self.model.net, self.model.spec, plan, self.world, "samples"):
            ids[index] = space.tokens(z).cpu()
        ids = distributed.all_sum(ids)
        scores = brier.paired_brier(x, ids[::2], ids[1::2])
        longest = scores[max(scores)]
        return {
            _BRIER: _measure(Estimate(1.0 - longest.value, longest.error)),
            **{f"brier_{window}": _measure(score) for window, score in scores.items()},
        }

    def _cost(self, plan: SamplingPlan, passes: float) -> dict[str, Any]:
        """A causal net goes along the sequence, all others refine the whole of it."""
        net, length = self.model.spec.net, self.model.spec.space.length
        if isinstance(self.method, MaskedDiffusion):
            return axes(1, passes, work.of_masked(net, plan.steps, plan.order == "confidence"))
        if isinstance(self.method, NextBlock):
            block = self.model.net.model.config.block
            is_plain = plan.sampler == "blocks"
            spent = work.of_blocks(net, block) if is_plain else work.of_verified(net, length, block, passes)
            return axes(passes, passes, spent)
        forwards = plan.forwards(times_of(self.model.spec, plan), sampling_passes(net))
        return axes(plan.sequence_passes, passes, round(forwards * forward_multiply_adds(net)))

    def _described(self, plan: SamplingPlan, measures: Measures, passes: float, seconds: float) -> dict[str, Any]:
        metric, first = next(iter(measures.items()))
        cost = self._cost(plan, passes)
        count = len(self.held_out.ids_NT)
        return {
            "metric": metric,
            "steps": plan.steps,
            "function_evaluations": passes,
            "sampler": plan.sampler,
            "grid": plan.grid,
            "order": plan.order,
            "times": times_of(self.model.spec, plan).tolist(),
            "guidance_scale": 1.0,
            "num": count,
            "seeds": [plan.seed],
            "values": [first["value"]],
            "mean": first["value"],
            "std": None,
            "value": first["value"],
            "error": first["error"],
            "error_kind": "standard error over held-out samples",
            "count": count,
            "numerical_error": 0.0,
            **cost,
            "flops_per_image": 2 * cost["multiply_adds"],
            "seconds": seconds,
            "measures": measures,
            "precision": plan.precision,
            "compile": False,
        }


def _over(estimate: Estimate, length: int) -> Estimate:
    return Estimate(estimate.value / length, estimate.error / length)


def _measure(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "error": estimate.error, "values": [estimate.value]}


def _plain(value: float) -> dict[str, Any]:
    return {"value": value, "error": None, "values": [value]}


def refuse_idle(typed: Any) -> None:
    """Raises UserError for keys of distances, which do nothing for tokens."""
    for key in sorted(typed):
        if key in _OF_DISTANCES or key.startswith("evaluation.extractor."):
            raise UserError(f"{key} does nothing here: tokens are measured by likelihoods; leave it out")
        if key in ("sampling.prompt", "sampling.given"):
            raise UserError(f"{key} is for imm-scale sample: held-out tokens are measured whole; leave it out")
