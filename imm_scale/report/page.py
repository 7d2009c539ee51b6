"""What every page is made of: its frame, its style, figures and tables that stand in the file itself."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1180px; margin: 0 auto;
       padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; margin: 0.5rem 0; } h2 { font-size: 1.25rem; margin: 2rem 0 0.5rem; }
.wide { overflow-x: auto; } .wide > img { min-width: 560px; } table { border-collapse: collapse; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.samples, .figures { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; min-width: 0; }
.figures figure { flex: 1 1 460px; max-width: 575px; } .figures img { width: 100%; }
.samples figure { flex: 0 1 auto; max-width: 260px; } figcaption { font-size: 0.9rem; color: #444; }
img { max-width: 100%; height: auto; } .samples img { image-rendering: pixelated; width: 260px; }
pre { background: #f6f6f6; padding: 0.7rem; overflow-x: auto; font-size: 0.8rem; }
.lead { font-size: 1.1rem; } .warning { border-left: 4px solid #D55E00; padding-left: 0.7rem; }
"""


def page(title: str, body: str) -> str:
    """A whole HTML document; the title is escaped, the body is not."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>imm-scale: {html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{body}
</body></html>
"""


def axes(figure: Figure, *place: int) -> Any:
    """Axes without the frame that says nothing."""
    plot = figure.add_subplot(*place)
    plot.spines[["top", "right"]].set_visible(False)
    plot.grid(alpha=0.25)
    return plot


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file, without a date."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()


def image(kind: str, data: bytes, alt: str = "") -> str:
    """An <img> with its data in it; kind is the MIME type."""
    return f'<img alt="{html.escape(alt)}" src="data:{kind};base64,{base64.b64encode(data).decode()}">'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table that scrolls by itself where it is too wide; every cell is escaped."""

    def line(tag: str, values: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values) + "</tr>"

    return f'<div class="wide"><table>{line("th", head)}{"".join(line("td", row) for row in rows)}</table></div>'


def items(lines: Iterable[str]) -> str:
    """A list; every item is escaped."""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
