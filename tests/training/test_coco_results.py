"""Promises of average precision: it is COCO's, whatever evaluates it, and the truth has all of it."""

import math

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics.detection import MeanAveragePrecision

from nat_models.training.box_sets import BoxSet, make_box_evaluation
from nat_models.training.boxes import read_box_data
from nat_models.training.coco_results import CocoMetrics
from nat_models.training.instance_masks import InstanceMasks
from nat_models.training.outlines import Outlines, encode
from tests.training.boxed import put_roboflow

CLASSES = ["cat", "cow", "dog"]
SIZE = (160, 200)
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def drawn(boxes: np.ndarray, rng) -> np.ndarray:
    """[N, H, W] bool: the boxes, less a corner each."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    masks = [(x > x1) & (x < x2) & (y > y1) & (y < y2) & (x - x1 + y - y1 > 4) for x1, y1, x2, y2 in boxes]
    return np.array(masks, bool).reshape(-1, *SIZE)


def made(seed: int = 0, images: int = 12) -> tuple[list[dict], list[dict]]:
    """Predictions and targets of images: objects of every size, crowds, hits, near misses, false ones, ties."""
    rng, predictions, targets, number = np.random.default_rng(seed), [], [], 1
    for image_id in range(images):
        count = int(rng.integers(0, 7))
        corner, sides = (
            rng.uniform(0, 90, (count, 2)),
            rng.uniform(8, 110, (count, 2)) * rng.choice([0.3, 1], (count, 1)),
        )
        boxes = np.concatenate([corner, np.minimum(corner + sides, SIZE[::-1])], axis=1).round(1)
        labels, crowd = rng.integers(0, 3, count), rng.random(count) < 0.15
        masks = drawn(boxes, rng)
        targets.append(
            dict(
                boxes=torch.from_numpy(boxes).float(),
                labels=torch.from_numpy(labels),
                iscrowd=torch.from_numpy(crowd),
                area=torch.from_numpy(masks.sum((1, 2)).astype(np.float64)),
                annotation_ids=torch.arange(number, number + count),
                image_id=image_id,
                masks=InstanceMasks(Outlines.of([encode(mask) for mask in masks]), SIZE),
            )
        )
        number += count
        shifted = np.concatenate([boxes + rng.normal(0, 3, boxes.shape), rng.uniform(0, 100, (2, 4))])
        shifted = np.concatenate([shifted[:, :2], np.maximum(shifted[:, 2:], shifted[:, :2] + 2)], axis=1)
        guessed = np.concatenate([np.where(rng.random(count) < 0.8, labels, 0), rng.integers(0, 3, 2)])
        predictions.append(
            dict(
                boxes=torch.from_numpy(shifted).float(),
                labels=torch.from_numpy(guessed),
                scores=torch.from_numpy(rng.random(count + 2).round(1)).float(),
                masks=torch.from_numpy(drawn(shifted, rng))[:, None].float() * 0.9,
            )
        )
    return predictions, targets


def by_pycocotools(predictions, targets, kind: str) -> list[float]:
    """AP, AP50, AP75, and AP of small, medium and large objects."""

    def entries(found, image_id):
        for i, (x1, y1, x2, y2) in enumerate(found["boxes"].double().tolist()):
            entry = dict(image_id=image_id, category_id=int(found["labels"][i]), bbox=[x1, y1, x2 - x1, y2 - y1])
            mask = found["masks"].dense()[i] if is_truth else found["masks"][i, 0] >= 0.5
            if kind == "segm":
                entry["segmentation"] = dict(size=list(SIZE), counts=encode(mask.numpy()))
                if not is_truth:
                    del entry["bbox"]
            yield i, entry

    is_truth, annotations = True, []
    for target in targets:
        for i, entry in entries(target, target["image_id"]):
            extra = dict(iscrowd=int(target["iscrowd"][i]), area=float(target["area"][i]), id=len(annotations) + 1)
            annotations.append(entry | extra)
    truth = COCO()
    truth.dataset = dict(
        images=[dict(id=x["image_id"], height=SIZE[0], width=SIZE[1]) for x in targets],
        categories=[dict(id=i, name=name) for i, name in enumerate(CLASSES)],
        annotations=annotations,
    )
    truth.createIndex()
    is_truth, results = False, []
    for prediction, target in zip(predictions, targets, strict=True):
        for i, entry in entries(prediction, target["image_id"]):
            results.append(entry | dict(score=float(prediction["scores"][i])))
    evaluator = COCOeval(truth, truth.loadRes(results), kind)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator.stats[:6].tolist()


def measured(predictions, targets, **kwargs) -> dict[str, float]:
    metrics = CocoMetrics(CLASSES, True, **kwargs)
    for prediction, target in zip(predictions, targets, strict=True):
        metrics.update([prediction], [target])
    return metrics.compute()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_pycocotools(seed):
    predictions, targets = made(seed)
    figures = measured(predictions, targets)
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        expected = by_pycocotools(predictions, targets, name)
        found = [figures[f"{kind}_{figure}"] / 100 for figure in FIGURES]
        assert found == pytest.approx([x if x > -1 else math.nan for x in expected], abs=5e-4, nan_ok=True)
        assert 0.05 < found[0] < 0.95


def test_average_precision_is_torchmetrics():
    predictions, targets = made(3)
    metric = MeanAveragePrecision(iou_type="bbox", backend="faster_coco_eval", class_metrics=True)
    metric.update(predictions, [{k: v for k, v in x.items() if k != "masks"} for x in targets])
    expected, found = metric.compute(), measured(predictions, targets)
    assert found["box_ap"] / 100 == pytest.approx(expected["map"].item(), abs=1e-6)
    classes = [found[f"box_ap {name}"] / 100 for name in CLASSES]
    assert classes == pytest.approx(expected["map_per_class"].tolist(), abs=1e-6)


def predicted(target: dict) -> dict:
    """The truth as a prediction; crowds are none."""
    kept = ~target["iscrowd"]
    return dict(
        boxes=target["boxes"][kept],
        labels=target["labels"][kept],
        scores=torch.ones(int(kept.sum())),
        masks=target["masks"][kept],
    )


@pytest.mark.parametrize("shape", ["made", "read"])
def test_the_truth_has_all_of_it(tmp_path, shape):
    if shape == "made":
        _, targets = made(1, 20)
    else:
        data = read_box_data(put_roboflow(tmp_path))
        items = BoxSet(data.parts["train"], data.masks, make_box_evaluation())
        targets = [items[i][1] for i in range(len(items))]
    figures = measured([predicted(target) for target in targets], targets)
    known = {name: value for name, value in figures.items() if value == value}
    assert {"box_ap", "mask_ap", "box_ar", "mask_ap dog", "box_ap_small"} <= set(known)
    assert list(known.values()) == pytest.approx([100.0] * len(known))


def test_a_crowd_is_neither_an_object_nor_background():
    _, targets = made(1, 4)
    target = next(x for x in targets if len(x["labels"]) > 2)
    target["iscrowd"][:] = torch.arange(len(target["labels"])) == 0
    sure = predicted(target)
    # A prediction on the crowd is no error, and to miss it is none.
    on_it = {key: torch.cat([value, value[:1]]) for key, value in sure.items() if key != "masks"}
    on_it["boxes"][-1], on_it["labels"][-1] = target["boxes"][0], target["labels"][0]
    for prediction in (sure, on_it):
        metrics = CocoMetrics(CLASSES, False)
        metrics.update([prediction], [target])
        assert metrics.compute()["box_ap"] == pytest.approx(100.0)
    target["iscrowd"][0] = False
    metrics = CocoMetrics(CLASSES, False)
    metrics.update([sure], [target])
    assert metrics.compute()["box_ap"] < 100


def test_ids_and_order_of_categories_change_no_precision(tmp_path):
    found = []
    for name, ids in (("a", None), ("b", {"val": {"dog": 90, "cow": 0, "cat": 7}})):
        data = read_box_data(put_roboflow(tmp_path / name, ids=ids))
        items = BoxSet(data.parts["val"], data.masks, make_box_evaluation())
        targets = [items[i][1] for i in range(len(items))]
        predictions = [dict(predicted(x), boxes=predicted(x)["boxes"] + 3) for x in targets]
        found.append(measured(predictions, targets))
    assert found[0] == pytest.approx(found[1], nan_ok=True) and 0 < found[0]["box_ap"] < 100


def test_max_dets_is_of_an_image_and_class():
    boxes = torch.tensor([[10.0 * i, 10, 10 * i + 8, 30] for i in range(6)])
    target = dict(boxes=boxes, labels=torch.zeros(6, dtype=torch.int64), iscrowd=torch.zeros(6, dtype=torch.bool))
    target |= dict(area=torch.full((6,), 160.0), image_id=5)
    prediction = dict(boxes=boxes, labels=target["labels"], scores=torch.rand(6))
    recalls = []
    for max_dets in (3, 6, 100):
        metrics = CocoMetrics(CLASSES, False, max_dets=max_dets)
        metrics.update([prediction], [target])
        recalls.append(metrics.compute()["box_ar"])
    assert recalls == pytest.approx([50, 100, 100])


def test_nothing_predicted_is_0_and_nothing_true_is_unknown():
    _, targets = made(1, 4)
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0))
    empty["masks"] = torch.zeros(0, 1, *SIZE)
    figures = measured([empty] * len(targets), targets)
    assert figures["box_ap"] == 0 == figures["mask_ap"]
    nothing = dict(predicted(targets[0]), image_id=0)
    kept = torch.zeros(len(nothing["labels"]), dtype=torch.bool)
    none = dict(empty, image_id=0, iscrowd=kept[:0], area=torch.zeros(0), masks=InstanceMasks(Outlines.of([]), SIZE))
    assert math.isnan(measured([predicted(targets[0])], [none])["box_ap"])
    assert math.isnan(measured([empty], [none])["mask_ap"])


def _part_of(rank: int, store: str, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    predictions, targets = made(4)
    metrics = CocoMetrics(CLASSES, True)
    # The first process has all images but one, in another order; and one process may have none.
    own = [slice(11, 0, -1), slice(0, 1)][rank]
    metrics.update(predictions[own], targets[own])
    nothing = CocoMetrics(CLASSES, True)
    if rank:
        nothing.update(predictions, targets)
    results.put((rank, metrics.compute(), nothing.compute()))
    torch.distributed.destroy_process_group()


def test_processes_with_unequal_numbers_of_images_measure_what_one_does(tmp_path):
    context = torch.multiprocessing.get_context("fork")  # which need not import PyTorch again
    results = context.SimpleQueue()
    workers = [context.Process(target=_part_of, args=(rank, str(tmp_path / "store"), results)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    expected = measured(*made(4))
    for _ in workers:
        _, shared, one_sided = results.get()
        assert shared == pytest.approx(expected, nan_ok=True, abs=1e-9)
        assert one_sided == pytest.approx(expected, nan_ok=True, abs=1e-9)


def test_memory_is_that_of_run_lengths():
    predictions, targets = made(0)
    metrics = CocoMetrics(CLASSES, True)
    metrics.update(predictions, targets)
    dense = sum(len(x["labels"]) for x in (*predictions, *targets)) * SIZE[0] * SIZE[1]
    held = sum(len(code) for x in (*metrics.predicted, *metrics.true) for code in x.codes)
    assert held < dense / 50
