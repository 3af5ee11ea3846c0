"""Turns a matplotlib figure into an inline SVG with the page's font and colours.

Figures are drawn in the light palette below. Each of its colours is replaced by a CSS variable, so the SVG follows the
reader's light or dark theme. Ids get a prefix, because all figures share one document.
"""

from __future__ import annotations

import io
import re
from html import escape
from typing import Any

from matplotlib.figure import Figure

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
"""Okabe and Ito's colour-blind-safe palette, without its yellow, which is hard to see on white."""
INK, MUTED, GRID, PAPER = "#1f2328", "#59636e", "#d8dee4", "#ffffff"

VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card"} | {
    colour: f"--s{index}" for index, colour in enumerate(SERIES)
}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "recurrent_db",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 11.5,
    "axes.labelsize": 11.5,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "hatch.linewidth": 1.0,
    "legend.frameon": False,
}
"""matplotlib settings for drawing and saving every figure."""


def inline_svg(figure: Figure, key: str, label: str) -> str:
    """Convert the figure to an ``<svg>`` element for an HTML page.

    Args:
        key: prefix of all ids: letters, digits and hyphens, unique in the page.
        label: description of the figure for screen readers.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")

    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))

    def identify(match: re.Match[str]) -> str:
        # Drop ids that nothing refers to. "halo" marks text on a bar or line, which gets an outline.
        if match[1].startswith("halo"):
            return ' class="halo"'
        return f' id="{key}-{match[1]}"' if match[1] in used else ""

    text = re.sub(r'\sid="([^"]*)"', identify, text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{key}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", text)
    for colour, name in VARIABLES.items():
        text = re.sub(rf"(?<=: ){colour}", f"var({name})", text)
    # Use the page's font.
    text = re.sub(r" font-family: [^;\"]+;", "", text)
    text = re.sub(
        r' d="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", " ".join(m[0].split())).replace("d=", " d="), text
    )
    text = re.sub(r"\n\s*", "\n", text)
    view = re.search(r'viewBox="([^"]+)"', text)
    inner = text[text.index(">") + 1 :]
    box = view[1] if view else "0 0 1 1"
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(label, quote=True)}">{inner.strip()}'
