"""docs/flow_maps.md: every figure in it is read from the runs."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import common
from experiments.flow_maps import costs, figures, published
from experiments.flow_maps.study import ROWS, STEPS, Study
from imm_scale.models.dit import DiTConfig

_PLAIN = "flow_matching"


def write(studies: Sequence[Study], docs: Path, name: str) -> Path:
    """Pictures and page. Returns the page's path."""
    parts = []
    for study in studies:
        images = f"images/{name}/{study.data.name}"
        figures.against_steps(study, docs / f"{images}_steps.png")
        figures.against_training(study, docs / f"{images}_training.png")
        figures.samples(study, docs / f"{images}_samples.png")
        parts.append(_section(study, images))
    first = studies[0]
    text = _PAGE.format(
        protocol=_protocol(studies),
        data="\n\n".join(parts),
        costs=_costs(first),
        scales="\n\n".join(_scales(study) for study in studies),
        published=common.table(published.HEAD, published.TABLE),
    )
    path = docs / f"{name}.md"
    path.write_text(text)
    return path


def _protocol(studies: Sequence[Study]) -> str:
    first = studies[0]
    outcome = first.runs(first.rows[0])[0].outcome
    config = outcome.cell.config
    assert isinstance(outcome.cell.net, DiTConfig)
    net, protocol = outcome.cell.net, first.protocol
    minutes = " and ".join(f"{_minutes(study):.0f} on {study.data.title}" for study in studies)
    rates = " and ".join(f"{rate:g}" for rate in protocol.rates)
    return (
        f"The net is a DiT of width {net.width} and depth {net.depth} (`configs/{protocol.base}`), batches of "
        f"{config.train.global_batch_size}, fp32, no guidance, labels on, AdamW without decay, an average of decay "
        f"{config.ema.decays[0]:g}. Every run spends {protocol.units:,} forward passes of an image, the backward pass "
        f"counting two and a tangent as much as it was counted to cost, so dearer steps are fewer. Of the learning "
        f"rates {rates} each row has the one that did better from seed {protocol.seeds[0]} (geometric mean over "
        f"{', '.join(map(str, STEPS))} steps; flow matching: in 50), and then {len(protocol.seeds)} seeds. Times are "
        f"drawn as each preset says. Samples: uniform grids from t = 1 (IMM and consistency from 0.994, sCT 0.996; IMM "
        f"in two steps by its eta grid), pushforward; rows that jump to the data only restart from fresh noise. "
        f"Minutes of training and measuring, added up over runs of one thread each that shared their cores: {minutes}."
    )


def _minutes(study: Study) -> float:
    return common.minutes([outcome.cell.run_dir for outcome in study.outcomes()])


def _section(study: Study, images: str) -> str:
    return _DATA.format(
        title=study.data.title, images=images, table=_distances(study), reading="\n".join(_reading(study))
    )


def _distances(study: Study) -> str:
    further = sorted({steps for name in study.rows for steps in ROWS[name].further})
    head = ["", "learning rate", "steps trained", *(common.plural(n, "step") for n in (*STEPS, *further)), "stability"]
    rows = []
    for name in study.rows:
        found = study.distances(name)
        cells = [f"{found[n][0]:.3f} ± {found[n][1]:.3f}" if n in found else "" for n in (*STEPS, *further)]
        trained = f"{study.runs(name)[0].outcome.cell.config.train.max_steps:,}"
        rows.append([ROWS[name].title, f"{study.rate(name):g}", trained, *cells, _stability(study, name)])
    return common.table(head, rows)


def _stability(study: Study, name: str) -> str:
    """Seeds that diverged, and the largest gradient beside the usual one, over both learning rates."""
    outcomes = [outcome for outcome in study.outcomes() if outcome.cell.factors["variant"] == name]
    lost = sum(outcome.state != "finished" for outcome in outcomes)
    norms = [
        [r["grad_norm"] for r in outcome.records if r["grad_norm"] is not None]
        for outcome in outcomes
        if outcome.state == "finished"
    ]
    worst = max((max(values) / statistics.median(values) for values in norms if values), default=float("nan"))
    said = f"largest gradient {worst:.1f} x the median"
    return f"{lost} of {len(outcomes)} runs lost; {said}" if lost else said


