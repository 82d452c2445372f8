"""Ways to break what is read from the scoreboard, and the advice."""

from dataclasses import replace

from mutating import breaks

from companion import advice, measure, summary


@breaks("entries")
def against_the_last_row(notebook):
    """Speeds are set against the last row of the notebook, not the plain one."""
    entries = summary.entries
    summary.entries = lambda rows: entries(rows[::-1])


@breaks("entries")
def spreads_are_dropped(notebook):
    """Only medians are read."""
    entries = summary.entries

    def wrong(rows):
        found = entries(rows)
        return [
            replace(entry, speed_up=measure.Spread(*[entry.speed_up.median] * 3, 1))
            if entry.speed_up
            else entry
            for entry in found
        ]

    summary.entries = wrong


@breaks("advice")
def accuracy_does_not_matter(notebook):
    """Advice allows every loss of accuracy."""
    advise = advice.advise
    advice.advise = lambda found, rows, model, budget: advise(found, rows, model, 100.0)
