"""The page and the figure about one profile of `imm-scale profile`."""

import html
import io
from typing import Any

from matplotlib.figure import Figure

from imm_scale import storage
from imm_scale.evaluation.foreign import summary
from imm_scale.evaluation.foreign.summary import Document
from imm_scale.report.page import COLOURS, axes, image, page, svg

PAGE, PICTURE = "profile.html", "profile.png"
_MARKS = {"uniform": "o", "cosine": "s", "best": "^"}


def write(document: Document, folder: str) -> list[str]:
    """Writes page and picture, and returns where they are."""
    figure = _figure(document)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    lines = html.escape("\n".join(summary.lines(document)[2:]))
    alarm = document.get("alarm")
    warning = "" if alarm is None else f'<p class="warning">{html.escape(alarm)}</p>'
    title = f"profile of {document['model']}"
    body = f"{warning}<p>{html.escape(summary.lines(document)[0])}.</p>{image('image/svg+xml', svg(figure), title)}"
    urls = [storage.join(folder, name) for name in (PAGE, PICTURE)]
    storage.write_text(urls[0], page(title, f"{body}<pre>{lines}</pre>"))
    storage.write_bytes(urls[1], buffer.getvalue())
    return urls


def _figure(document: Document) -> Figure:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    _draw_profile(axes(figure, 1, 2, 1), document)
    right = axes(figure, 1, 2, 2)
    _draw_schedules(right, document) if document["kind"] == "masked" else _draw_blocks(right, document)
    return figure


def _draw_profile(plot: Any, document: Document) -> None:
    rows = document["profile"]
    visible, nll, error = ([row[key] for row in rows] for key in ("visible", "nll", "nll_error"))
    plot.plot(visible, nll, color=COLOURS[0], linewidth=1)
    low, high = ([n + sign * 2 * e for n, e in zip(nll, error, strict=True)] for sign in (-1, 1))
    plot.fill_between(visible, low, high, color=COLOURS[0], alpha=0.25, linewidth=0)
    is_masked = document["kind"] == "masked"
    plot.set_title("information profile, two standard errors", fontsize=10, loc="left")
    plot.set_xlabel("visible tokens, at random places" if is_masked else "tokens before it")
    plot.set_ylabel("nats a token")


def _draw_schedules(plot: Any, document: Document) -> None:
    length = document["length"]
    for colour, (kind, mark) in zip(COLOURS, _MARKS.items(), strict=False):
        rows = [row for row in document["schedules"] if row["kind"] == kind]
        steps, nll, error = ([row[key] for row in rows] for key in ("steps", "nll", "nll_error"))
        label = f"{kind} sizes" + (" (floor)" if kind == "best" else "")
        heights, bars = [n / length for n in nll], [2 * e / length for e in error]
        plot.errorbar(steps, heights, bars, color=colour, marker=mark, markersize=4, linewidth=1, label=label)
    plot.axhline(document["nll_one_at_a_time"] / length, color="#444", linewidth=1, linestyle=":")
    plot.set_xscale("log", base=2)
    plot.set_xticks(steps, list(map(str, steps)))
    plot.set_title("nll@L of steps of independent tokens", fontsize=10, loc="left")
    plot.set_xlabel("steps L")
    plot.set_ylabel("nats a token")
    plot.legend(frameon=False)


def _draw_blocks(plot: Any, document: Document) -> None:
    rows = document["blocks"]
    blocks = [row["block"] for row in rows]
    for colour, bound in zip(COLOURS, ("upper", "lower"), strict=False):
        heights, bars = (
            [scale * row[key] / row["block"] for row in rows] for scale, key in ((1, bound), (2, f"{bound}_error"))
        )
        plot.errorbar(
            blocks, heights, bars, color=colour, marker="o", markersize=4, linewidth=1, label=f"{bound} bound"
        )
    plot.set_xticks(blocks)
    plot.set_title("lost by blocks of independent tokens", fontsize=10, loc="left")
    plot.set_xlabel("tokens of a block")
    plot.set_ylabel("nats a token")
    plot.legend(frameon=False)
