"""What a run leaves to read: a page with its notebooks, figures and measurements, and the same as a table of
results.
"""

import base64
import csv
import functools
import html
import io
from collections.abc import Sequence
from pathlib import Path

import nbformat

from companion import ledger, scoreboard, tables
from companion.ledger import Outcome

TABLE, FIGURES = "results.csv", "figures"
THUMBNAILS = 4  # figures of each notebook that the page shows
# The site's colours and fonts, light or dark as the reader's system is; on a phone tables scroll.
STYLE = """:root{--text:#323232;--ground:#fff;--soft:#f3f4f5;--line:#d1d5da;--link:#176de8;--bad:#b00}
@media (prefers-color-scheme:dark){
:root{--text:#ced6dd;--ground:#121212;--soft:#29313d;--line:#48566b;--link:#528fe4;--bad:#ff7b72}}
body{font:1rem/1.65 -apple-system,BlinkMacSystemFont,"Segoe UI","Helvetica Neue",Arial,sans-serif;
color:var(--text);background:var(--ground);max-width:88rem;margin:0 auto;padding:1rem;overflow-wrap:anywhere}
a{color:var(--link)} h1{font-size:2rem;line-height:1.15} .failed{color:var(--bad)}
table{display:block;overflow-x:auto;border-collapse:collapse;font-size:.875rem;overflow-wrap:normal}
td,th{padding:.3em .8em;vertical-align:top;border-bottom:1px solid var(--line)}
td:has(img){min-width:20rem} th{cursor:pointer;background:var(--soft)}
tr:nth-child(2n){background:var(--soft)}
img{height:70px;margin:2px;border:1px solid var(--line);border-radius:4px;background:#fff}"""
# A click on a head sorts by that column: numbers by size, texts by the alphabet.
SORT = """document.querySelectorAll("th").forEach(head => head.onclick = () => {
  const table = head.closest("table"), place = [...head.parentNode.children].indexOf(head);
  const rows = [...table.querySelectorAll("tr")].slice(1), up = head.dataset.up = head.dataset.up ? "" : "1";
  const value = row => {
    const text = row.children[place].innerText, number = parseFloat(text.replace(/,/g, ""));
    return isNaN(number) ? text : number; };
  rows.sort((a, b) => { const x = value(a), y = value(b);
    return (typeof x == typeof y ? (x < y ? -1 : x > y) : typeof x == "number" ? -1 : 1) * (up ? 1 : -1); });
  rows.forEach(row => row.parentNode.appendChild(row));
});"""


def write(folder: Path) -> None:
    """Renews the page and the table from what the run has left so far, each in one move."""
    outcomes = sorted(ledger.read(folder), key=lambda outcome: outcome.job.name)
    rows = scoreboard.read(folder)
    ledger.replaced(folder / TABLE, results(outcomes, rows))
    ledger.replaced(folder / ledger.REPORT, page(outcomes, rows, folder))


def page(outcomes: Sequence[Outcome], rows: list[dict], folder: Path) -> str:
    """A page that lists the outcomes, with figures and links to the notebooks, and what was measured."""
    varied = differing(outcomes)
    head = ("notebook", *varied, "time", "CPU time", "memory (GiB)", "slowest cells", "outcome", "figures")
    lines = [_line(outcome, varied, folder) for outcome in outcomes]
    failed = sum(outcome.error is not None for outcome in outcomes)
    busy = sum(bool(row.get("busy")) for row in rows)
    said = f"This machine was busy: {busy} of {len(rows)} rows are not to be trusted."
    doubt = f"<p class='failed'>{said}</p>" if busy else ""
    ended, measured = tables.Table(head, lines)._repr_html_(), scoreboard.table(rows)._repr_html_()
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Notebooks</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<style>{STYLE}</style>
<h1>{len(outcomes)} notebooks run, {failed} failed</h1>
{ended}
<h2>Measured</h2>
<p>The same as a table: <a href="{TABLE}">{TABLE}</a>. A click on a head sorts.</p>
{doubt}
{measured}
<script>{SORT}</script></html>
"""


def differing(outcomes: Sequence[Outcome]) -> list[str]:
    """The parameters that are not the same in all runs."""
    names = dict.fromkeys(name for outcome in outcomes for name in outcome.job.parameters)
    given = [outcome.job.parameters for outcome in outcomes]
    return [name for name in names if len({str(values.get(name, "")) for values in given}) > 1]


def _line(outcome: Outcome, varied: list[str], folder: Path) -> tuple[str, ...]:
    name = html.escape(outcome.job.name)
    executed = folder / f"{outcome.job.name}.ipynb"
    links = tables.Html(f"<a href='{name}.html'>{name}</a> (<a href='{name}.ipynb'>ipynb</a>)")
    changed = executed.stat().st_mtime_ns if executed.exists() else 0
    slowest, thumbnails = _shown(executed, changed)
    values = [str(outcome.job.parameters.get(parameter, "default")) for parameter in varied]
    took = f"{outcome.seconds:.0f} s", f"{outcome.cpu_seconds:.0f} s", f"{outcome.memory_bytes / 2**30:.1f}"
    return links, *values, *took, slowest, _ended(outcome, folder), thumbnails


def _ended(outcome: Outcome, folder: Path) -> str:
    if not outcome.error:
        return "passed"
    where = f" in cell {outcome.cell}" if outcome.cell else ""
    said = f"<b class='failed'>failed{where}: {html.escape(outcome.error)}</b>"
    log = f"{outcome.job.name}.log"
    there = f" (<a href='{html.escape(log)}'>log</a>)" if (folder / log).exists() else ""
    return tables.Html(said + there)


@functools.cache
def _shown(executed: Path, changed: int) -> tuple[str, str]:
    """An executed notebook's slowest cells and its figures; read once for each time that it has `changed`."""
    cells = _cells(executed)
    return _slowest(cells), _thumbnails(cells, executed)


