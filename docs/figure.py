"""Draws the README's figure from the records that come with the package: python docs/figure.py"""

import hashlib
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from companion import scoreboard, stored, summary, summary_figures

FIGURE = Path(__file__).with_name("scoreboard.svg")
RECORDS = stored.FOLDER / scoreboard.FILE


def stamp() -> str:
    """What the figure says of the records that it was drawn from."""
    return f"records {hashlib.sha256(RECORDS.read_bytes()).hexdigest()}"


def main() -> int:
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "one"}
    drawn = summary_figures.gains(summary.entries(summary.stored()))
    drawn.savefig(FIGURE, metadata={"Date": None, "Description": stamp()})
    text = FIGURE.read_text(encoding="utf-8")
    FIGURE.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
