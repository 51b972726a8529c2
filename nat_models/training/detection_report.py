"""What a detector's objects are worth: which are confused, curves over recall and score, and the worst images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from .coco_results import Precisions, mean_precision
from .detections import Detections, draw_on
from .detectors import DetectorConfig
from .drawing import draw_confusion, draw_truth, png
from .instance_masks import InstanceMasks
from .outlines import Outlines

BACKGROUND = "background"
IOU = 0.5  # from which a box is that of an object
CURVE_FIELDS = ("kind", "class", "recall", "precision", "f1", "score")
_CURVES = 12  # classes in a picture; of more, those with most objects
_PANEL = 400  # px, of an image on a sheet


@dataclass
class Confusion:
    """Which class was found where which one is, by boxes, over images.

    Found objects that score at least `threshold` are taken in the order of their scores. Each takes the object of its
    class with the best IoU, of at least 0.5, that none took before. The rest of them then take objects of other classes
    in the same way, but for those that lie with half of their area in a crowd of their class, which do not count.

    Attributes:
        classes: How many there are.
        threshold: See above.
        matrix: [true, found] counts; the last row is what was found where nothing is, the last column what was missed.
        false: For each image the objects that were found and are none of their class.
        missed: For each image the objects that were not found as of their class.
    """

    classes: int
    threshold: float
    matrix: np.ndarray = field(init=False)
    false: list[int] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.matrix = np.zeros((self.classes + 1, self.classes + 1), np.int64)

    def update(self, found: Detections, boxes: np.ndarray, labels: np.ndarray, crowd: np.ndarray) -> None:
        """Counts an image.

        Args:
            found: On it.
            boxes: [N, 4] of what is true.
            labels: [N].
            crowd: [N] bool.
        """
        found = found.above(self.threshold)
        pairs = _pairs(found, boxes[~crowd], labels[~crowd], boxes[crowd], labels[crowd], self.classes)
        np.add.at(self.matrix, tuple(pairs.T), 1)
        wrong = pairs[pairs[:, 0] != pairs[:, 1]]
        self.false.append(int((wrong[:, 1] < self.classes).sum()))
        self.missed.append(int((wrong[:, 0] < self.classes).sum()))

    def worst(self) -> list[int]:
        """Indices of the images with mistakes, those with most of them first."""
        mistakes = np.array(self.false, np.int64) + self.missed
        return [i for i in np.argsort(-mistakes, kind="stable").tolist() if mistakes[i]]

    def figures(self, label: int) -> dict[str, float]:
        """Of a class true, found, right, and from these precision and recall in percent; nan of nothing."""
        true, found = int(self.matrix[label].sum()), int(self.matrix[:, label].sum())
        right = int(self.matrix[label, label])
        precision, recall = (100 * right / n if n else float("nan") for n in (found, true))
        return dict(true=true, found=found, right=right, precision=precision, recall=recall)


def _pairs(
    found: Detections, boxes: np.ndarray, labels: np.ndarray, crowds: np.ndarray, of_crowds: np.ndarray, nothing: int
) -> np.ndarray:
    """[n, 2] of true and found class, `nothing` for none."""
    common = _common(found.boxes, boxes)
    iou = common / np.maximum(_areas(found.boxes)[:, None] + _areas(boxes) - common, 1e-9)
    in_crowd = _common(found.boxes, crowds) >= IOU * np.maximum(_areas(found.boxes), 1e-9)[:, None]
    in_crowd = (in_crowd & (found.labels[:, None] == of_crowds)).any(axis=1)
    order = np.argsort(-found.scores, kind="stable").tolist()
    free, pairs, rest = np.ones(len(boxes), bool), [], []
    for i in order:
        own = np.where(free & (labels == found.labels[i]), iou[i], -1.0)
        if len(own) and own.max() >= IOU:
            free[own.argmax()] = False
            pairs.append((found.labels[i], found.labels[i]))
        elif not in_crowd[i]:
            rest.append(i)
    for i in rest:
        other = np.where(free, iou[i], -1.0)
        if len(other) and other.max() >= IOU:
            free[other.argmax()] = False
            pairs.append((labels[other.argmax()], found.labels[i]))
        else:
            pairs.append((nothing, found.labels[i]))
    pairs += [(label, nothing) for label in labels[free]]
    return np.array(pairs, np.int64).reshape(-1, 2)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).astype(np.float64).clip(0).prod(axis=1)


def _common(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[N, M] px that boxes have in common."""
    least = np.maximum(first[:, None, :2], second[:, :2]).astype(np.float64)
    return (np.minimum(first[:, None, 2:], second[:, 2:]) - least).clip(0).prod(axis=2)


