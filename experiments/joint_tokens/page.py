"""docs/joint_tokens.md: every figure in it is read from the runs."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments import common
from experiments.claims import Claim
from experiments.joint_tokens import claims, figures, hands, prose
from experiments.joint_tokens.prediction import KINDS, BySizes, Prediction
from experiments.joint_tokens.scaling import Scaling
from experiments.joint_tokens.study import FLOORED, Study, over_seeds, paired
from imm_scale.evaluation.tokens.profile import Profile
from imm_scale.models.token_transformer import TokenArchitecture

_IMAGES = "images/joint_tokens"
_ORDERS_OF_DIGITS = 8  # of each held-out sequence in a profile: what sizes gain there is small
_DRAWN = (2, 4, 8)  # passes whose samples are shown
_CLAIMED = (2, 4, 8, 16)


def write(studies: dict[str, Study], scaling: Scaling | None, docs: Path) -> Path:
    """Pictures and page of those tasks that were run. Returns the page's path."""
    sections = {"digits": _digits, "mnist": _mnist, "kjv": _kjv, "hands": _hands}
    parts = [sections[name](studies[name], docs) for name in sections if name in studies]
    if scaling is not None:
        parts.append(_scaling(scaling, docs))
    minutes = sum(study.minutes for study in studies.values()) + (scaling.minutes if scaling else 0.0)
    path = docs / "joint_tokens.md"
    path.write_text(prose.PAGE.format(sections="\n\n".join(parts), minutes=minutes))
    return path


def _verdicts(found: Sequence[Claim]) -> str:
    return "\n".join(map(str, found))


def _protocol(study: Study) -> str:
    outcome = next(iter(study.outcomes.values()))
    config, net = outcome.cell.config, outcome.cell.net
    assert isinstance(net, TokenArchitecture)
    return (
        f"Width {net.width}, depth {net.depth}, positions `{net.positions}`, {config.train.max_steps:,} steps of "
        f"{config.train.global_batch_size}, learning rate {config.optimizer.lr:g}, average {config.ema.decays[0]:g}; "
        f"{config.evaluation.num or 'all'} held-out sequences; seeds {', '.join(map(str, study.seeds))}; "
        f"{study.minutes:.0f} minutes of training and measuring."
    )


# --- digits ---


def _digits(study: Study, docs: Path) -> str:
    steps = study.task.steps
    nets = _predictions(study, _ORDERS_OF_DIGITS)
    sizes = {seed: net.in_sizes(steps) for seed, net in nets.items()}
    floors = {n: over_seeds([float(own[n]["best"].mean()) / steps[-1] for own in sizes.values()])[0] for n in steps}
    figures.quality(study, floors, docs / f"{_IMAGES}/quality.png")
    few = [n for n in (1, 4, 16) if n in steps]
    figures.samples(study, few, docs / f"{_IMAGES}/samples.png")
    return prose.DIGITS.format(
        images=_IMAGES,
        before=study.task.before["train.max_steps"],
        trained=", ".join(map(str, study.task.settings["method.steps"])),
        protocol=_protocol(study),
        nll=_nll(study),
        sizes=_sizes(nets, sizes, steps),
        gaps=_gaps(study),
        claims=_verdicts(list(_digit_claims(study, nets, sizes))),
    )


def _predictions(study: Study, nested: int) -> dict[int, Prediction]:
    """{seed: the product head}."""
    return {seed: Prediction(study.outcomes[FLOORED, seed].cell.run_dir, nested) for seed in study.seeds}


def _digit_claims(study: Study, nets: dict[int, Prediction], sizes: dict[int, dict[int, BySizes]]) -> Iterator[Claim]:
    several = [n for n in study.task.steps if 1 < n < study.task.steps[-1]]
    few = [n for n in (1, 2, 4) if n in study.task.steps]
    for steps in few:
        yield claims.between(study, steps)
    yield claims.near_one_at_a_time(study, 4 if 4 in several else several[0])
    yield claims.below_the_floor(study, claims.ORDER[-1])
    yield claims.floor(study)
    yield claims.prediction({(seed, n): net.in_steps(n) for seed, net in nets.items() for n in several[:3]})
    yield claims.best_sizes({(seed, n): sizes[seed][n] for seed in sizes for n in several}, errors=-2.0)


