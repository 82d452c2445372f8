"""What torch.profiler saw becomes lanes with the parts that were named, and the outermost operators."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from companion import traces


def test_lanes_have_named_parts_and_outermost_operators():
    x = torch.randn(300, 300)
    optimizer = torch.optim.SGD([x.requires_grad_()], lr=0.1)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function("forward"):
            y = torch.nn.functional.linear(x, x).relu().sum()
        with record_function("backward"):
            y.backward()
        with record_function("optimizer"):
            optimizer.step()
    lanes = traces.lanes(profiler, most=1)
    assert [what for what, *_ in lanes["parts"]] == ["forward", "backward", "optimizer"]
    named = {what for what, *_ in lanes["operators"]}
    assert len(named) == 2
    assert "other" in named
    starts = [start for _, start, _ in lanes["parts"]]
    assert starts == sorted(starts)
    assert all(0 <= start < end for spans in lanes.values() for _, start, end in spans)
    forward = lanes["parts"][0]
    inside = [span for span in lanes["operators"] if forward[1] <= span[1] and span[2] <= forward[2]]
    assert len(inside) == 3, "linear, relu and sum; what linear calls is not outermost"


def test_a_profile_of_nothing_is_refused():
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        pass
    with pytest.raises(ValueError, match="has seen nothing"):
        traces.lanes(profiler)
