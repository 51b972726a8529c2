"""Pictures of results: confusion matrices, reliability, sheets of images, classes of pixels, where a token looks."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import ImageDraw, ImageFont
from PIL.Image import Image, Resampling, blend, fromarray

from .decoding import Encoded, decode

LARGEST_MATRIX = 50  # classes; of more, those that are confused most
_THUMBNAIL = 160  # pixels
_PANEL = 400  # pixels of a picture with its classes
_STRIPE = 5  # pixels
_LEGEND = 40  # classes; of more, those that cover most
_PLAIN = dict(parse_math=False)  # names of classes are no formulas, whatever signs they hold


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def encoded(picture: Image, format: str, **kwargs) -> bytes:
    """A picture as the bytes of a file; `kwargs` are Pillow's of the format."""
    buffer = io.BytesIO()
    picture.save(buffer, format, **kwargs)
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


def overlay(
    picture: np.ndarray, labels: np.ndarray, colours: Sequence[tuple[int, int, int]], strength: float = 0.6
) -> np.ndarray:
    """A picture with the colours of its classes laid over it; ignored pixels are striped in white.

    Args:
        picture: [H, W, 3] uint8.
        labels: [H, W] of class indices; what is no index into `colours`, such as 255, is ignored.
        colours: (red, green, blue) of each class.
        strength: Of the colours, from 0 to 1.

    Returns:
        [H, W, 3] uint8.
    """
    table = np.zeros((len(colours) + 1, 3), np.uint8)
    table[:-1] = colours
    known = (labels >= 0) & (labels < len(colours))
    laid = table[np.where(known, labels, len(colours))]
    row, column = np.indices(labels.shape, sparse=True)
    laid[~known & ((row + column) // _STRIPE % 2 == 0)] = 255
    return np.asarray(blend(fromarray(picture), fromarray(laid), strength))  # in bytes: pictures may be large


def draw_truth(
    pictures: Sequence[np.ndarray],
    labels: Sequence[np.ndarray | None],
    colours: Sequence[tuple[int, int, int]],
    names: Sequence[str],
    *,
    captions: Sequence[str] = (),
    columns: int = 4,
    title: str = "",
) -> Figure:
    """A sheet of pictures with the classes of their pixels, true or predicted, and a legend of those that are there.

    Args:
        pictures: Each [H, W, 3] uint8.
        labels: For each [H, W] of class indices, 255 for ignored; None shows the picture alone.
        colours: (red, green, blue) of each class.
        names: Of the classes.
        captions: Of the pictures, in their order; those that are left out are empty.
        columns: Pictures in a row.
        title: Of the sheet.
    """
    rows = max(1, -(-len(pictures) // columns))
    figure = Figure(figsize=(2.6 * columns, 0.8 + 2.6 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    covered = np.zeros(len(names) + 1, np.int64)
    for i, (axes, picture, truth) in enumerate(zip(grid, pictures, labels, strict=False)):
        factor = min(1.0, _PANEL / max(picture.shape[:2]))
        size = tuple(max(1, round(side * factor)) for side in picture.shape[1::-1])
        small = np.asarray(fromarray(picture).resize(size))
        if truth is not None:
            known = np.where((truth >= 0) & (truth < len(names)), truth, len(names))
            covered += np.bincount(known.ravel(), minlength=len(names) + 1)
            nearest = fromarray(known.astype(np.int32)).resize(size, Resampling.NEAREST)
            small = overlay(small, np.asarray(nearest), colours)
        axes.imshow(small, interpolation="nearest")
        axes.set_title(captions[i] if i < len(captions) else "", fontsize=7, **_PLAIN)
    present = [i for i in np.argsort(-covered[:-1], kind="stable") if covered[i]]
    handles = [Patch(color=np.array(colours[i]) / 255, label=names[i]) for i in present[:_LEGEND]]
    if covered[-1]:
        handles.append(Patch(facecolor="black", edgecolor="white", hatch="////", label="ignored"))
    if handles:
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=7)
        for text in legend.get_texts():
            text.set_parse_math(False)
    figure.suptitle(title, fontsize=10, **_PLAIN)
    return figure


def draw_objects(
    picture: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    colours: Sequence[tuple[int, int, int]],
    names: Sequence[str],
    *,
    masks: np.ndarray | None = None,
    crowd: np.ndarray | None = None,
    scores: np.ndarray | None = None,
    longest: int | None = _PANEL,
    strength: float = 0.45,
    letters: int = 11,
) -> np.ndarray:
    """A picture with boxes, masks and names of objects on it; a crowd is striped in white.

    Args:
        picture: [H, W, 3] uint8.
        boxes: [N, 4], (x1, y1, x2, y2) px of the picture.
        labels: [N] class indices.
        colours: (red, green, blue) of each class.
        names: Of the classes.
        masks: [N, H, W], 0 outside, or a sequence of N that makes them one at a time; None draws boxes alone.
        crowd: [N] bool; None for none.
        scores: [N] from 0 to 1, told beside the names; None for the truth.
        longest: px, of the side of what comes out; None leaves the size.
        strength: Of the colours of masks, from 0 to 1.
        letters: px, their height; lines are a fifth as wide.

    Returns:
        [H, W, 3] uint8.
    """
    factor = 1.0 if longest is None else min(1.0, longest / max(picture.shape[:2]))
    size = tuple(max(1, round(side * factor)) for side in picture.shape[1::-1])
    shown = np.array(fromarray(picture).resize(size))
    crowd = np.zeros(len(boxes), bool) if crowd is None else crowd
    for i in range(len(boxes)) if masks is not None else ():
        inside = np.asarray(fromarray((masks[i] > 0).astype(np.uint8)).resize(size, Resampling.NEAREST)) > 0
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        if not len(rows):
            continue
        part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        laid = overlay(shown[part], np.where(inside[part], -1 if crowd[i] else labels[i], 0), colours, strength)
        shown[part] = np.where(inside[part][..., None], laid, shown[part])
    image = fromarray(shown)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=letters)
    for i in np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(axis=1), kind="stable"):  # the small ones on top
        colour, corners = (255, 255, 255) if crowd[i] else tuple(colours[labels[i]]), boxes[i] * factor
        draw.rectangle(corners.tolist(), outline=colour, width=max(2, letters // 5))
        said = names[labels[i]] + (" (crowd)" if crowd[i] else "")
        said += "" if scores is None else f" {scores[i]:.2f}"
        place = (float(corners[0]) + 2, max(0.0, float(corners[1]) - letters - 2))
        draw.rectangle(draw.textbbox(place, said, font=font), fill=colour)
        draw.text(place, said, fill="black" if sum(colour) > 380 else "white", font=font)
    return np.asarray(image)


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