def _nll(study: Study) -> str:
    """Nats a sequence by head and passes."""
    steps = study.task.steps
    rows = []
    for name, row in study.task.rows.items():
        cells = [over_seeds([float(study.values(name, seed, n).mean()) for seed in study.seeds]) for n in steps]
        rows.append([row.title, *(f"{mean:.2f} ± {spread:.2f}" for mean, spread in cells)])
    return common.table(["", *(_passes(n) for n in steps)], rows)


def _passes(count: int) -> str:
    return f"{count} pass" + "es" * (count > 1)


def _sizes(nets: dict[int, Prediction], sizes: dict[int, dict[int, BySizes]], steps: Sequence[int]) -> str:
    """Excess over one token a pass by kind of sizes, and what the best ones gain over equal ones by seed."""
    several = [n for n in steps if 1 < n < next(iter(nets.values())).one_at_a_time.shape[1]]
    rows = []
    for kind, word in KINDS.items():
        cells = [
            over_seeds([float(own[n][kind].mean()) - nets[seed].alone for seed, own in sizes.items()]) for n in several
        ]
        rows.append([f"{word} sizes", *(f"{mean:.2f} ± {spread:.2f}" for mean, spread in cells)])
    for seed, own in sizes.items():
        gains = [paired(own[n]["uniform"], own[n]["best"]) for n in several]
        rows.append([f"best over equal, seed {seed}", *(f"{gain:.3f} ± {error:.3f}" for gain, error in gains)])
    return common.table(["", *(_passes(n) for n in several)], rows)


def _gaps(study: Study) -> str:
    """Differences of neighbouring heads by seed, sample by sample."""
    steps = [n for n in study.task.steps if n < study.task.steps[-1]]
    by_steps = {n: claims.gaps(study, n) for n in steps}
    rows = []
    for worse, better in by_steps[steps[0]]:
        cells = ["; ".join(f"{gap:.2f} ± {error:.2f}" for gap, error in by_steps[n][worse, better]) for n in steps]
        rows.append([f"{worse} - {better}", *cells])
    return common.table(["", *(_passes(n) for n in steps)], rows)


# --- larger digits ---


def _mnist(study: Study, docs: Path) -> str:
    steps, first = study.task.steps, study.seeds[0]
    nets = _predictions(study, 1)
    sizes = {seed: net.in_sizes(steps) for seed, net in nets.items()}
    profile_T = nets[first].one_at_a_time.mean(axis=0)
    excess = {kind: {n: float(sizes[first][n][kind].mean()) - nets[first].alone for n in steps} for kind in KINDS}
    few = Profile(nets[first].scores).best_sizes(_DRAWN)  # by all of them: to draw with, not to measure by
    figures.sizes(excess, profile_T, few[_DRAWN[-1]], docs / f"{_IMAGES}/sizes.png")
    figures.samples_by_sizes(study.outcomes[FLOORED, first].cell.run_dir, few, docs / f"{_IMAGES}/sizes_samples.png")
    claimed = {(seed, n): own[n] for seed, own in sizes.items() for n in steps if n in _CLAIMED}
    return prose.MNIST.format(
        images=_IMAGES,
        protocol=_protocol(study),
        alone="{:.1f} ± {:.1f}".format(*over_seeds([net.alone for net in nets.values()])),
        sizes=_sizes(nets, sizes, steps),
        listed="; ".join(f"{n}: {', '.join(map(str, own))}" for n, own in few.items()),
        claims=_verdicts([claims.best_sizes(claimed, claims.ERRORS)]),
    )


# --- verses ---


def _kjv(study: Study, docs: Path) -> str:
    found = [
        claims.order(study, study.task.steps[0], "nll_of_blocks"),
        claims.between(study, study.task.steps[0], "nll_of_blocks"),
        claims.tokens_a_pass(study),
    ]
    return prose.KJV.format(protocol=_protocol(study), blocks=_blocks(study), claims=_verdicts(found))


