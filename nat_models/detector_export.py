"""One file that runs a detector without this package: ONNX, torch.export or TorchScript.

The file maps "image", [1, C, H, W] in float32, resized and normalised as its metadata say, to "boxes" [N, 4] in pixels
of that image, "labels" [N], "scores" [N] and, of a detector with mask heads, "masks" [N, 1, 28, 28], probabilities on
the boxes; N is at most the detector's box_detections_per_img and may be 0. Thresholds are the detector's. Its metadata
are those of other models' files (nat_models.export) and "category_ids", a JSON list: of label i, label_names[i] is the
name and category_ids[i] the number.
"""

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from .errors import UserError
from .export import (
    KEYS,
    Exported,
    check_metadata,
    check_output,
    load_onnx,
    load_pt2,
    load_torchscript,
    require_onnx,
    save_onnx,
    write_file,
    write_torchscript,
)
from .fuse import fold_batch_norms
from .networks.detector import Detector
from .networks.detector_graph import Detections, DetectorGraph
from .ops import use_backend

OPSET = 21  # onnxruntime 1.32 has no RoiAlign of opset 22
DETECTOR_KEYS = (*KEYS, "category_ids")
FORMATS = ("onnx", "pt2", "torchscript")
_LEAST_SIZE = 33  # px; below, a map has one row or one column, of which torch.export makes another graph
# A detection of the file is one of the network's where IoU and difference of scores are within these. float32 sums in
# another order move both by 1e-5; and where two boxes are nearly tied, another one of them is kept.
_SAME_IOU, _SAME_SCORE = 0.99, 1e-3
_LEAST_MATCHED = 0.95  # share of detections


class Agreement(NamedTuple):
    """How what a file finds differs from what the network finds.

    Attributes:
        found: Detections of both, together.
        matched: Those that have a counterpart.
        box: Largest difference of a matched box, px.
        score: Of a score.
        mask: Of a mask's probability.
    """

    found: int
    matched: int
    box: float
    score: float
    mask: float


def capture(graph: DetectorGraph, image: Tensor, dynamic_size: bool) -> ExportedProgram:
    """The graph, in which with dynamic_size height and width are symbols."""
    dynamic = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if dynamic_size else None
    with torch.fx.experimental._config.patch(backed_size_oblivious=dynamic_size), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`create_unbacked_symint` is deprecated", FutureWarning)  # torchvision's
        return torch.export.export(graph, (image,), dynamic_shapes=(dynamic,), strict=False)


def _write(
    graph: DetectorGraph,
    image: Tensor,
    format: str,
    dynamic_size: bool,
    metadata: dict[str, str],
    custom_op: bool,
    path: Path,
) -> None:
    if format == "torchscript":
        # What a size is in a trace, torchvision makes a tensor of once more; and a second trace would take as long.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "To copy construct from a tensor", UserWarning)
            return write_torchscript(graph, image, True, metadata, path, check_trace=False)
    with use_backend("blocked") if custom_op else nullcontext():
        program = capture(graph, image, dynamic_size)
    if format == "pt2":
        return torch.export.save(program, path, extra_files=metadata)
    names = Detections._fields if graph.roi_heads.has_mask() else Detections._fields[:3]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*sampling_ratio", UserWarning)  # ONNX writes 0 for it, and means the same
        save_onnx(program, names, OPSET, metadata, path, custom_op)


def load_detections(path: Path, format: str) -> Exported:
    """A file that export_detector wrote; its `run` gives the tensors of networks.detector_graph.Detections."""
    if format == "onnx":
        return load_onnx(path)
    return dict(pt2=load_pt2, torchscript=load_torchscript)[format](path, DETECTOR_KEYS)


@torch.no_grad()
def detect(detector: Detector, image: Tensor) -> Detections:
    """What a detector in evaluation finds in one image [1, C, H, W] that is resized and normalised already."""
    height, width = image.shape[-2:]
    step = detector.transform.size_divisible
    padded = F.pad(image, (0, -width % step, 0, -height % step))
    features = detector.backbone(padded)
    proposals, _ = detector.rpn(ImageList(padded, [(height, width)]), features)
    (found,), _ = detector.roi_heads(features, proposals, [(height, width)])
    return Detections(found["boxes"], detector.label_ids[found["labels"]], found["scores"], found.get("masks"))


