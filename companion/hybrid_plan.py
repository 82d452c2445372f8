"""Which layout for which machine: a job described, all layouts of a cluster ranked by `layouts`.

found = launch.run(hybrid_machine.measured, 4, job)[0]  # this machine, quickly measured
print(hybrid_plan.plan(job, found).table())
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from statistics import correlation, median

import torch
from torch import nn

from companion import layouts, measure, memory, tables
from companion.clusters import Cluster
from companion.hybrid_steps import Job
from companion.layouts import Estimate, Workload
from companion.measure import Spread

EXAMPLES = 8  # images with which a model is described


def workload(job: Job) -> Workload:
    """A job as the formulas see it, from forward passes of its model on some of its images, in float32, to be
    trained by Adam. Without `split` everything counts as split.

    Raises ValueError if the blocks are not in the model, or do not hand on one tensor.
    """
    model, example = job.make(), job.images[:EXAMPLES]
    modules = dict(model.named_modules())
    if not job.blocks or any(name not in modules for name in job.blocks):
        raise ValueError(f"blocks={list(job.blocks)} must be names of the model's equal layers, in order")
    blocks, handed_on = [modules[name] for name in job.blocks], []
    hook = blocks[0].register_forward_hook(lambda block, given, output: handed_on.append(output))
    whole = _Cost.of(model, example)
    hook.remove()
    if not handed_on or not isinstance(handed_on[0], torch.Tensor):
        raise ValueError(f"{type(blocks[0]).__name__} hands on no single tensor")
    kept, part = _Cost(0, 0, 0), min((n for n in range(2, job.splits + 1) if job.splits % n == 0), default=1)
    if job.split and part > 1:  # what is left, beyond its share, where split layers are `part` times smaller
        kept = whole.unsplit(_Cost.of(_narrowed(model, job.split, part), example), part)
    many = len(example)
    return Workload(
        parameters=whole.parameters,
        layers=len(blocks),
        splits=job.splits,
        forward_flops=2 * whole.macs / many,
        boundary_bytes=handed_on[0].nbytes / many,
        saved_bytes=whole.saved_bytes / many,
        reduces=list(job.split.values()).count("row") / len(blocks) if job.split else 2.0,
        whole_parameters=kept.parameters,
        whole_flops=2 * kept.macs / many,
        whole_saved_bytes=kept.saved_bytes / many,
        outside_parameters=_outside(model, blocks) if kept.parameters else (0, 0),
    )


def _outside(model: nn.Module, blocks: Sequence[nn.Module]) -> tuple[int, int]:
    """How many of the model's parameters come before its blocks, and how many after them."""
    inside = [id(p) for block in blocks for p in block.parameters()]
    order = [id(p) for p in model.parameters()]
    before = order[: order.index(inside[0])]
    sizes = {id(p): p.numel() for p in model.parameters()}
    total, first = sum(sizes.values()), sum(sizes[one] for one in before)
    return first, total - first - sum(sizes[one] for one in inside)


@dataclass(frozen=True)
class _Cost:
    """Parameters of a model, multiply-accumulates of its forward pass, bytes that it keeps for backward."""

    parameters: float
    macs: float
    saved_bytes: float

    @classmethod
    def of(cls, model: nn.Module, example: torch.Tensor) -> "_Cost":
        with memory.SavedBytes(model, example) as saved:
            kept = model(example)
        del kept
        return cls(memory.parameters(model), measure.macs(model, example), saved.most)

    def unsplit(self, smaller: "_Cost", part: int) -> "_Cost":
        """What is not split, where a model that is split `part` times costs `smaller`: whole + split = self,
        whole + split / part = smaller.
        """
        pairs = zip(astuple(self), astuple(smaller), strict=True)
        return _Cost(*(less - (most - less) / (part - 1) for most, less in pairs))


def _narrowed(model: nn.Module, split: Mapping[str, str], part: int) -> nn.Module:
    """A copy in which every split layer has what one of `part` ranks has of it."""
    small = copy.deepcopy(model)
    for name, style in split.items():
        layer = small.get_submodule(name)
        features = {"column": ("out_features", 0), "row": ("in_features", 1)}
        attribute, dimension = features[style]
        setattr(layer, attribute, getattr(layer, attribute) // part)
        layer.weight = nn.Parameter(layer.weight.detach().chunk(part, dimension)[0].clone())
        if style == "column" and layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach().chunk(part)[0].clone())
    return small


@dataclass(frozen=True)
class Plan:
    """Layouts by predicted time, the fastest first: those that fit into a device's memory, and the others."""

    cluster: Cluster
    fit: tuple[Estimate, ...]
    too_large: tuple[Estimate, ...]

    def table(self, most: int = 12) -> tables.Table:
        """The fastest layouts, with milliseconds of a step by term and MiB of each device."""
        terms = list(self.fit[0].seconds if self.fit else self.too_large[0].seconds)
        shown = [*self.fit, *self.too_large][:most]
        rows = [
            (
                str(one.layout),
                f"{1e3 * one.step_seconds:.1f}",
                *(f"{1e3 * one.seconds[term]:.1f}" for term in terms),
                f"{one.total_bytes / 2**20:,.1f}",
                "" if one in self.fit else "does not fit",
            )
            for one in shown
        ]
        return tables.Table(("layout (model, not measurement)", "ms", *terms, "MiB", ""), rows)


def plan(job: Job, cluster: Cluster, micro_batches: int = 8) -> Plan:
    """All layouts of the cluster's devices for a training step of the job.

    Raises ValueError if no layout is possible at all; see also `workload`.
    """
    work, many = workload(job), len(job.images)
    fit, too_large = layouts.ranked(work, many, cluster, micro_batches)
    if not fit and not too_large:
        raise ValueError(
            f"no layout of {cluster.devices} devices divides the batch of {many}, {len(job.blocks)} blocks "
            f"and splits={job.splits}"
        )
    return Plan(cluster, tuple(fit), tuple(too_large))


@dataclass(frozen=True)
class Agreement:
    """How well predictions fit what was measured: relative errors by name, positive where too much was
    predicted; the correlation of both rankings, from -1 to 1; whether the fastest was predicted to be it, or
    cannot be told from it.
    """

    errors: dict[str, float]
    rank_correlation: float
    best_found: bool

    @property
    def median_error(self) -> float:
        return median(map(abs, self.errors.values()))


def agreement(measured: Mapping[str, Spread], predicted: Mapping[str, float]) -> Agreement:
    """Compares seconds by name. Raises ValueError for fewer than three, of which nothing can be ranked."""
    if len(measured) < 3:
        raise ValueError(f"{len(measured)} measurements cannot be ranked; take three or more")
    medians = {name: spread.median for name, spread in measured.items()}
    errors = {name: predicted[name] / medians[name] - 1 for name in medians}
    places = [
        [sorted(found.values()).index(found[name]) for name in medians] for found in (medians, predicted)
    ]
    best, chosen = min(medians, key=medians.get), min(medians, key=predicted.get)
    overlap = measured[chosen].low <= measured[best].high
    return Agreement(errors, correlation(*places), overlap)
