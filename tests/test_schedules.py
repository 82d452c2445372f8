"""What theory says of schedules is what is published, and what is recorded is counted right."""

import pytest
import torch

from companion import schedules, timetables
from companion.schedules import Span


def test_bubbles_are_the_published_ones():
    """GPipe: (K-1)/(M+K-1); Megatron-LM divides by v; ZB-H1 keeps a third."""
    assert schedules.predicted_bubble("gpipe", 4, 4) == pytest.approx(3 / 7)
    assert (
        schedules.predicted_bubble("1f1b", 8, 32)
        == schedules.predicted_bubble("gpipe", 8, 32)
        == pytest.approx(7 / 39)
    )
    assert schedules.predicted_bubble("interleaved", 4, 8) == pytest.approx(3 / 19)
    assert schedules.predicted_bubble("zero_bubble", 4, 8) == pytest.approx(3 / 27)
    assert all(schedules.predicted_bubble(name, 1, 8) == 0 for name in schedules.SCHEDULES)


def spans(text: str) -> list[Span]:
    """ "F0 F1 B0" -> spans of a second each."""
    return [Span(word[0], 0, int(word[1:]), i, i + 1) for i, word in enumerate(text.split())]


def test_idle_time_is_what_no_span_covers():
    first = [Span("F", 0, 0, 10.0, 11.0), Span("B", 0, 0, 13.0, 14.0)]
    second = [Span("F", 1, 0, 11.0, 12.0), Span("B", 1, 0, 12.0, 13.0)]
    assert schedules.bubble([first, second]) == pytest.approx(0.5)
    assert schedules.bubble([first]) == pytest.approx(0.5)
    assert schedules.bubble([spans("F0 B0")]) == 0


def test_in_flight():
    assert schedules.in_flight(spans("F0 F1 F2 B0 B1 B2")) == 3
    assert schedules.in_flight(spans("F0 B0 F1 B1")) == 1
    assert schedules.in_flight(spans("F0 I0 F1 W0 I1 W1")) == 2, "a micro-batch is done when its weights are"


def test_lanes_begin_at_zero_and_tell_second_stages():
    lanes = schedules.lanes(
        [[Span("F", 0, 3, 5.0, 6.0), Span("B", 2, 1, 7.0, 9.0)], [Span("W", 1, 0, 6.0, 7.0)]]
    )
    assert lanes == {"rank 0": [("F 3", 0.0, 1.0), ("B' 1", 2.0, 4.0)], "rank 1": [("W 0", 1.0, 2.0)]}


def test_a_timed_stage_hands_on_and_learns():
    stage, x = schedules.TimedStage(0.01, 0.0, 0.0), torch.ones(3, requires_grad=True)
    output = stage(x)
    assert torch.equal(output, x)
    output.sum().backward()
    assert torch.equal(x.grad, torch.ones(3))
    assert stage.weight.grad is not None


def test_check_says_what_fits():
    schedules.check("interleaved", 2, 4, 4)
    for arguments, message in (
        (("1f1b", 2, 3, 8), "needs 2 stages, not 3: cut the model 1 times"),
        (("interleaved", 2, 4, 3), "micro_batches=3 is less than the 4 stages; use 4 or more"),
        (("zigzag", 2, 2, 2), "use one of gpipe"),
    ):
        with pytest.raises(ValueError, match=message):
            schedules.check(*arguments)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_timetables_have_the_published_bubble(name, ranks, rounds):
    pieces = ranks * schedules.SCHEDULES[name].stages_per_rank * rounds
    made = timetables.timetable(name, ranks, pieces)
    assert schedules.bubble(made) == pytest.approx(schedules.predicted_bubble(name, ranks, pieces))
    for rank, passes in enumerate(made):
        assert len({(span.kind, span.stage, span.micro_batch) for span in passes}) == len(passes)
        most = schedules.predicted_in_flight(name, ranks, rank, pieces)
        forward_less_back = 0
        for span in sorted(passes, key=lambda span: span.start):
            forward_less_back += {"F": 1, "W": 0}.get(span.kind, -1)
            assert forward_less_back <= most


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_in_a_timetable_nobody_uses_what_is_not_there(name):
    passes = [span for rank in timetables.timetable(name, 4, 8) for span in rank]
    ends = {(span.kind, span.stage, span.micro_batch): span.end for span in passes}
    backward = "I" if name == "zero_bubble" else "B"
    last = max(span.stage for span in passes)
    for span in passes:
        if span.kind == "F" and span.stage:
            assert ends["F", span.stage - 1, span.micro_batch] <= span.start
        if span.kind == backward:
            before = ("F", last) if span.stage == last else (backward, span.stage + 1)
            assert ends[(*before, span.micro_batch)] <= span.start


def test_a_timetable_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="interleaved on 4 ranks needs a multiple of 4"):
        timetables.timetable("interleaved", 4, 9)
    with pytest.raises(ValueError, match="schedule='fast' is unknown"):
        timetables.timetable("fast", 4, 8)
