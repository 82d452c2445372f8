"""Pictures of what is learned: images with their labels, and which classes are taken for which."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from companion.datasets import Split, Splits
from companion.figures import panels_of, styled


@styled
def images(splits: Splits, split: Split, count: int = 20, guesses: torch.Tensor | None = None) -> Figure:
    """The first `count` images of a split with their labels; with `guesses` `[N]`, what the model took them
    for.
    """
    columns = min(10, count)
    rows = -(-count // columns)
    drawn, axes = plt.subplots(rows, columns, figsize=(0.85 * columns, 1.05 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, axis in zip(range(min(count, len(split.labels))), axes.flat, strict=False):
        axis.imshow(
            (split.images[i] * splits.std + splits.mean).clamp(0, 1).permute(1, 2, 0).numpy(),
            interpolation="nearest",
        )
        title = splits.classes[split.labels[i]]
        axis.set_title(title if guesses is None else f"{title}, not {splits.classes[guesses[i]]}", fontsize=9)
    return drawn


@styled
def confusion(labels: torch.Tensor, guesses: torch.Tensor, classes: Sequence[str]) -> Figure:
    """How many images of each true class were taken for each class; the diagonal, which is right, is left
    pale.
    """
    counts = torch.bincount(labels * len(classes) + guesses, minlength=len(classes) ** 2).view(
        len(classes), -1
    )
    wrong = counts.clone().fill_diagonal_(0)
    drawn, (axis,) = panels_of(1, 4.6, 4.2)
    axis.grid(False)
    axis.imshow(wrong.numpy(), cmap="Oranges", vmin=0, vmax=max(1, int(wrong.max()) * 2))
    for row in range(len(classes)):
        for column in range(len(classes)):
            if counts[row, column]:
                axis.text(
                    column,
                    row,
                    int(counts[row, column]),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="grey" if row == column else "black",
                )
    ticks = range(len(classes))
    axis.set(xlabel="taken for", ylabel="is", xticks=ticks, yticks=ticks)
    axis.set_xticklabels(classes, rotation=0 if len(max(classes, key=len)) < 3 else 90)
    axis.set_yticklabels(classes)
    return drawn


@styled
def matrices(tensors: dict[str, torch.Tensor], columns: int = 6) -> Figure:
    """Weights or masks `[rows, columns]` as pictures, on one scale: red below 0, blue above, white is 0."""
    columns = min(columns, len(tensors))
    rows = -(-len(tensors) // columns)
    drawn, axes = plt.subplots(rows, columns, figsize=(1.6 * columns, 1.8 * rows), squeeze=False)
    most = max(float(tensor.detach().abs().max()) for tensor in tensors.values())
    for axis in axes.flat:
        axis.axis("off")
    for (name, tensor), axis in zip(tensors.items(), axes.flat, strict=False):
        values = tensor.detach().float().numpy()
        axis.imshow(values, cmap="RdBu", vmin=-most, vmax=most, interpolation="nearest", aspect="auto")
        axis.set_title(name, fontsize=9)
    return drawn