def _reading(study: Study) -> list[str]:
    """What leads at each step count, by the mean over seeds, and what cannot be told from it."""
    lines = []
    for steps in STEPS:
        means = {name: study.distances(name)[steps] for name in study.rows if steps in study.distances(name)}
        order = sorted(means, key=lambda name: means[name][0])
        best, (value, spread) = order[0], means[order[0]]
        near = [n for n in order[1:] if means[n][0] - value <= 2 * (spread**2 + means[n][1] ** 2) ** 0.5]
        beside = f"; within two standard deviations: {', '.join(ROWS[n].title for n in near)}" if near else ""
        lines.append(f"- In {common.plural(steps, 'step')}: {ROWS[best].title}, {value:.3f}{beside}.")
    plain = study.distances(_PLAIN) if _PLAIN in study.rows else {}
    if plain:
        enough = min(plain, key=lambda steps: plain[steps][0])
        better = [name for name in study.rows if name != _PLAIN and study.distances(name)[2][0] <= plain[enough][0]]
        named = ", ".join(ROWS[name].title for name in better) or "no row"
        lines.append(
            f"- Flow matching is at its best in {enough} steps, {plain[enough][0]:.3f}; as near in 2: {named}."
        )
    return lines


def _costs(study: Study) -> str:
    found = costs.of_rows(study)
    head = ["", "forward passes of an image in a step", "time of a step, flow matching = 1", "XL/2, GiB a GPU (model)"]
    rows = [[ROWS[n].title, f"{c['forwards']:.3g}", f"{c['time']:.2f}", f"{c['memory']:.1f}"] for n, c in found.items()]
    return common.table(head, rows)


def _scales(study: Study) -> str:
    pairs: Mapping[str, str] = {"imm": "imm_scale_1", "meanflow_scale_1000": "meanflow"}
    lines = []
    for large, small in pairs.items():
        if large in study.rows and small in study.rows:
            there, here = study.distances(large), study.distances(small)
            ratio = ", ".join(f"{here[n][0] / there[n][0]:.2f}" for n in STEPS)
            lines.append(
                f"- {study.data.title}: {ROWS[small].title} over {ROWS[large].title} in "
                f"{', '.join(map(str, STEPS))} steps: {ratio}."
            )
    return "\n".join(lines)


_DATA = """## {title}

![Distance against steps for every method]({images}_steps.png)

Mean and standard deviation over training seeds, lower is better:

{table}

{reading}

![Distance in two steps against what was trained]({images}_training.png)

![The same noises drawn by every method, at the first seed]({images}_samples.png)"""

_PAGE = """# Every flow map on one net

Written by `python -m experiments.flow_maps`; every figure is read from the runs it makes, but for the last table.

A map from t to s can be trained in a dozen ways. Here they share net, data, order of images, draws, engine, sampler
and evaluation, and what they may spend: forward passes, not steps. How they hang together is in [the
mathematics](mathematics.md#other-flow-maps-one-frame).

{protocol}

A small net on small images, trained briefly: the order here is that of this protocol and need not be that of
ImageNet. So short a training is bound by the number of optimizer steps more than by what a step learns, which is hard
on steps that are dear (TVM's are 3.3 of flow matching's) and on losses that need long schedules; every row still falls
at its end (the second picture of each data set), and the larger rate was the better one. `--full` repeats it on a wider
net, eleven times as long, with more rates and seeds.

{data}

## What a step costs

Forward passes are counted in multiply-adds (`Method.passes`, held to `FlopCounterMode` by tests), the backward pass
as two; times are medians of DiT-S/2 on 16 samples of 16 tokens in fp32, all methods in turn on one CPU thread; memory
is the planner's model of DiT-XL/2 on 8 H100, ZeRO 2, bf16, micro-batches of 32 with recomputation. No GPU has
timed them.

{costs}

## time_scale

Ratio of distances, time_scale 1 over 1000, below 1 where 1 is better:

{scales}

## What is published on ImageNet 256

FID of 50,000 samples as papers and repositories state it; none was measured here. Nets, epochs, autoencoders and
guidance differ from row to row.

{published}

## Others who compare

EDAPINENUT/ExplicitShortCut trains CT, Shortcut, IMM, sCT and MeanFlow on one SiT under DDP; NVlabs/FastGen has
consistency models and MeanFlow under FSDP2. Neither has IMM's, iMF's, SoFlow's and Shortcut's losses under ZeRO with
draws keyed by sample and exact resume (both as read in November 2026).
"""
