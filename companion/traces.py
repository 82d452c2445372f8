"""What torch.profiler saw, as lanes of a timeline."""

import os
from collections import Counter

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile

# Read when the first profile starts; else it reports on stderr that there is no GPU driver.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
Span = tuple[str, float, float]  # what, start, end; in seconds


def lanes(profiler: profile, most: int = 3) -> dict[str, list[Span]]:
    """Spans by lane, for `plots.timeline`: "parts" are the regions that `record_function` named, "operators"
    the outermost operators below them, on the CPU; seconds from the first event.

    The `most` operators that take the longest keep their names, the others are "other".
    """
    events = [event for event in profiler.events() if event.time_range.elapsed_us() > 0]
    # torch's own regions have names such as "Optimizer.step#AdamW.step".
    regions = [event for event in events if event.is_user_annotation and "#" not in event.name]
    operators = [event for event in events if _outermost(event)]
    if not events:
        raise ValueError("the profiler has seen nothing: run something while it is on")
    start = min(event.time_range.start for event in events)
    spent: Counter[str] = Counter()
    for event in operators:
        spent[_name(event)] += event.time_range.elapsed_us()
    named = {name for name, _ in spent.most_common(most)}

    def span(event: FunctionEvent, name: str) -> Span:
        times = event.time_range
        return name, (times.start - start) / 1e6, (times.end - start) / 1e6

    return {
        "parts": [span(event, event.name) for event in regions],
        "operators": [span(event, _name(event) if _name(event) in named else "other") for event in operators],
    }


def _name(event: FunctionEvent) -> str:
    return event.name.removeprefix("aten::")


def _outermost(event: FunctionEvent) -> bool:
    """Whether the event is an operator that no other operator has called."""
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith("aten::"):
            return False
        parent = parent.cpu_parent
    return event.name.startswith("aten::")
