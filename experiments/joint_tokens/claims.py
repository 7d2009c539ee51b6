"""What was expected of the heads, and whether the runs agree: every verdict is computed from their numbers."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from experiments.claims import Claim
from experiments.joint_tokens import hands
from experiments.joint_tokens.prediction import BySizes, Pair
from experiments.joint_tokens.study import FLOORED, Study, over_seeds, paired

ORDER = (FLOORED, "mixture", "chain", "autoregressive")  # from worst to best
ERRORS = 5.0  # standard errors that a gap should be wide
_NEAR = 0.05  # of the likelihood of one token at a time
_PREDICTED = 0.01  # relative error allowed of formula (1)

Predictions = Mapping[tuple[int, int], Pair]  # {(seed, steps): nats predicted, and measured}


Pairs = Mapping[tuple[str, str], Sequence[tuple[float, float]]]


def gaps(study: Study, steps: int, name: str = "nll") -> Pairs:
    """{(worse, better) neighbours of the order: (gap in nats, its standard error) of each seed}, sample by sample."""
    return _gaps_of(itertools.pairwise(ORDER), study, steps, name)


def _gaps_of(pairs: Iterable[tuple[str, str]], study: Study, steps: int, name: str) -> Pairs:
    return {
        pair: [paired(*(_nats(study, head, seed, steps, name) for head in pair)) for seed in study.seeds]
        for pair in pairs
    }


def _nats(study: Study, head: str, seed: int, steps: int, name: str) -> NDArray[np.float64]:
    """(N,) nats of a sequence, of a causal net those of its last block."""
    values = study.values(head, seed, steps, name)
    return values if values.ndim == 1 else values[:, -1]


def _ahead(text: str, found: Pairs) -> Claim:
    """The better head of each pair is ahead from every seed, by five standard errors."""
    least = {pair: min(seeds, key=lambda one: one[0] / one[1]) for pair, seeds in found.items()}
    said = "; ".join(f"{worse} - {better} {gap:.2f} ± {error:.2f}" for (worse, better), (gap, error) in least.items())
    wide = all(gap > ERRORS * error for gap, error in least.values())
    return Claim(text, wide, f"The narrowest gaps of all seeds, in nats: {said}.")


def order(study: Study, steps: int, name: str = "nll") -> Claim:
    """Each head is ahead of the one before from every seed, by five standard errors."""
    where = "the blocks of a causal net" if name != "nll" else f"{steps} pass" + "es" * (steps > 1)
    return _ahead(
        f"In {where} {', '.join(ORDER)} follow each other from every seed, with gaps over {ERRORS:g} standard errors.",
        gaps(study, steps, name),
    )


def between(study: Study, steps: int, name: str = "nll") -> Claim:
    """The joint heads are ahead of the product head, and none of the autoregressive one."""
    where = "of blocks" if name != "nll" else f"in {steps} pass" + "es" * (steps > 1)
    pairs = [pair for head in ORDER[1:-1] for pair in ((FLOORED, head), (head, ORDER[-1]))]
    return _ahead(
        f"Mixture and chain lie between the product and the autoregressive head {where}, by {ERRORS:g} errors.",
        _gaps_of(pairs, study, steps, name),
    )


def floor(study: Study) -> Claim:
    """No product head is below its floor."""
    margins = []
    for seed in study.seeds:
        for steps in study.task.steps:
            result = study.result(FLOORED, seed, steps)
            least, error = study.measure(FLOORED, seed, steps, "product_floor_per_token")
            margins.append(((result["mean"] - least) / (result["error"] ** 2 + (error or 0) ** 2) ** 0.5, steps))
    lowest, steps = min(margins)
    return Claim(
        "The product head is nowhere below the floor of its own profile, by two standard errors.",
        lowest > -2.0,
        f"The lowest of all seeds and numbers of passes is {lowest:+.1f} standard errors from it, at {steps}.",
    )


def below_the_floor(study: Study, head: str) -> Claim:
    """A joint head draws in one pass what no product can: of one pass there is one schedule, the floor is measured."""
    by_seed = [paired(*(study.values(one, seed, 1) for one in (FLOORED, head))) for seed in study.seeds]
    return Claim(
        f"In one pass the {head} head is below the floor of products by {ERRORS:g} standard errors from every seed.",
        all(gap > ERRORS * error for gap, error in by_seed),
        f"Nats a sequence below it: {', '.join(f'{gap:.2f} ± {error:.2f}' for gap, error in by_seed)}.",
    )


def prediction(said: Predictions) -> Claim:
    """Formula (1) says from the profile what the product head has in any number of equal steps."""
    far = []
    for (_, steps), (predicted, measured) in said.items():
        gap, error = paired(predicted, measured)
        far.append((abs(gap) / measured.mean(), error / measured.mean(), steps))
    worst, error, steps = max(far)
    return Claim(
        f"The profile predicts nll@L of the product head to {_PREDICTED:.0%} (formula 1).",
        worst <= _PREDICTED,
        f"The farthest of all seeds and {_steps(said)} passes is {worst:.2%} ± {error:.2%}, in {steps}.",
    )


def best_sizes(said: Mapping[tuple[int, int], BySizes], errors: float) -> Claim:
    """Sizes fitted to one half of the samples are better on the other than equal ones, by so many standard errors."""
    gaps = {key: paired(nats["uniform"], nats["best"]) for key, nats in said.items()}
    (seed, steps), (gap, error) = min(gaps.items(), key=lambda one: one[1][0] / one[1][1])
    far = f"ahead of equal ones by {errors:g}" if errors > 0 else f"nowhere behind equal ones by {-errors:g}"
    return Claim(
        f"The best sizes of steps are {far} standard errors in {_steps(said)} passes, from every seed, on the half of "
        "the samples that they were not fitted to.",
        gap > errors * error,
        f"The narrowest gain is {gap:.3f} ± {error:.3f} nats a sequence, in {steps} passes at seed {seed}.",
    )


def _steps(said: Iterable[tuple[int, int]]) -> str:
    return ", ".join(str(steps) for steps in sorted({steps for _, steps in said}))


def near_one_at_a_time(study: Study, steps: int) -> Claim:
    """The autoregressive head needs few passes for what one token at a time has."""
    last = study.task.steps[-1]
    ratios = [
        float(study.values(ORDER[-1], seed, steps).mean() / study.values(ORDER[-1], seed, last).mean()) - 1
        for seed in study.seeds
    ]
    return Claim(
        f"The autoregressive head in {steps} passes is within {_NEAR:.0%} of one token a pass.",
        max(map(abs, ratios)) <= _NEAR,
        f"By seed: {', '.join(f'{ratio:+.1%}' for ratio in ratios)}.",
    )


def tokens_a_pass(study: Study) -> Claim:
    """Verified decoding takes more tokens a pass from better drafts."""
    (blocks,) = study.task.steps
    by_head = {h: [study.measure(h, s, blocks, "tokens_a_pass")[0] for s in study.seeds] for h in ORDER}
    ahead = [
        by_head[better][i] > by_head[worse][i]
        for worse, better in itertools.pairwise(ORDER)
        for i in range(len(study.seeds))
    ]
    said = ", ".join(
        f"{head} {mean:.2f} ± {spread:.2f}" for head in ORDER for mean, spread in [over_seeds(by_head[head])]
    )
    return Claim("Tokens a pass of verified decoding rise in the same order, from every seed.", all(ahead), f"{said}.")


def hands_enumerated(study: Study, laws: dict[tuple[str, int, int], NDArray[np.float64]]) -> Iterator[Claim]:
    """What is known in closed form of four hands; laws by head, seed and passes."""
    one_pass = [laws[FLOORED, seed, 1] for seed in study.seeds]
    kl, valid = [hands.divergence(law) for law in one_pass], [hands.validity(law) for law in one_pass]
    yield Claim(
        "In one pass a product head has KL log 4 = 1.386 and validity 1/4, to 1 %.",
        max(abs(value / np.log(4) - 1) for value in kl) < 0.01 and max(abs(4 * value - 1) for value in valid) < 0.01,
        f"KL {_listed(kl)}; validity {_listed(valid)}.",
    )
    twice = [hands.divergence(laws[FLOORED, seed, 2]) for seed in study.seeds]
    yield Claim("In two passes it has KL 0, to 0.02.", max(twice) < 0.02, f"KL {_listed(twice)}.")
    for head in ("mixture", "chain", "autoregressive", "uniform_conditioned"):
        kl = [hands.divergence(laws[head, seed, 1]) for seed in study.seeds]
        yield Claim(
            f"In one pass {study.task.rows[head].title} has KL below 0.05.", max(kl) < 0.05, f"KL {_listed(kl)}."
        )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