class Curve(NamedTuple):
    """Of a class at IoU 0.5, where recall first reaches 0, 0.01, ... as far as it does.

    Attributes:
        recall: [n]: whole objects of those that are true.
        precision: [n]: the best at that recall or a greater one, as COCO has it.
        score: [n]: from which on that recall is reached.
    """

    recall: np.ndarray
    precision: np.ndarray
    score: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        return 2 * self.precision * self.recall / np.maximum(self.precision + self.recall, 1e-12)

    def over_score(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores, ascending, and F1 of all that scores as much or more."""
        # Scores fall as recall grows; of equal ones the last has all of that score.
        scores, first = np.unique(self.score[::-1], return_index=True)
        return scores, self.f1[::-1][first]

    def best(self) -> tuple[float, float]:
        """The greatest F1 and the score from which on it is reached; nan where nothing was found."""
        if not len(self.recall):
            return float("nan"), float("nan")
        place = int(self.f1.argmax())
        return float(self.f1[place]), float(self.score[place])


def curve_of(precisions: Precisions, label: int, true: int) -> Curve:
    """The curve of a class that has so many true objects; where there is none, or none was found, it is empty."""
    precision, score = precisions.precision[0, :, label], precisions.scores[0, :, label]
    reached, steps = precision > 0, np.linspace(0, 1, len(precision))
    # COCO keeps the steps; recall grows by whole objects, and the one that reaches a step may lead beyond it.
    recall = np.ceil(steps * true - 1e-9) / max(true, 1)
    return Curve(recall[reached], precision[reached], score[reached])


def class_rows(details: Mapping[str, Precisions], confusion: Confusion, config: DetectorConfig) -> list[dict]:
    """A row for each class: AP of boxes and masks, in percent; counts, precision and recall by boxes at the
    confusion's threshold; the greatest F1, in percent, and the score from which on it is reached."""
    rows = []
    for label, (name, number) in enumerate(zip(config.classes, config.ids(), strict=True)):
        row = {"class": name, "category_id": number}
        for kind, found in details.items():
            row |= {f"{kind}_ap": found.per_class[label], f"{kind}_ap50": mean_precision(found.precision[0, :, label])}
        f1, score = curve_of(details["box"], label, int(confusion.matrix[label].sum())).best()
        rows.append(row | confusion.figures(label) | dict(best_f1=100 * f1, score_of_best_f1=score))
    return rows


def curve_rows(details: Mapping[str, Precisions], names: Sequence[str], counts: np.ndarray) -> list[list]:
    """The points of all curves, in the order of CURVE_FIELDS; see curves_png."""
    rows = []
    for kind, found in details.items():
        for label, name in enumerate(names):
            curve = curve_of(found, label, int(counts[label]))
            points = zip(curve.recall, curve.precision, curve.f1, curve.score, strict=True)
            rows += [[kind, name, *(round(float(x), 4) for x in point)] for point in points]
    return rows


def curves_png(details: Mapping[str, Precisions], names: Sequence[str], counts: np.ndarray) -> bytes:
    """Precision over recall and F1 over the score, a line for each class.

    Args:
        details: Of boxes and masks.
        names: Of the classes.
        counts: [C] true objects.
    """
    shown = sorted(np.argsort(-counts, kind="stable")[:_CURVES].tolist())
    title = f", the {_CURVES} of {len(names)} classes with most objects" if len(names) > _CURVES else ""
    figure = Figure(figsize=(11, 4.2 * len(details) + 0.6), layout="constrained")
    for (kind, found), (left, right) in zip(
        details.items(), figure.subplots(len(details), 2, squeeze=False), strict=True
    ):
        for label in shown:
            curve = curve_of(found, label, int(counts[label]))
            (line,) = left.plot(curve.recall, curve.precision, label=names[label], marker=".", markersize=3)
            right.plot(
                *curve.over_score(),
                color=line.get_color(),
                label=names[label],
                drawstyle="steps-pre",
                marker=".",
                markersize=3,
            )
        left.set(xlabel="recall", ylabel="precision", title=f"{kind}: precision and recall")
        right.set(xlabel="score from which objects count", ylabel="F1", title=f"{kind}: F1")
        for axes in (left, right):
            axes.set(xlim=(0, 1.01), ylim=(0, 1.02))
            axes.grid(alpha=0.3)
        for text in left.legend(fontsize=7, loc="lower left").get_texts():
            text.set_parse_math(False)
    figure.suptitle(f"at an IoU of {IOU}{title}")
    return png(figure)


def confusion_png(confusion: Confusion, names: Sequence[str]) -> bytes:
    """The matrix as a picture."""
    figure = draw_confusion(confusion.matrix, [*names, BACKGROUND])
    figure.suptitle(f"boxes of a score from {confusion.threshold:g} and an IoU from {IOU} on", fontsize=9)
    return png(figure)


class Shown(NamedTuple):
    """An image of the sheet of mistakes.

    Attributes:
        name: Of the image.
        image: [C, H, W] as it was read.
        found: What counts of what was found.
        target: What is true, as BoxSet gives it.
        caption: Under it.
    """

    name: str
    image: Tensor
    found: Detections
    target: Mapping
    caption: str


def mistakes_png(shown: Sequence[Shown], config: DetectorConfig, title: str) -> bytes:
    """Images in pairs: what is true on them, and what was found."""
    pictures, captions = [], []
    for name, image, found, target, caption in shown:
        boxes, labels, crowd = (np.asarray(target[key]) for key in ("boxes", "labels", "iscrowd"))
        options = dict(longest=_PANEL)
        pictures.append(draw_on(image, boxes, labels, config, masks=target.get("masks"), crowd=crowd, **options))
        masks = None if found.codes is None else InstanceMasks(Outlines.of(found.codes), found.size)
        pictures.append(draw_on(image, found.boxes, found.labels, config, masks=masks, scores=found.scores, **options))
        captions += [f"{name}: true", f"found: {caption}"]
    short = [x if len(x) <= 48 else f"…{x[-47:]}" for x in captions]
    alone = [None] * len(pictures)
    return png(draw_truth(pictures, alone, config.colours, config.classes, captions=short, title=title))
