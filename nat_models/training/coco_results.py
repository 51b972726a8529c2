"""COCO's average precision of boxes and masks, by faster-coco-eval, over a stream of images.

torchmetrics' MeanAveragePrecision calls the same evaluator. It is not used, because it takes masks as dense tensors
alone, and its sums over processes wait for ever where these hold unequal numbers of images.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn

from .instance_masks import InstanceMasks
from .outlines import encode

_SIZES = ("small", "medium", "large")  # below 32 x 32 px, below 96 x 96 px, and above
_KINDS = {"box": "bbox", "mask": "segm"}


class Found(NamedTuple):
    """Objects of an image, true or predicted.

    Attributes:
        image_id: Of the image.
        size: (height, width) px of masks; None without masks.
        boxes: [N, 4] float32, (x1, y1, x2, y2) px.
        labels: [N] int64.
        scores: [N] of what is predicted, areas in px of what is true.
        crowd: [N] bool.
        codes: Compressed run lengths of N masks; none without masks.
    """

    image_id: int
    size: tuple[int, int] | None
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    crowd: np.ndarray
    codes: list[bytes]


@dataclass
class Precisions:
    """What COCO's evaluator says of boxes or of masks, by class; -1 where a class has no true object.

    Attributes:
        precision: [10, 101, C]: at the IoU thresholds 0.50, 0.55, ... 0.95 and the recalls 0, 0.01, ... 1.
        recall: [10, C]: the greatest, at max_dets.
        scores: [10, 101, C]: the score from which on that recall is reached.
        by_size: For small, medium and large objects, precision as above.
    """

    precision: np.ndarray
    recall: np.ndarray
    scores: np.ndarray
    by_size: dict[str, np.ndarray]

    @property
    def per_class(self) -> np.ndarray:
        """[C] AP in percent; nan for a class without a true object."""
        return np.array([mean_precision(self.precision[..., i]) for i in range(self.precision.shape[-1])])

    def figures(self, kind: str) -> dict[str, float]:
        """AP, AP50, AP75, AP by size, and the average recall, in percent; nan where there is no true object."""
        result = {
            f"{kind}_ap": mean_precision(self.precision),
            f"{kind}_ap50": mean_precision(self.precision[0]),
            f"{kind}_ap75": mean_precision(self.precision[5]),
        }
        result |= {f"{kind}_ap_{size}": mean_precision(self.by_size[size]) for size in _SIZES}
        return result | {f"{kind}_ar": mean_precision(self.recall)}


class CocoMetrics(nn.Module):
    """Average precision of boxes, and of masks, in percent, over all images of all processes.

    Memory grows with the number of objects alone: masks are kept as run lengths. What is a crowd is neither an object
    nor background, and true areas are those of the annotations, as in COCO.

    Args:
        classes: Names; those of more than `listed` are not told one by one.
        masks: Whether masks are measured besides boxes.
        max_dets: Predictions of an image and class that count, those of the greatest scores.
        listed: See classes.
    """

    def __init__(self, classes: Sequence[str], masks: bool, *, max_dets: int = 100, listed: int = 30):
        super().__init__()
        self.classes, self.masks, self.max_dets, self.listed = list(classes), masks, max_dets, listed
        self.true: list[Found] = []
        self.predicted: list[Found] = []

    def update(self, predictions: Sequence[Mapping], targets: Sequence[Mapping]) -> None:
        """Counts images.

        Args:
            predictions: Of each image boxes [N, 4], labels [N] and scores [N]; masks too where they are measured:
                [N, H, W] or [N, 1, H, W], bool or from 0 to 1 (0.5 is inside), or InstanceMasks, or a list of
                compressed run lengths.
            targets: What BoxSet gives for evaluation; all in pixels of the image's file, upright.
        """
        for prediction, target in zip(predictions, targets, strict=True):
            image_id = int(target["image_id"])
            nothing = np.zeros(len(prediction["labels"]), bool)
            self.predicted.append(self._found(image_id, prediction, prediction["scores"], nothing))
            crowd = target["iscrowd"].cpu().numpy().astype(bool)
            self.true.append(self._found(image_id, target, target["area"], crowd))

    def _found(self, image_id: int, given: Mapping, numbers: Tensor, crowd: np.ndarray) -> Found:
        boxes = given["boxes"].detach().float().cpu().numpy().reshape(-1, 4)
        labels, numbers = given["labels"].cpu().numpy(), numbers.detach().double().cpu().numpy()
        size, codes = _codes(given["masks"]) if self.masks else (None, [])
        return Found(image_id, size, boxes, labels, numbers, crowd, codes)

    def details(self) -> dict[str, Precisions]:
        """Of boxes ("box") and masks ("mask") what the evaluator says, the same in all processes."""
        true, predicted = (_gather(x) for x in (self.true, self.predicted))
        kinds = ("box", "mask") if self.masks else ("box",)
        return {kind: _evaluate(true, predicted, len(self.classes), kind, self.max_dets) for kind in kinds}

    def compute(self) -> dict[str, float]:
        """The figures of Precisions for boxes and masks, and the AP of each class unless there are many."""
        figures = {}
        for kind, found in self.details().items():
            figures |= found.figures(kind)
            if len(self.classes) <= self.listed:
                figures |= dict(zip((f"{kind}_ap {x}" for x in self.classes), found.per_class.tolist(), strict=True))
        return figures


def mean_precision(values: np.ndarray) -> float:
    """The mean in percent of values in [0, 1], without those of -1, COCO's for nothing to find; nan if all are."""
    known = values[values > -1]
    return 100 * float(known.mean()) if known.size else float("nan")


