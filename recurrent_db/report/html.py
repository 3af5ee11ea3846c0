"""Text, numbers and tables as HTML. All values from a run must pass through `text`, which escapes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from recurrent_db.report.figure import Panel, memory_unit
from recurrent_db.report.runs import printable

DASH = "–"


def text(value: object) -> str:
    """Escape a value for an element or a quoted attribute."""
    return escape(printable(value), quote=True)


def count(value: float | None, unit: str = "") -> str:
    """A number with three digits and a prefix: 12345678 -> ``12.3 M``."""
    if value is None:
        return DASH
    for factor, prefix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:g}{' ' + unit if unit else ''}"


def duration(seconds: float | None) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds is None:
        return DASH
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def memory(value: float | None) -> str:
    """A number of bytes in MiB or GiB."""
    if value is None:
        return DASH
    unit, factor = memory_unit(value)
    return f"{value * factor:.3g} {unit}"


def joules(value: float) -> str:
    """An energy in joules, shown in kWh from 0.1 kWh, else in kJ, J, mJ or µJ."""
    if value >= 3.6e5:
        return f"{value / 3.6e6:.3g} kWh"
    for factor, unit in ((1e3, "kJ"), (1.0, "J"), (1e-3, "mJ")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e-6:.3g} µJ"


def fixed(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", kind: str = "") -> str:
    """A table that scrolls by itself. Cells are HTML. A row with one cell is a heading for the rows below it."""
    body = []
    for row in rows:
        if len(row) == 1:
            body.append(f'<tr class="group"><th colspan="{len(head)}" scope="rowgroup"><div>{row[0]}</div></th></tr>')
        else:
            cells = "".join(f"<td>{cell}</td>" for cell in row[1:])
            body.append(f'<tr><th scope="row">{row[0]}</th>{cells}</tr>')
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    note = f'<p class="note">{caption}</p>' if caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{header}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{note}"
    )


def panels(found: Iterable[Panel | None], kind: str = "grid") -> str:
    """Panels with titles in a grid. With ``kind="wide"`` they are stacked and have no titles."""
    drawn = [panel for panel in found if panel is not None]
    if kind == "wide":
        return "".join(f'<figure class="wide">{panel.svg}</figure>' for panel in drawn)
    figures = "".join(f"<figure><figcaption>{text(p.title)}</figcaption>{p.svg}</figure>" for p in drawn)
    return f'<div class="{kind}">{figures}</div>' if drawn else ""


def note(sentence: str) -> str:
    return f'<p class="note">{sentence}</p>'
