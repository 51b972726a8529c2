"""What a classifier's probabilities are worth: figures, tables and pictures."""

import csv
import io
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from timm.data import create_transform
from torch import nn
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_confusion_matrix,
    multiclass_stat_scores,
    multilabel_average_precision,
    multilabel_stat_scores,
)

from ..errors import UserError
from .decoding import Encoded
from .drawing import draw_confusion, draw_reliability, draw_sheet, png
from .images import ImageSet, make_loader, read_batches
from .models import PRECISIONS, readable
from .report import track
from .run_state import write_atomically

BINS = 15  # of the calibration error, as in Guo et al., arXiv:1706.04599
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
    """Runs a model over images.

    Raises:
        UserError: An image cannot be read; with skip_unreadable, none can.
    """
    device, unreadable = torch.device(device), []
    model = model.to(device).eval()
    image_set = ImageSet(images, None, data_config["input_size"][0], create_transform(**data_config))
    loader = make_loader(image_set, batch_size, workers)
    dtype = PRECISIONS[precision]
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    rows, kept, started, timed = [], [], time.perf_counter(), 0
    batches = read_batches(track(loader, description), unreadable.append if skip_unreadable else None)
    for number, (batch, indices) in enumerate(batches):
        with autocast:
            logits = model(batch.to(device))
        logits = logits.float()
        rows.append((logits.sigmoid() if multi_label else logits.softmax(dim=1)).cpu())
        kept += indices.tolist()
        if number + 1 == _WARM_UP < len(loader):
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
    """

    names: list[str]
    figures: dict[str, float]
    per_class: list[dict]
    confusion: np.ndarray | None


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
        )
        confusion = None
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
        confusion = multiclass_confusion_matrix(found, truth, classes).numpy()
    true_positives, false_positives, _, false_negatives, support = scores.double().unbind(dim=1)
    precision = true_positives / (true_positives + false_positives).clamp_min(1)
    recall = true_positives / support.clamp_min(1)
    f1 = 2 * true_positives / (2 * true_positives + false_positives + false_negatives).clamp_min(1)
    occurs = true_positives + false_positives + false_negatives > 0
    for name, values in (("macro_precision", precision), ("macro_recall", recall), ("macro_f1", f1)):
        figures[name] = 100 * values[occurs].mean().item()
    per_class = [
        {"class": n, "precision": 100 * p, "recall": 100 * r, "f1": 100 * f, "support": int(s)}
        for n, p, r, f, s in zip(names, precision.tolist(), recall.tolist(), f1.tolist(), support.tolist(), strict=True)
    ]
    return Judgement(list(names), figures, per_class, confusion)


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
    """Writes metrics.json and per_class.csv; for one label per image also confusion.csv and .png, reliability.png, and
    mistakes.csv and .png.

    Args:
        folder: Is made.
        predictions: Of the images.
        targets: What is true of them.
        judgement: From `judge`.
        more: More entries of metrics.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [readable(name) for name in judgement.names]
    metrics = (more or {}) | judgement.figures | dict(images_per_second=predictions.images_per_second)
    metrics["images"] = len(predictions.images)
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2))
    write_atomically(folder / "per_class.csv", table(judgement.per_class))
    if judgement.confusion is None:
        return
    rows = [{"true": n, **dict(zip(judgement.names, row.tolist(), strict=True))} for n, row in _rows(judgement)]
    write_atomically(folder / "confusion.csv", table(rows))
    write_atomically(folder / "confusion.png", png(draw_confusion(judgement.confusion, names)))
    right = predictions.probabilities.argmax(axis=1) == np.asarray(targets)
    confidence = predictions.probabilities.max(axis=1)
    write_atomically(folder / "reliability.png", png(draw_reliability(confidence, right, BINS)))
    wrong = mistakes(predictions, targets, judgement.names)
    fields = ("image", "true", "predicted", "probability", "probability_of_true")
    write_atomically(folder / "mistakes.csv", table([{k: row[k] for k in fields} for row in wrong], fields))
    shown = []
    for row in wrong[:24]:
        caption = f"true {readable(row['true'])}\n{readable(row['predicted'])} {row['probability']:.0%}"
        shown.append((predictions.images[row["index"]], caption))
    title = f"{len(wrong):,} of {len(targets):,} images named wrongly, the surest first"
    write_atomically(folder / "mistakes.png", png(draw_sheet(shown, title)))


def _rows(judgement: Judgement):
    return zip(judgement.names, judgement.confusion, strict=True)


def table(rows: Sequence[dict], fields: Sequence[str] = ()) -> str:
    """Rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()