def _codes(masks: Tensor | InstanceMasks | Sequence) -> tuple[tuple[int, int] | None, list[bytes]]:
    if isinstance(masks, InstanceMasks):
        return masks.canvas, masks.codes()
    if isinstance(masks, Tensor):
        masks = masks.detach().reshape(len(masks), *masks.shape[-2:])
        inside = (masks if not masks.is_floating_point() else masks >= 0.5).bool()
        return tuple(masks.shape[-2:]), [encode(mask.cpu().numpy()) for mask in inside]
    return None, list(masks)


def _gather(found: list[Found]) -> list[Found]:
    """Those of all processes, in the order of the images."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, found)
        found = [x for part in parts for x in part]
    return sorted(found, key=lambda x: x.image_id)


def _evaluate(
    true: Sequence[Found], predicted: Sequence[Found], num_classes: int, kind: str, max_dets: int
) -> Precisions:
    from faster_coco_eval import COCO, COCOeval_faster

    sizes = {x.image_id: x.size for x in true}
    images = [
        dict(id=image_id, height=(size or (1, 1))[0], width=(size or (1, 1))[1]) for image_id, size in sizes.items()
    ]
    # An evaluator takes an id of 0 for "not matched"; its own ids begin at 1.
    annotations = list(_entries(true, kind, sizes))
    for number, entry in enumerate(annotations, 1):
        entry["id"], entry["area"] = number, entry.pop("score")
    categories = [dict(id=i, name=str(i)) for i in range(num_classes)]
    truth = COCO(dict(images=images, annotations=annotations, categories=categories))
    entries = list(_entries(predicted, kind, sizes))
    for entry in entries:
        if kind == "mask":
            del entry["bbox"]  # with which its area would be the box's
    nothing = COCO(dict(images=images, annotations=[], categories=categories))
    results = truth.loadRes(entries) if entries else nothing
    evaluator = COCOeval_faster(truth, results, iouType=_KINDS[kind], print_function=_say_nothing)
    evaluator.params.maxDets = sorted({1, 10, max_dets})
    evaluator.evaluate()
    evaluator.accumulate()
    place = evaluator.params.maxDets.index(max_dets)
    precision = np.asarray(evaluator.eval["precision"])  # [T, R, K, A, M]
    scores, recall = np.asarray(evaluator.eval["scores"]), np.asarray(evaluator.eval["recall"])
    return Precisions(
        precision=precision[..., 0, place],
        recall=recall[..., 0, place],
        scores=scores[..., 0, place],
        by_size={size: precision[..., i, place] for i, size in enumerate(_SIZES, 1)},
    )


def _entries(found: Sequence[Found], kind: str, sizes: Mapping[int, tuple[int, int] | None]) -> Iterable[dict]:
    """What COCO's evaluator calls annotations; an area stands where it has a score."""
    for image in found:
        for i, (x1, y1, x2, y2) in enumerate(image.boxes.astype(np.float64).tolist()):
            entry = dict(
                image_id=image.image_id,
                category_id=int(image.labels[i]),
                bbox=[x1, y1, x2 - x1, y2 - y1],
                score=float(image.scores[i]),
                iscrowd=int(image.crowd[i]),
            )
            if kind == "mask":
                entry["segmentation"] = {"size": list(sizes[image.image_id]), "counts": image.codes[i]}
            yield entry


def _say_nothing(*_) -> None:
    pass
