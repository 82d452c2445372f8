"""What the launching process and its ranks say to each other.

    launching process                                     rank (a process of its own)
    `ranks.Rank.start`        -- payload, variables -->   `worker.main` unpacks the function and calls it
    `ranks.Rank.hear`         <-- Report.BAR ----------   tqdm's bars, of rank 0
                              <-- lines ---------------   what is printed, on two further pipes
                              <-- Report.RETURNED -----   the packed result; or
                              <-- Report.FAILED -------   the error in a line, its traceback, its place
    when another one failed   --- Order.SAY_PLACE ---->
                              <-- Report.PLACE --------   the line where the rank is
    when all have returned    --- Order.LEAVE -------->   the process group is left, the process ends
    `ranks.Rank.end`          --- SIGKILL ------------>   however it ended, nothing is left behind

An order is a member of `Order`. A report is a tuple: a member of `Report`, and what belongs to it.
"""

from dataclasses import dataclass
from enum import Enum, auto


class State(Enum):
    """Of a rank, as the launching process sees it."""

    RUNNING = auto()
    RETURNED = auto()  # the result is here; the process waits for the others
    LEAVING = auto()  # it has been told to leave, or to die
    ENDED = auto()  # there is no process any more


class Order(Enum):
    """What a rank is told to do."""

    SAY_PLACE = auto()
    LEAVE = auto()


class Report(Enum):
    """What a rank has to say."""

    RETURNED = auto()  # the packed result
    FAILED = auto()  # the arguments of `Failure`
    PLACE = auto()  # the line where it is
    BAR = auto()  # the bar's key, and what it shows or None when it is closed


@dataclass
class Failure:
    """How a rank failed."""

    seconds: float  # since the epoch
    reason: str
    details: str = ""
    place: str = ""
    echo: bool = False  # may be but the consequence of another rank's
