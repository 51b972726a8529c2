"""Pictures of results: confusion matrices, reliability, sheets of images, where a token looks."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL.Image import Image

from .decoding import Encoded, decode

LARGEST_MATRIX = 50  # classes; of more, those that are confused most
_THUMBNAIL = 160  # pixels
_PLAIN = dict(parse_math=False)  # names of classes are no formulas, whatever signs they hold


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def draw_confusion(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """[true, predicted] counts as a picture, each row in percent of its class."""
    title = "confusion matrix: percent of each true class"
    if len(names) > LARGEST_MATRIX:
        errors = matrix.sum(axis=1) - np.diag(matrix) + matrix.sum(axis=0) - np.diag(matrix)
        chosen = np.sort(np.argsort(-errors, kind="stable")[:LARGEST_MATRIX])
        title += f", the {LARGEST_MATRIX} of {len(names)} classes that are confused most"
        shares = (matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1))[np.ix_(chosen, chosen)]
        matrix, names = matrix[np.ix_(chosen, chosen)], [names[i] for i in chosen]
    else:
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = max(5.0, 1.5 + 0.42 * len(names))
    figure = Figure(figsize=(size + 0.5, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    short = [name if len(name) <= 18 else f"{name[:17]}…" for name in names]
    axes.set_xticks(range(len(names)), short, rotation=90, **_PLAIN)
    axes.set_yticks(range(len(names)), short, **_PLAIN)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    for i, j in zip(*np.nonzero(matrix), strict=True):
        colour = "white" if shares[i, j] > 0.5 else "black"
        axes.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=7)
    return figure


def draw_reliability(confidence: np.ndarray, right: np.ndarray, bins: int) -> Figure:
    """How often predictions of a confidence are right, and how many there are."""
    figure = Figure(figsize=(5, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.digitize(confidence, edges[1:-1], right=True), 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    accuracy = np.bincount(place, weights=right, minlength=bins) / np.maximum(counts, 1)
    upper.bar(edges[:-1], accuracy, width=1 / bins, align="edge", edgecolor="white")
    upper.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="as sure as right")
    upper.set(ylabel="part that is right", xlim=(0, 1), ylim=(0, 1), title="reliability")
    upper.legend(loc="upper left")
    lower.bar(edges[:-1], counts, width=1 / bins, align="edge", edgecolor="white", color="grey")
    lower.set(xlabel="confidence", ylabel="images")
    return figure


def draw_sheet(images: Sequence[tuple[Encoded, str]], title: str, columns: int = 6) -> Figure:
    """Thumbnails with captions."""
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(1.6 * columns, 0.5 + 1.95 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    for axes, (image, caption) in zip(grid, images, strict=False):
        picture = decode(image, 3)
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        axes.imshow(picture)
        axes.set_title(caption, fontsize=7, **_PLAIN)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_attention(
    photograph: Image,
    pixel: tuple[int, int],
    levels: Sequence[np.ndarray],
    covered: Sequence[tuple[float, float]],
    columns: int = 9,
) -> Figure:
    """For each level the photograph with the mean over heads on it, then each head alone.

    Args:
        photograph: Upright.
        pixel: (column, row) of the token, marked by a cross.
        levels: For each, [num_heads, H_l, W_l].
        covered: For each, the (height, width) that its map covers, in the photograph's pixels; maps reach beyond it at
            the bottom and right.
        columns: Pictures in a row.
    """
    aspect = photograph.height / photograph.width
    heads = columns - 1  # of a line
    lines = [(level, first) for level, maps in enumerate(levels) for first in range(0, len(maps), heads)]
    figure = Figure(figsize=(1.5 * columns, (1.5 * aspect + 0.3) * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), columns, squeeze=False)
    grey, extent = photograph.convert("L"), (0, photograph.width, photograph.height, 0)
    for axes in grid.flat:
        axes.axis("off")
    for line, (level, first) in zip(grid, lines, strict=True):
        maps, (height, width) = levels[level], covered[level]
        shown = [(f"level {level}: mean", maps.mean(0))] if first == 0 else []
        shown += [(f"head {head}", maps[head]) for head in range(first, min(first + heads, len(maps)))]
        for axes, (title, weights) in zip(line[0 if first == 0 else 1 :], shown, strict=False):
            axes.imshow(photograph if title.endswith("mean") else grey, cmap="gray", extent=extent)
            strength = weights / max(weights.max(), 1e-12)
            place = dict(extent=(0, width, height, 0), interpolation="nearest")
            axes.imshow(strength, cmap="inferno", alpha=0.8 * strength**0.5, **place)
            axes.plot(pixel[0] + 0.5, pixel[1] + 0.5, marker="+", color="cyan", markersize=7)
            axes.set(xlim=extent[:2], ylim=extent[2:])
            axes.set_title(title, fontsize=7)
    return figure
