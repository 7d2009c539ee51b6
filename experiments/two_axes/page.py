"""docs/two_axes.md: every figure and every verdict in it is read from the runs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments import common
from experiments.claims import Claim
from experiments.joint_tokens.study import TASKS
from experiments.joint_tokens.study import Study as TokenStudy
from experiments.two_axes import claims, figures
from experiments.two_axes.study import STEPS, TITLES, DataSet, Study
from imm_scale.models.dit import DiTConfig
from imm_scale.report.axes import findings, points
from imm_scale.report.axes.points import Column, Point

_IMAGES = "images/two_axes"

Claims = Mapping[str, Sequence[Claim]]  # by what they put to the test


def write(data: Sequence[tuple[DataSet, Sequence[Study]]], tokens: TokenStudy | None, docs: Path) -> Path:
    """Pictures and page. Returns the page's path."""
    found = [_claims(studies[0]) for _, studies in data]
    parts = [_data(one, studies, those, docs) for (one, studies), those in zip(data, found, strict=True)]
    parts += [_tokens(tokens, docs)] if tokens is not None else []
    minutes = sum(study.minutes for _, studies in data for study in studies)
    path = docs / "two_axes.md"
    names = [one.name for one, _ in data]
    summary = _summary(names, found)
    text = _PAGE.format(data=",".join(names), minutes=minutes, summary=summary, sections="\n\n".join(parts))
    path.write_text(text)
    return path


def _verdicts(found: Claims) -> str:
    return "\n".join(str(claim) for those in found.values() for claim in those)


# --- images ---


def _data(one: DataSet, studies: Sequence[Study], found: Claims, docs: Path) -> str:
    main, *others = studies
    images = f"{_IMAGES}/{one.name}"
    figures.axes(main.column, images, docs)
    figures.samples(main, main.part.blocks[-1], docs / f"{images}_samples.png")
    return _DATA.format(
        title=one.title,
        images=images,
        protocol=_protocol(main),
        distances=_distances(main),
        costs=_costs(main),
        claims=_verdicts(found),
        efficiencies=_efficiencies(main.column),
        slopes=_slopes(main.column),
        blocks=main.part.blocks[-1],
        others="".join(_further(study) for study in others),
    )


_STEPS, _SEQUENCE, _EFFICIENT, _COST = (
    "A net that is told where it lands needs few refinement steps",
    "Quality scales along the sequence",
    "Both axes are scaled with as little work as the net allows",
    "Blocks cost passes, not work",
)


def _claims(study: Study) -> Claims:
    """{what is said in general: claims that put it to the test on these runs}."""
    blocks, last = study.part.blocks, STEPS["flow_matching"][-1]
    few = [one for count in reversed(blocks) for one in claims.as_good(study, count)]
    sequence = [claims.along_the_sequence(study, "imm", steps) for steps in STEPS["imm"]]
    return {
        _STEPS: [*few, *(claims.along_refinement(study, count) for count in blocks)],
        _SEQUENCE: [*sequence, claims.along_the_sequence(study, "flow_matching", last)],
        _EFFICIENT: [claims.efficient(study, count) for count in reversed(blocks)],
        _COST: [claims.blocks_cost_passes(study)],
    }


def _summary(names: Sequence[str], found: Sequence[Claims]) -> str:
    """A row a general statement, a column a data set: how many of its claims hold."""
    rows = [
        [said, *(f"{sum(one.holds for one in each[said])} of {len(each[said])}" for each in found)]
        for said in (_STEPS, _SEQUENCE, _EFFICIENT, _COST)
    ]
    return common.table(["", *names], rows)


def _protocol(study: Study) -> str:
    outcome = next(iter(study.outcomes.values()))
    config, net = outcome.cell.config, outcome.cell.net
    assert isinstance(net, DiTConfig)
    samples = f"{config.evaluation.num:,}" if config.evaluation.num else "as many as the training set has"
    return (
        f"A DiT of width {net.width} and depth {net.depth}, patch {net.patch_size}; "
        f"{config.train.max_steps:,} steps of {config.train.global_batch_size} images for every run, so many for both "
        f"methods; learning rate {config.optimizer.lr:g}, average {config.ema.decays[0]:g}; "
        f"{common.plural(len(study.part.seeds), 'seed')}; samples a distance: {samples}; {study.minutes:.0f} minutes "
        "of training and measuring."
    )


def _table(study: Study, cell: Callable[[Point], str]) -> str:
    counts = sorted({steps for of_method in STEPS.values() for steps in of_method})
    rows = [
        [
            f"{TITLES[method]}, J = {blocks}",
            *(cell(study.point(method, blocks, n)) if n in STEPS[method] else "" for n in counts),
        ]
        for blocks in study.part.blocks
        for method in STEPS
    ]
    return common.table(["", *(common.plural(n, "step") for n in counts)], rows)


