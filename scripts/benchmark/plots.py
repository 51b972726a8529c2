"""Tables and pictures of what the benchmark measured. A row is a dict, what identifies it comes first."""

import io
from functools import partial

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def _cell(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def short(model: str) -> str:
    """Swin's names in timm without the sizes in them."""
    return model.split("_patch")[0]


def print_table(rows: list[dict]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in (columns, ["-" * w for w in widths], *cells):
        print("| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |")


def _bars(axes: Axes, rows: list[dict], suffix: str, log: bool = False) -> None:
    """A group of bars for each row, of the columns whose names end with `suffix`."""
    label = next(iter(rows[0]))
    columns = dict.fromkeys(column for row in rows for column in row if column.endswith(suffix))
    width = 0.8 / len(columns)
    for i, column in enumerate(columns):
        heights = [row.get(column, float("nan")) for row in rows]
        axes.bar([group + i * width for group in range(len(rows))], heights, width, label=column, align="edge")
    axes.set_xticks([group + 0.4 for group in range(len(rows))], [short(row[label]) for row in rows])
    axes.set_yscale("log" if log else "linear")
    axes.set_ylabel(suffix.strip())


def _accuracy_over_speed(axes: Axes, rows: list[dict]) -> None:
    colours = colormaps["tab20"].colors
    axes.set_prop_cycle(color=colours[::2] + colours[1::2])  # the strong ones first
    for i, family in enumerate(dict.fromkeys(row["family"] for row in rows if row["family"])):
        points = sorted((row["images/s"], row["top-1"], row["model"]) for row in rows if row["family"] == family)
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", label=family)
        for x, y, name in points:
            # Above and below in turn: names of two families seldom meet.
            axes.annotate(short(name), (x, y), xytext=(4, -12 if i % 2 else 4), textcoords="offset points")
    axes.margins(x=0.16)  # for the names
    axes.set_xlabel("images/s")
    axes.set_ylabel("ImageNet-1k top-1, %, as published")


def _time_per_pixel(axes: Axes, rows: list[dict]) -> None:
    for name in dict.fromkeys(row["model"] for row in rows):
        points = [row for row in rows if row["model"] == name]
        axes.plot([row["px"] for row in points], [row["ns / pixel"] for row in points], "o-", label=name)
    axes.set_xticks(sorted({row["px"] for row in rows}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("height and width of the image, px")
    axes.set_ylabel("ns / pixel")


def _runs(axes: Axes, rows: list[dict]) -> None:
    """A bar for each row, which is named by its texts."""
    names = [", ".join(short(x) for x in row.values() if isinstance(x, str)) for row in rows]
    axes.barh(names, [row["ms"] for row in rows], label="ms")
    axes.invert_yaxis()
    axes.set_xlabel("ms")


PLOTS = {
    "op": partial(_bars, suffix=" ms", log=True),
    "layer": partial(_bars, suffix=" ms"),
    "model": _accuracy_over_speed,
    "field": _accuracy_over_speed,
    "step": partial(_bars, suffix="images/s"),
    "memory": partial(_bars, suffix=" MiB"),
    "growth": _time_per_pixel,
    "segmentation": _runs,
    "detection": _runs,
}


def plot(suite: str, rows: list[dict], about: str) -> bytes:
    """A PNG picture of the rows."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    PLOTS[suite](axes, rows)
    axes.legend()
    axes.set_title(f"{suite}: {about}", fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