def compare(found: Detections, expected: Detections) -> Agreement:
    """Pairs the detections of one image: of one label, with the largest IoU."""
    if not len(found.scores) or not len(expected.scores):
        return Agreement(len(found.scores) + len(expected.scores), 0, 0.0, 0.0, 0.0)
    other = (found.labels[:, None] != expected.labels) | (found.scores[:, None] - expected.scores).abs().ge(_SAME_SCORE)
    iou = box_iou(found.boxes, expected.boxes).masked_fill(other, -1)
    matched = sum(int((iou.max(dim).values >= _SAME_IOU).sum()) for dim in (0, 1))
    best, theirs = iou.max(1)
    (ours,) = torch.where(best >= _SAME_IOU)
    pairs = [
        (a[ours], b[theirs[ours]]) for a, b in zip(found, expected, strict=True) if a is not None and b is not None
    ]
    box, _, score, *mask = ((a - b).abs().max().item() if len(ours) else 0.0 for a, b in pairs)
    return Agreement(len(found.scores) + len(expected.scores), matched, box, score, *(mask or [0.0]))


def random_images(channels: int, sizes: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """Two images [1, channels, H, W] of each size: noise, and blobs."""
    for size in sizes:
        yield torch.randn(1, channels, *size)
        yield 3 * F.interpolate(torch.randn(1, channels, 6, 8), size, mode="bilinear")


def agreement(run: Callable[[Tensor], tuple[Tensor, ...]], detector: Detector, images: Iterable[Tensor]) -> Agreement:
    """Agreement over images [1, C, H, W]."""
    each = []
    for image in images:
        outputs = run(image)
        each.append(compare(Detections(*outputs, *[None] * (4 - len(outputs))), detect(detector, image)))
    found, matched, *differences = zip(*each, strict=True)
    return Agreement(sum(found), sum(matched), *map(max, differences))


@torch.no_grad()
def export_detector(
    detector: Detector,
    output: Path,
    *,
    format: str,
    name: str,
    size: Sequence[int],
    dynamic_size: bool = False,
    check: bool = False,
    check_images: Sequence[Tensor] | None = None,
    preprocessing: Mapping | None = None,
    labels: Sequence[str] = (),
    category_ids: Sequence[int] = (),
    custom_op: bool = False,
) -> None:
    """Writes the file and, if asked to, compares what it finds with what the detector finds.

    Args:
        detector: In evaluation, on the CPU.
        output: The file to write; ends in the format's suffix.
        format: onnx, pt2 or torchscript.
        name: What the metadata call the model.
        size: Height and width, px.
        dynamic_size: Take any height and width from 33 px (TorchScript always does).
        check: Load the file, run it, and print how many detections agree and how they differ.
        check_images: [C, H, W], resized and normalised, to run it on; None for random ones of the sizes that it takes.
        preprocessing: What the metadata say of it beside "input_size".
        labels: Names of the classes.
        category_ids: Their numbers.
        custom_op: As in nat_models.export.

    Raises:
        UserError: The output or the size is none for the format, a package is missing, or the check fails: detections
            differ, or there is none to compare.
    """
    check_output(output, format, dynamic_size, custom_op)
    if format not in FORMATS:
        raise UserError(f"A detector is exported to {', '.join(FORMATS)}, not {format}.")
    if min(size) < _LEAST_SIZE:
        raise UserError(f"A detector is exported for images from {_LEAST_SIZE} px, got {size[0]}x{size[1]}.")
    if format == "onnx":
        require_onnx()
    shape = (detector.backbone.body.in_chans, *size)
    preprocessing = dict(input_size=shape, interpolation="bilinear", **(preprocessing or {}))
    contents = (name, *map(json.dumps, (preprocessing, list(labels), list(category_ids))))
    metadata = dict(zip(DETECTOR_KEYS, contents, strict=True))
    folded = copy.deepcopy(detector)
    fold_batch_norms(folded)  # torch.export asks of what they get whether it is empty
    graph = DetectorGraph(folded)
    arguments = (graph, torch.randn(1, *shape), format, dynamic_size, metadata, custom_op)
    write_file(output, partial(_write, *arguments))
    if not check:
        return
    exported = load_detections(output, format)
    check_metadata(exported, metadata)
    if check_images is not None:
        on, images = f"on {len(check_images)} images", (image[None] for image in check_images)
    else:
        sizes = [size, *([(160, 288), (96, 96), (75, 107)] if dynamic_size else [])]
        on, images = f"at {', '.join(f'{h}x{w}' for h, w in sizes)}", random_images(shape[0], sizes)
    seen = agreement(exported.run, detector, images)
    print(
        f"{on}: {seen.matched} of {seen.found} detections of file and network "
        f"agree; largest differences: box {seen.box:.1e} px, score {seen.score:.1e}, mask {seen.mask:.1e}",
        flush=True,
    )
    if not seen.found:
        advice = "give --check-images with objects" if check_images is None else "give others"
        raise UserError(f"Neither file nor network finds anything {on}, so nothing was compared: {advice}.")
    if seen.matched < _LEAST_MATCHED * seen.found:
        raise UserError(
            f"At least {_LEAST_MATCHED:.0%} of the detections must agree, got {seen.matched} of {seen.found}."
        )