def _blocks(study: Study) -> str:
    (steps,) = study.task.steps
    rows = []
    for name, row in study.task.rows.items():
        last, closed = zip(*(_last_block(study, name, seed) for seed in study.seeds), strict=True)
        alone = over_seeds([float(study.values(name, seed, steps, "nll_one_at_a_time").mean()) for seed in study.seeds])
        taken = over_seeds([study.measure(name, seed, steps, "tokens_a_pass")[0] for seed in study.seeds])
        places = [
            over_seeds([study.measure(name, seed, steps, f"accepted_{place}")[0] for seed in study.seeds])[0]
            for place in range(1, _block_size(study) + 1)
        ]
        rows.append(
            [
                row.title,
                "{:.2f} ± {:.2f}".format(*over_seeds(last)),
                f"{over_seeds(closed)[0]:.0%}",
                "{:.3f} ± {:.3f}".format(*alone),
                "{:.2f} ± {:.2f}".format(*taken),
                ", ".join(f"{place:.2f}" for place in places),
            ]
        )
    head = [
        "",
        "nats of the last block",
        "of the dependence",
        "nats a letter, one at a time",
        "letters a verified pass",
    ]
    return common.table([*head, "accepted by place"], rows)


def _last_block(study: Study, name: str, seed: int) -> tuple[float, float]:
    """Nats after the longest context, and the share of what the autoregressive head gains over the product head."""
    (steps,) = study.task.steps
    nats = {h: float(study.values(h, seed, steps, "nll_of_blocks")[:, -1].mean()) for h in study.task.rows}
    best = nats[claims.ORDER[-1]]
    return nats[name], (nats[FLOORED] - nats[name]) / (nats[FLOORED] - best)


def _block_size(study: Study) -> int:
    net = next(iter(study.outcomes.values())).cell.net
    assert isinstance(net, TokenArchitecture)
    return net.block


# --- hands ---


def _hands(study: Study, docs: Path) -> str:
    laws = {
        (name, seed, steps): hands.law(study.outcomes[name, seed].cell.run_dir, steps)
        for name in study.task.rows
        for seed in study.seeds
        for steps in study.task.steps
    }
    rows = []
    for name, row in study.task.rows.items():
        cells = []
        for steps in study.task.steps:
            here = [laws[name, seed, steps] for seed in study.seeds]
            cells.append("{:.3f} ± {:.3f}".format(*over_seeds([hands.divergence(one) for one in here])))
            cells.append("{:.3f} ± {:.3f}".format(*over_seeds([hands.validity(one) for one in here])))
        rows.append([row.title, *cells])
    head = ["", *(f"{what}, {_passes(n)}" for n in study.task.steps for what in ("KL", "validity"))]
    found = list(claims.hands_enumerated(study, laws))
    return prose.HANDS.format(protocol=_protocol(study), table=common.table(head, rows), claims=_verdicts(found))


# --- scaling ---


def _scaling(scaling: Scaling, docs: Path) -> str:
    figures.scaling(scaling.rows, docs / f"{_IMAGES}/scaling.png")
    checks = scaling.found.checks
    rows = [
        [
            one.cell,
            f"{one.measured:.4f}",
            f"{one.predicted.low:.4f} to {one.predicted.high:.4f}",
            "yes" if one.inside else "no",
        ]
        for one in checks
    ]
    verdict = Claim(
        "The law fitted to the smaller budgets predicts every size at the largest one inside its interval.",
        bool(checks) and all(one.inside for one in checks),
        f"{sum(one.inside for one in checks)} of {len(checks)} are inside.",
    )
    notes = "\n".join(f"- {note}." for note in scaling.found.notes)
    return prose.SCALING.format(
        images=_IMAGES,
        minutes=scaling.minutes,
        table=common.table(["cell", "measured, nats a letter", "predicted", "inside"], rows),
        claims=str(verdict) + ("\n" + notes if notes else ""),
    )
