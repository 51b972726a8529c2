"""What a classifier's probabilities are worth: figures, tables and pictures."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_confusion_matrix,
    multiclass_stat_scores,
    multilabel_average_precision,
    multilabel_stat_scores,
)

from ..errors import UserError
from ..writing import csv_text, write_atomically
from .decoding import Encoded, describe
from .drawing import draw_confusion, draw_reliability, draw_sheet, png
from .images import load_images, read_batches
from .models import computing, readable
from .report import track

BINS = 15  # of the calibration error, as in Guo et al., arXiv:1706.04599
_WHOLE_MATRIX = 1000  # classes
_SHEET = 24  # mistakes that are shown
_WARM_UP = 2  # batches that are not timed: first use allocates and chooses kernels


@dataclass
class Predictions:
    """What a model says of images.

    Attributes:
        images: The images that could be read.
        kept: Their indices in what was asked for.
        probabilities: [images, classes], float32; rows sum to 1, but for several labels.
        images_per_second: Loading included, the first batches not.
        unreadable: Errors of the others.
    """

    images: list[Encoded]
    kept: list[int]
    probabilities: np.ndarray
    images_per_second: float
    unreadable: list[UserError] = field(default_factory=list)


@torch.inference_mode()
def classify(
    model: nn.Module,
    images: Sequence[Encoded],
    data_config: dict,
    *,
    multi_label: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    precision: str = "float32",
    device: str = "cpu",
    on_error: Callable[[UserError], None] | None = None,
    description: str = "",
) -> Iterator[tuple[list[int], Tensor]]:
    """What a model says of images, batch by batch: their indices, and probabilities [B, classes] in float32.

    Args:
        model: A timm model.
        images: In the order of the answers.
        data_config: The preprocessing, in timm's words.
        multi_label: Each output is a question of its own: sigmoid instead of softmax.
        batch_size: Images per step.
        workers: Processes that load images.
        precision: Of the computation.
        device: What to compute on.
        on_error: Is told of each image that cannot be read; None: the first one is raised.
        description: Of the line of progress; none without.

    Raises:
        UserError: An image cannot be read, or what the model computes of one is not finite.
    """
    model = model.to(device).eval()
    loader = load_images(images, data_config, batch_size, workers)
    for batch, indices in read_batches(track(loader, description), on_error):
        with computing(precision, device):
            logits = model(batch.to(device))
        logits = logits.float()
        probabilities = (logits.sigmoid() if multi_label else logits.softmax(dim=1)).cpu()
        found = indices.tolist()
        if not (finite := probabilities.isfinite().all(dim=1)).all():
            first = images[found[int((~finite).nonzero()[0])]]
            raise UserError(f"What the model computes of {describe(first)} in {precision} is not finite.")
        yield found, probabilities


def predict(
    model: nn.Module,
    images: Sequence[Encoded],
    data_config: dict,
    *,
    multi_label: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    precision: str = "float32",
    device: str = "cpu",
    skip_unreadable: bool = False,
    description: str = "images",
) -> Predictions:
    """All that `classify` says, and how fast.

    Raises:
        UserError: As `classify`; with skip_unreadable, no image can be read.
    """
    unreadable, rows, kept, started, timed = [], [], [], time.perf_counter(), 0
    batches = classify(
        model,
        images,
        data_config,
        multi_label=multi_label,
        batch_size=batch_size,
        workers=workers,
        precision=precision,
        device=device,
        on_error=unreadable.append if skip_unreadable else None,
        description=description,
    )
    for number, (indices, probabilities) in enumerate(batches, start=1):
        rows.append(probabilities)
        kept += indices
        if number == _WARM_UP < len(images) / batch_size:
            started, timed = time.perf_counter(), len(kept)
    if not kept:
        raise UserError(f"None of the {len(images)} images can be read.")
    speed = (len(kept) - timed) / (time.perf_counter() - started)
    return Predictions([images[i] for i in kept], kept, torch.cat(rows).numpy(), speed, unreadable)


@dataclass
class Judgement:
    """Figures of predictions against what is true.

    Attributes:
        names: The classes.
        figures: By name; percent, but for cross_entropy.
        per_class: A row per class: precision, recall, f1 in percent, and support.
        confusion: [true, predicted] counts; None for several labels.
        confusion_names: The classes of its rows and columns: all of up to 1,000, of more those that occur.
        multi_label: Whether an image has any number of labels.
    """

    names: list[str]
    figures: dict[str, float]
    per_class: list[dict]
    confusion: np.ndarray | None
    confusion_names: list[str]
    multi_label: bool


def judge(probabilities: np.ndarray, targets: Sequence, names: Sequence[str], multi_label: bool = False) -> Judgement:
    """Figures over all images: accuracy, averages over classes, calibration.

    Macro averages are over the classes that occur, as true or as predicted ones.

    Args:
        probabilities: [images, classes].
        targets: A class index per image, or a tuple of them.
        names: The classes.
        multi_label: Whether targets are tuples.
    """
    found, classes = torch.from_numpy(probabilities), len(names)
    if multi_label:
        truth = torch.zeros(found.shape, dtype=torch.long)
        for row, labels in zip(truth, targets, strict=True):
            row[list(labels)] = 1
        scores = multilabel_stat_scores(found, truth, classes, average=None)
        right = (found > 0.5) == truth.bool()
        loss = torch.nn.functional.binary_cross_entropy(found.double(), truth.double())
        figures = dict(
            map=100 * multilabel_average_precision(found, truth, classes).item(),
            exact=100 * right.all(dim=1).double().mean().item(),
            cross_entropy=loss.item(),
            ece=100 * binary_calibration_error(found.flatten(), truth.flatten(), n_bins=BINS).item(),
        )
        confusion, kept = None, torch.empty(0)
    else:
        truth = torch.as_tensor(targets, dtype=torch.long)
        scores = multiclass_stat_scores(found, truth, classes, average=None)
        order = found.topk(min(5, classes)).indices
        hits = order == truth[:, None]
        own = found.double().gather(1, truth[:, None]).clamp_min(torch.finfo(torch.float32).tiny)
        figures = dict(top1=100 * hits[:, 0].double().mean().item())
        if classes > 5:
            figures["top5"] = 100 * hits.any(dim=1).double().mean().item()
        confidence = found.gather(1, order[:, :1])[:, 0]
        figures |= dict(
            cross_entropy=-own.log().mean().item(),
            ece=100 * binary_calibration_error(*_as_binary(confidence, hits[:, 0]), n_bins=BINS).item(),
        )
        # Of the 21,841 classes of ImageNet-22k a whole matrix would take 4 GB.
        kept = torch.arange(classes) if classes <= _WHOLE_MATRIX else torch.cat([truth, order[:, 0]]).unique()
        places = (torch.searchsorted(kept, x.contiguous()) for x in (order[:, 0], truth))
        confusion = multiclass_confusion_matrix(*places, max(2, len(kept))).numpy()[: len(kept), : len(kept)]
    true_positives, false_positives, _, false_negatives, support = scores.double().unbind(dim=1)
    precision = true_positives / (true_positives + false_positives).clamp_min(1)
    recall = true_positives / support.clamp_min(1)
    f1 = 2 * true_positives / (2 * true_positives + false_positives + false_negatives).clamp_min(1)
    occurs = true_positives + false_positives + false_negatives > 0
    for name, values in (("macro_precision", precision), ("macro_recall", recall), ("macro_f1", f1)):
        figures[name] = 100 * values[occurs].mean().item()
    if multi_label:
        right, wrong = true_positives.sum(), (false_positives + false_negatives).sum()
        figures["micro_f1"] = 100 * (2 * right / (2 * right + wrong).clamp_min(1)).item()
    per_class = [
        {"class": n, "precision": 100 * p, "recall": 100 * r, "f1": 100 * f, "support": int(s)}
        for n, p, r, f, s in zip(names, precision.tolist(), recall.tolist(), f1.tolist(), support.tolist(), strict=True)
    ]
    kept_names = [names[i] for i in kept.tolist()]
    return Judgement(list(names), figures, per_class, confusion, kept_names, multi_label)


def _as_binary(confidence: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-1 calibration as that of a yes or no. torchmetrics takes a probability below one half for a no, so it is
    asked through the confidence alone, which it bins as it is."""
    return confidence.clamp(0, 1), right.long()


