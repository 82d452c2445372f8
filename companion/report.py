"""The page that a run leaves: its notebooks, what they took and how they ended, and what they measured."""

import html
from collections.abc import Sequence
from pathlib import Path

import nbformat

from companion import scoreboard, tables

STYLE = "body{font:15px sans-serif;margin:2em} td,th{padding:.2em .8em;text-align:left} .failed{color:#b00}"


def page(outcomes: Sequence, folder: Path) -> str:
    """A page that lists the outcomes, with links to the executed notebooks, and the scoreboard of this
    run.
    """
    head = ("notebook", "parameters", "time", "CPU time", "slowest cells", "outcome")
    lines = [_line(outcome, folder) for outcome in sorted(outcomes, key=lambda outcome: outcome.job.name)]
    failed, rows = sum(outcome.error is not None for outcome in outcomes), scoreboard.read(folder)
    busy = sum(bool(row.get("busy")) for row in rows)
    said = f"This machine was busy: {busy} of {len(rows)} rows are not to be trusted."
    doubt = f"<p class='failed'>{said}</p>" if busy else ""
    ended, measured = tables.Table(head, lines)._repr_html_(), scoreboard.table(rows)._repr_html_()
    return f"""<!doctype html><meta charset="utf-8"><title>Notebooks</title>
<style>{STYLE}</style>
<h1>{len(outcomes)} notebooks run, {failed} failed</h1>
{ended}
<h2>Measured</h2>
{doubt}
{measured}
"""


def _line(outcome, folder: Path) -> tuple[str, ...]:
    name = html.escape(outcome.job.name)
    values = ", ".join(f"{key}={value}" for key, value in outcome.job.parameters.items()) or "defaults"
    links = tables.Html(f"<a href='{name}.html'>{name}</a> (<a href='{name}.ipynb'>ipynb</a>)")
    ended = (
        tables.Html(f"<b class='failed'>failed: {html.escape(outcome.error)}</b>")
        if outcome.error
        else "passed"
    )
    took = f"{outcome.seconds:.0f} s", f"{outcome.cpu_seconds:.0f} s"
    return links, values, *took, _slowest(folder / f"{outcome.job.name}.ipynb"), ended


def _slowest(executed: Path, count: int = 3) -> str:
    """The executed notebook's slowest cells: their numbers in it, and their seconds."""
    if not executed.exists():
        return ""
    cells = nbformat.read(executed, 4).cells
    seconds = {
        cell.get("execution_count"): cell.metadata.get("companion", {}).get("seconds", 0) for cell in cells
    }
    longest = sorted((name for name in seconds if name), key=seconds.get, reverse=True)[:count]
    return ", ".join(f"[{number}] {seconds[number]:.0f} s" for number in longest)
