"""`imm-scale report RUN... --axes PAGE`: the page, and the same numbers as text."""

import html
from collections.abc import Iterable, Sequence

from imm_scale import storage
from imm_scale.evaluation.records import with_error
from imm_scale.report.axes import figures, findings, points
from imm_scale.report.axes.points import Column, Point
from imm_scale.report.page import image, items, page, table

_TITLE = "Passes along the sequence, refinement passes, and work"
_NAMES = {"tokens": "Tokens", "images": "Images"}
_MAP = (
    "Disks are our runs: their area is the work of a sample, their colour its quality, their letter and rim the run; "
    "disks of one place stand side by side. Dashed outlines show where known families lie, without any quality."
)
_QUALITY = (
    "Lines are lower envelopes, linear in the logarithm of the cost between points. Bars: standard deviations over "
    "training seeds; of one run, what its evaluation says."
)
_FLOOR = "Dotted: what steps of independent tokens cost at best, whatever their net is trained for."
_EFFICIENCY = (
    "What the baseline needs for its best value over what a run needs for the same value; the geometric mean over "
    "seeds, with the range. Not reached: no measured setting is as good."
)
_SLOPES = (
    "d log(excess) / d log(cost) along one axis, the other held; the mean over seeds, with the range. The excess of "
    "nll@L is what lies above one token at a time of the same weights, of a distance the distance itself. Points "
    "within two errors of no excess are left out."
)


def write(run_dirs: Sequence[str], out: str) -> list[str]:
    """Writes the page.

    Returns:
        Lines that say in plain text what it shows.

    Raises:
        UserError: a folder that is no run, or nothing measured in any.
    """
    columns = points.read(run_dirs)
    storage.write_text(out, page(_TITLE, _body(columns)))
    return [line for column in columns for line in lines(column)]


def _body(columns: Sequence[Column]) -> str:
    shown = "".join(f"<figure>{_pictures(column)}</figure>" for column in columns)
    return f'<div class="figures">{shown}</div>' + "".join(_numbers(column) for column in columns)


def _pictures(column: Column) -> str:
    drawn = figures.draw(column)
    floors = any(point.floor is not None for one in column.variants for point in one.points)
    captions = [_MAP, _QUALITY + (f" {_FLOOR}" if floors else ""), ""]
    parts = [f"<h2>{_NAMES[column.modality]}: {html.escape(_metric(column))}</h2>"]
    for (name, data), caption in zip(drawn.items(), captions, strict=True):
        parts.append(image("image/svg+xml", data, f"{_NAMES[column.modality]}: {name}"))
        parts.append(f"<figcaption>{html.escape(caption)}</figcaption>" if caption else "")
    return "".join(parts)


def _metric(column: Column) -> str:
    return "nll@L, nats a token" if column.metric == "nll_per_token" else column.metric


def _numbers(column: Column) -> str:
    name = _NAMES[column.modality]
    under = ", ".join(f"{key} {value or 'not recorded'}" for key, value in column.under.items())
    parts, (head, efficiencies) = list[str](), _efficiencies(column)
    if efficiencies:
        said = f"<p>{html.escape(_EFFICIENCY)} {html.escape(_baseline(column))}</p>"
        parts.append(f"<h2>{name}: scaling efficiency</h2>{said}{table(head, efficiencies)}")
    head, slopes = _slopes(column)
    if slopes:
        parts.append(f"<h2>{name}: slopes</h2><p>{html.escape(_SLOPES)}</p>{table(head, slopes)}")
    parts.append(f"<h2>{name}: all points</h2><p>{html.escape(under)}.</p>{table(*_points(column))}")
    return "".join(parts) + (items(column.left_out) if column.left_out else "")


def _baseline(column: Column) -> str:
    return f"Baseline: {column.baseline.name}, whose best is {min(p.value for p in column.baseline.points):.4f}."


Rows = list[list[str]]


def _efficiencies(column: Column) -> tuple[list[str], Rows]:
    head = ["run", "by work", "by passes", "seeds"]
    return head, [[one.variant, one.work, one.passes, one.seeds] for one in findings.scalings(column)]


def _slopes(column: Column) -> tuple[list[str], Rows]:
    head = ["run", "along", "at", "points", "by work", "by passes", "seeds"]
    other = {"sequence": "refinement", "refinement": "sequence"}
    return head, [
        [one.what, one.axis, f"{one.held:.4g} {other[one.axis]}", str(one.points), one.work, one.passes, one.seeds]
        for one in findings.slopes(column)
    ]


def _points(column: Column) -> tuple[list[str], Rows]:
    head = ["run", "setting", "sequence", "refinement", "passes", "multiply-adds", _metric(column)]
    head += ["excess", "floor"] if column.modality == "tokens" else []
    by_name = figures.letters(column)
    return head, [
        [f"{by_name[one.name]} {one.name}", *_cells(point)][: len(head)]
        for one in column.variants
        for point in one.points
    ]


def _cells(point: Point) -> list[str]:
    costs = [f"{number:.4g}" for number in (point.sequence, point.refinement, point.passes)]
    work = "not recorded" if point.work is None else f"{point.work:.4g}"
    above = ["" if number is None else f"{number:.4f}" for number in (point.excess, point.floor)]
    return [point.setting, *costs, work, with_error(point.value, point.error), *above]


# --- text ---


def lines(column: Column) -> Iterable[str]:
    """The column's tables as plain text."""
    yield f"{_NAMES[column.modality]}: {_metric(column)}"
    yield from _aligned(*_points(column))
    head, efficiencies = _efficiencies(column)
    if efficiencies:
        yield from ("", f"scaling efficiency. {_baseline(column)}", *_aligned(head, efficiencies))
    head, slopes = _slopes(column)
    if slopes:
        yield from ("", "slopes d log(excess) / d log(cost)", *_aligned(head, slopes))
    yield from (f"note: {note}" for note in column.left_out)
    yield ""


def _aligned(head: Sequence[str], rows: Rows) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