def _distances(study: Study) -> str:
    return _table(study, lambda p: f"{p.value:.3f}" + (f" ± {p.error:.3f}" if len(p.by_seed) > 1 else ""))


def _costs(study: Study) -> str:
    return _table(study, lambda point: f"{_millions(point)}, {point.passes:g}")


def _millions(point: Point) -> str:
    assert point.work is not None, "new evaluations state their work"
    return f"{point.work / 1e6:.3g}"


def _efficiencies(column: Column) -> str:
    rows = [[one.variant, one.work, one.passes] for one in findings.scalings(column)]
    return f"Baseline {column.baseline.name}:\n\n" + common.table(["run", "by work", "by passes"], rows)


def _slopes(column: Column) -> str:
    head = ["run", "along", "passes of the other axis", "by work", "by passes"]
    return common.table(
        head, [[one.what, one.axis, f"{one.held:g}", one.work, one.passes] for one in findings.slopes(column)]
    )


def _further(study: Study) -> str:
    return _FURTHER.format(protocol=_protocol(study), distances=_distances(study), claims=_verdicts(_claims(study)))


# --- tokens ---


def _tokens(study: TokenStudy, docs: Path) -> str:
    first = study.seeds[0]  # others are measured on other held-out digits, so that they are no variants of one column
    runs = [one.cell.run_dir for (_, seed), one in study.outcomes.items() if seed == first]
    (column,) = points.read(runs)
    images = f"{_IMAGES}/tokens_{study.task.name}"
    figures.axes(column, images, docs)
    return _TOKENS.format(
        title=TASKS[study.task.name].title,
        images=images,
        efficiencies=_efficiencies(column),
        slopes=_slopes(column),
    )


_DATA = """## {title}

![Where runs lie on both axes]({images}_map.png)

{protocol}

Distance (`frechet_latents`, lower is better), mean and standard deviation over training seeds, by steps in each block:

{distances}

![Distance against multiply-adds]({images}_work.png)

![Distance against passes]({images}_passes.png)

Millions of multiply-adds of a sample, and passes of the net one after another:

{costs}

{claims}

Scaling efficiency, what the baseline needs for its best distance over what a run needs for the same:

{efficiencies}

Slopes d log(distance) / d log(cost) along one axis, the other held:

{slopes}

![Samples of J = {blocks} from the same noises]({images}_samples.png){others}"""

_FURTHER = """

At patch 1 a row of patches is a row of pixels, so that there can be eight blocks; one seed. {protocol}

{distances}

{claims}"""

_TOKENS = """## Tokens: {title}

![Where runs lie on both axes]({images}_map.png)

The runs of the first seed of [joint heads](joint_tokens.md), where the protocol and the other seeds stand: nll@L, nats
a token, against work and passes; dotted what a product of tokens cannot go below. Here the second axis is passes over
the same 64 tokens, and a head draws the tokens of a pass jointly or not.

![nll@L against multiply-adds]({images}_work.png)

![nll@L against passes]({images}_passes.png)

{efficiencies}

{slopes}"""

_PAGE = """# Both axes: blocks along the sequence, steps within each

Written by `python -m experiments.two_axes --data {data}`; every figure and every verdict is read from
the runs it makes.

Inference scales along two axes: the sequence, where each block is drawn given those before, and refinement, where a
block is drawn in several steps. Today's systems that draw continuous tokens block by block spend 50 to 100 steps on
each. Here IMM spends 1, 2 or 4, trained from scratch and without a teacher, beside flow matching on the same
block-causal net (`model.blocks: J`, [the mathematics](mathematics.md#samples-in-several-blocks)). Blocks cost passes,
which follow one another, and hardly any work, so every figure shows both.

IMM has its recipes' settings but for a net that says x_s itself (`method.flow_map.parameterization: identity`) and
times on the scale of 1; both were chosen on MNIST latents with J = 4 from a seed that is not reported. Flow matching
keeps its recipe, which did better than either ([the log](log.md)). The nets are small and briefly trained, every run
for the same number of optimizer steps: one of IMM costs 6.7 forward passes at J > 1, and 6 of flow matching (4 and 3 at
J = 1). Runs took {minutes:.0f} minutes of training and measuring, added up by the clock, part of it beside other work
on their two cores; alone they take some 135 core-minutes, as the log says.

The position paper behind this project (arXiv 2503.07154) wants inference to scale along both axes, in as few steps as
a net's capacity allows, and wants that settled before a loss is chosen. How much of it these runs bear out, in claims
that were stated before them:

{summary}

{sections}

## What this does not show

Four blocks of four tokens are short: errors of early blocks have little room to add up. Every net has the same few
parameters, whatever it is given, so that blocks compete with what they are given for them. Distances compare whole
samples with the training set, which small nets underfit. No GPU has trained them, and no text stands in one sequence
with an image.
"""
