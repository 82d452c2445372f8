"""What the launching process makes of its ranks' reports: their results, or the error of the one that failed
first.
"""

import math
import time
from multiprocessing.connection import wait

from companion.launch import pickling
from companion.launch.protocol import Order, State
from companion.launch.ranks import Rank

# For how long what may be the echo of another rank's failure waits for news of that one.
_PATIENCE_SECONDS = 0.7


class WorkerError(RuntimeError):
    """A rank failed, was killed, or did not end in time.

    The message has its traceback, and where the other ranks were.

    `rank` is the one that failed first (None for a time-out of the whole), `reason` what happened in one
    line, `place` the line of the user's code where it did, if known.
    """

    def __init__(self, reason: str, rank: int | None, place: str, details: str):
        super().__init__(
            "\n".join([reason if rank is None else f"rank {rank} failed first: {reason}", details]).rstrip()
        )
        self.rank, self.reason, self.place = rank, reason, place


def _hear(ranks: list[Rank], seconds: float) -> None:
    """Takes in what the ranks say; waits at most `seconds` for something."""
    sources = {source: rank for rank in ranks for source in rank.sources()}
    for source in wait(list(sources), min(seconds, 3600)):
        if (
            source in sources[source].sources()
        ):  # still: the end of a rank is heard together with its last words
            sources[source].hear(source)


def collect(ranks: list[Rank], limit_seconds: float) -> list:
    """The results by rank, once all have returned; raises WorkerError as soon as it is clear which rank
    failed first.
    """
    late, settled = time.monotonic() + limit_seconds, math.inf
    while any(rank.result is None for rank in ranks):
        now, failures = time.monotonic(), [rank.failure for rank in ranks if rank.failure]
        if failures:
            settled = min(
                settled, now + (_PATIENCE_SECONDS if all(failure.echo for failure in failures) else 0.1)
            )
        if now >= settled:
            raise _blame(ranks)
        if now >= late:
            raise WorkerError(
                f"time-out: not all ranks returned within {limit_seconds:g} s", None, "", _whereabouts(ranks)
            )
        _hear(ranks, min(settled, late) - now)
    for rank in ranks:
        rank.leave()
    end = time.monotonic() + 10
    while any(rank.state is not State.ENDED for rank in ranks) and (now := time.monotonic()) < end:
        _hear(ranks, end - now)
    return [_unpacked(rank) for rank in ranks]


def _unpacked(rank: Rank) -> object:
    try:
        return pickling.unpack(rank.result)
    except Exception as error:
        reason = f"its result cannot be unpickled: {type(error).__name__}: {error}"
        raise WorkerError(reason, rank.number, "", "return plain data, such as a dictionary") from error


def _blame(ranks: list[Rank]) -> WorkerError:
    """The error of the rank that failed first. One that gives no answer comes before those that have waited
    for it in vain.
    """
    first = min(
        (rank for rank in ranks if rank.failure), key=lambda rank: (rank.failure.echo, rank.failure.seconds)
    )
    elsewhere = _whereabouts(ranks, first)
    silent = [rank for rank in ranks if rank.state is State.RUNNING and not (rank.failure or rank.place)]
    if first.failure.echo and silent:
        reason = "gave no answer: it was stopped, or hangs where Python cannot be interrupted"
        waited = f"rank {first.number} waited: {first.failure.reason}\n{first.failure.details}"
        return WorkerError(reason, silent[0].number, "", f"{waited}\n{elsewhere}")
    details = f"{first.failure.details}\n{elsewhere}"
    return WorkerError(first.failure.reason, first.number, first.failure.place, details)


def _whereabouts(ranks: list[Rank], but: Rank | None = None) -> str:
    """What each rank, but one, was doing."""
    running = [rank for rank in ranks if rank.state is State.RUNNING and not rank.failure]
    for rank in running:
        rank.tell(Order.SAY_PLACE)
    # A busy machine needs long to answer; a rank in native code that holds the GIL never does.
    end = time.monotonic() + 3
    while not all(rank.place or rank.failure for rank in running) and (now := time.monotonic()) < end:
        _hear(ranks, end - now)
    said: dict[str, list[str]] = {}
    for rank in ranks:
        if rank is not but:
            said.setdefault(rank.whereabouts(), []).append(str(rank.number))
    lines = [
        (f"rank {who[0]}", what)
        if not who[1:]
        else (f"ranks {', '.join(who)}", what.replace("was", "were", 1))
        for what, who in said.items()
    ]
    return "\n".join(f"{who} {what}" for who, what in lines)