def mistakes(predictions: Predictions, targets: Sequence[int], names: Sequence[str]) -> list[dict]:
    """The images whose class was named wrongly, the surest first."""
    found = predictions.probabilities.argmax(axis=1)
    sure = predictions.probabilities.max(axis=1)
    wrong = [i for i in range(len(found)) if found[i] != targets[i]]
    return [
        {
            "image": predictions.images[i].name,
            "true": names[targets[i]],
            "predicted": names[found[i]],
            "probability": round(float(sure[i]), 4),
            "probability_of_true": round(float(predictions.probabilities[i, targets[i]]), 4),
            "index": i,
        }
        for i in sorted(wrong, key=lambda i: (-sure[i], i))
    ]


def write_report(
    folder: Path, predictions: Predictions, targets: Sequence, judgement: Judgement, more: dict | None = None
) -> None:
    """Writes metrics.json, per_class.csv, reliability.png, mistakes.csv and .png; for one label per image also
    confusion.csv and .png.

    Args:
        folder: Is made.
        predictions: Of the images.
        targets: What is true of them.
        judgement: From `judge`.
        more: More entries of metrics.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metrics = (more or {}) | judgement.figures | dict(images_per_second=predictions.images_per_second)
    metrics["images"] = len(predictions.images)
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2))
    write_atomically(folder / "per_class.csv", table(judgement.per_class))
    for name in ("confusion.csv", "confusion.png"):
        (folder / name).unlink(missing_ok=True)  # of an earlier report
    if judgement.confusion is not None:
        shown_names = [readable(name) for name in judgement.confusion_names]
        write_atomically(folder / "confusion.csv", _matrix(judgement))
        write_atomically(folder / "confusion.png", png(draw_confusion(judgement.confusion, shown_names)))
    answers = _answers(predictions, targets, judgement)
    write_atomically(folder / "reliability.png", png(draw_reliability(*answers, BINS)))
    find = label_mistakes if judgement.multi_label else mistakes
    wrong = find(predictions, targets, judgement.names)
    fields = ("label", "true", "probability")
    if not judgement.multi_label:
        fields = ("true", "predicted", "probability", "probability_of_true")
    rows = [{k: row[k] for k in ("image", *fields)} for row in wrong]
    write_atomically(folder / "mistakes.csv", table(rows, ("image", *fields)))
    shown = [(predictions.images[row["index"]], _caption(row)) for row in wrong[:_SHEET]]
    what = "answers are wrong" if judgement.multi_label else "images named wrongly"
    title = f"{len(wrong):,} of {len(answers[0]):,} {what}, the surest first"
    write_atomically(folder / "mistakes.png", png(draw_sheet(shown, title)))


def _answers(predictions: Predictions, targets: Sequence, judgement: Judgement) -> tuple[np.ndarray, np.ndarray]:
    """The probability of each answer, and whether it is true."""
    found = predictions.probabilities
    if judgement.multi_label:
        truth = np.zeros(found.shape, dtype=bool)
        for row, labels in zip(truth, targets, strict=True):
            row[list(labels)] = True
        return found.ravel(), truth.ravel()
    return found.max(axis=1), found.argmax(axis=1) == np.asarray(targets)


def label_mistakes(predictions: Predictions, targets: Sequence[Sequence[int]], names: Sequence[str]) -> list[dict]:
    """Labels that were given wrongly or missed, the surest first; the probability is that of the label."""
    rows = []
    for index, (found, labels) in enumerate(zip(predictions.probabilities, targets, strict=True)):
        truth = np.isin(np.arange(len(names)), list(labels))
        for label in np.flatnonzero((found > 0.5) != truth).tolist():
            true = "yes" if truth[label] else "no"
            row = {"image": predictions.images[index].name, "label": names[label], "true": true}
            rows.append({**row, "probability": round(float(found[label]), 4), "index": index})
    return sorted(rows, key=lambda row: -abs(row["probability"] - 0.5))


def _caption(row: dict) -> str:
    if "label" in row:
        return f"{'missed' if row['true'] == 'yes' else 'not'} {readable(row['label'])}\n{row['probability']:.0%}"
    return f"true {readable(row['true'])}\n{readable(row['predicted'])} {row['probability']:.0%}"


def _matrix(judgement: Judgement) -> str:
    """The confusion matrix as CSV: a column of the true classes, and one for each that was predicted."""
    rows = zip(judgement.confusion_names, judgement.confusion.tolist(), strict=True)
    return csv_text([["true", *judgement.confusion_names], *([name, *row] for name, row in rows)])


def table(rows: Sequence[dict], fields: Sequence[str] = ()) -> str:
    """Rows as CSV."""
    names = list(fields or rows[0])
    rounded = ([round(x, 4) if isinstance(x, float) else x for x in map(row.get, names)] for row in rows)
    return csv_text([names, *rounded])