def _slowest(cells: list[nbformat.NotebookNode], count: int = 3) -> str:
    """The slowest cells: their numbers in the notebook, and their seconds."""
    seconds = {
        cell.get("execution_count"): cell.metadata.get("companion", {}).get("seconds", 0) for cell in cells
    }
    longest = sorted((name for name in seconds if name), key=seconds.get, reverse=True)[:count]
    return ", ".join(f"[{number}] {seconds[number]:.0f} s" for number in longest)


def _cells(executed: Path) -> list[nbformat.NotebookNode]:
    """Of an executed notebook; none where it is not there, or was cut off."""
    try:
        return nbformat.read(executed, 4).cells
    except (OSError, ValueError, nbformat.reader.NotJSONError):
        return []


def _thumbnails(cells: list[nbformat.NotebookNode], executed: Path) -> str:
    """The last figures, which a click opens; they are files beside the page."""
    pictures = [
        output["data"]["image/png"]
        for cell in cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    links = []
    for number, picture in enumerate(pictures[-THUMBNAILS:], 1):
        path = executed.parent / FIGURES / f"{executed.stem}-{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(base64.b64decode(picture))
        name = f"{FIGURES}/{html.escape(path.name)}"
        alt = f"figure {number} of {html.escape(executed.stem)}"
        links.append(f"<a href='{name}'><img src='{name}' loading='lazy' alt='{alt}'></a>")
    return tables.Html("".join(links))


def results(outcomes: Sequence[Outcome], rows: Sequence[dict]) -> str:
    """All that was measured as comma-separated values, a line for each number: with the job, its parameters
    that differ, and how it ended. A job without a number has a line too.
    """
    varied = differing(outcomes)
    measured = (
        "notebook",
        "technique",
        "status",
        "metric",
        "value",
        "low",
        "high",
        "unit",
        "device",
        "threads",
    )
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("job", *varied, "outcome", "seconds", "cpu_seconds", "memory_bytes", *measured, "busy"))
    for outcome in outcomes:
        job = outcome.job
        values = [job.parameters.get(name, "") for name in varied]
        about = [job.name, *values, outcome.error or "passed", outcome.seconds]
        about += [outcome.cpu_seconds, outcome.memory_bytes]
        own = [row for row in rows if row.get("job") == job.name]
        for numbers in [line for row in own for line in _numbers(row)] or [("",) * (len(measured) + 1)]:
            lines.writerow([*about, *numbers])
    return text.getvalue()


def _numbers(row: dict) -> list[tuple]:
    threads = row["settings"].get("threads", row["environment"]["threads"])
    first, last = (
        (row["notebook"], row["technique"], row["status"]),
        (row["device"], threads, row.get("busy")),
    )
    metrics = row["metrics"] or {"": {"value": "", "unit": ""}}
    return [
        (*first, name, e["value"], e.get("low", ""), e.get("high", ""), e["unit"], *last)
        for name, e in metrics.items()
    ]
