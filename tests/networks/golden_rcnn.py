"""The authors' detectors with the fixtures' weights, what they compute, and the golden values beside it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from nat_models.checkpoints.detection import convert_rcnn
from nat_models.networks.cascade_rcnn import cascade_mask_rcnn
from nat_models.networks.detector import Detector
from nat_models.networks.mask_rcnn import mask_rcnn
from nat_models.networks.rcnn import ProposalNetwork
from nat_models.networks.roi_heads import Stage
from tests.conftest import FIXTURES, tensor
from tests.fixtures.deterministic import downstream_parameter

KEYS = json.loads((FIXTURES / "detection_keys.json").read_text())
SIZE = (128, 160)
TINY = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
# Images as they are: their own size, and no normalisation.
AS_THEY_ARE = dict(min_size=128, image_mean=(0, 0, 0), image_std=(1, 1, 1))


def mmdet(system: str) -> dict[str, Tensor]:
    """A checkpoint of the authors, such as mask_rcnn_nat_mini."""
    return {key: torch.from_numpy(downstream_parameter(key, shape)) for key, shape in KEYS[system].items()}


def authors(system: str) -> Detector:
    name, backbone = system.split("_nat_")
    make = dict(mask_rcnn=mask_rcnn, cascade_mask_rcnn=cascade_mask_rcnn)[name]
    weights = dict(state_dict=mmdet(system), meta={})
    return make(f"nat_{backbone}", weights=weights, drop_path_rate=0.0, **AS_THEY_ARE)


def golden(name: str, prefix: str) -> dict[str, Tensor]:
    """Of a file, what stands below a prefix."""
    values = load_file(FIXTURES / f"{name}.safetensors")
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def image(dtype: torch.dtype) -> Tensor:
    return tensor("image_128x160_c", (1, 3, *SIZE)).to(dtype)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within a part of the largest magnitude."""
    limit = tolerance * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=limit)


@torch.no_grad()
def trunk(model: Detector, x: Tensor) -> dict:
    """Maps, and the proposal network's logits, deltas and anchors of each."""
    features = model.backbone(x)
    maps = list(features.values())
    logits, deltas = model.rpn.head(maps)
    (anchors,) = model.rpn.anchor_generator(ImageList(x, [SIZE]), maps)
    parts = anchors.split([3 * y.shape[2] * y.shape[3] for y in maps])
    return dict(features=features, rpn=[(a[0], b[0], c) for a, b, c in zip(logits, deltas, parts, strict=True)])


@torch.no_grad()
def detect(
    model: Detector, features: Mapping, x: Tensor, size: tuple[int, int] = SIZE, original: tuple[int, int] = SIZE
) -> dict:
    """Proposals and what becomes of them, on a batch of one; `size` is the image without its padding."""
    images = ImageList(x, [size])
    proposals, _ = model.rpn(images, features)
    (found,), _ = model.roi_heads(features, proposals, images.image_sizes)
    probability = found["masks"]
    (found,) = model.transform.postprocess([found], images.image_sizes, [original])
    return dict(proposals=proposals[0], probability=probability, **found)


def assert_pyramid(found: Mapping, expected: Mapping[str, Tensor], tolerance: float) -> None:
    for i, (x, (logits, deltas, anchors)) in enumerate(zip(found["features"].values(), found["rpn"], strict=True)):
        step, name = (4, 2, 1, 1, 1)[i], f"P{i + 2}"
        close(x[0, ::16, ::step, ::step], expected[f"fpn/{name}"], tolerance)
        close(x.mean((0, 2, 3)), expected[f"fpn/{name}/channel_mean"], tolerance)
        close(logits, expected[f"rpn/{name}/logits"], tolerance)
        close(deltas, expected[f"rpn/{name}/deltas"], tolerance)
        close(torch.cat([anchors[:6], anchors[-6:]]), expected[f"rpn/{name}/anchors"], 0.0)


def assert_detections(found: Mapping, expected: Mapping[str, Tensor], pixels: float, score: float, area: int) -> None:
    torch.testing.assert_close(
        found["proposals"], expected["proposals"][:, :4].to(found["proposals"].dtype), rtol=0, atol=pixels
    )
    torch.testing.assert_close(found["boxes"], expected["boxes"].to(found["boxes"].dtype), rtol=0, atol=pixels)
    torch.testing.assert_close(found["scores"], expected["scores"].to(found["scores"].dtype), rtol=0, atol=score)
    assert found["labels"].tolist() == expected["labels"].tolist()
    cells = found["probability"][:, 0, 1::4, 1::4]
    torch.testing.assert_close(cells, expected["mask_probability"].to(cells.dtype), rtol=0, atol=score)
    masks = found["masks"][:, 0] >= 0.5
    assert (masks.flatten(1).sum(1) - expected["mask_area"]).abs().max() <= area
    packed = torch.from_numpy(np.packbits(masks[:4].numpy(), axis=-1))
    if area == 0:
        assert torch.equal(packed, expected["masks_packed"])


def targets(dtype: torch.dtype) -> list[dict]:
    """The true boxes of the fixtures' training."""
    masks = torch.zeros(2, *SIZE, dtype=torch.uint8)
    masks[0, 58:88, 10:84] = 1
    masks[1, 30:96, 76:130] = 1
    boxes = torch.tensor([[7.25, 56.5, 88.75, 88.25], [71.25, 28.5, 133.75, 99.25]], dtype=dtype)
    return [dict(boxes=boxes, labels=torch.tensor([17, 56]), masks=masks)]


@contextmanager
def deterministic_sampling() -> Iterator[None]:
    """A sample of k is the first k of NumPy's frozen permutation."""

    def permutation(n: int, device: torch.device | None = None) -> Tensor:
        return torch.from_numpy(np.random.RandomState(0).permutation(n)).to(device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", permutation)
        yield


def train(model: Detector, x: Tensor) -> dict:
    """Losses by our names, those of the proposal network by level, samples and gradients by the authors' names."""
    stages, anchors = [], []
    of_stage, of_anchors = Stage.losses, ProposalNetwork.losses_of_anchors

    def keep_stage(self, logits, deltas, samples):
        labels = samples[0].labels
        accuracy = 100 * (logits.argmax(1) == labels).double().mean()
        stages.append(dict(rois=samples[0].boxes, samples=_counts(labels < 80), accuracy=accuracy))
        return of_stage(self, logits, deltas, samples)

    def keep_anchors(self, *args):
        anchors.extend(of_anchors(self, *args))
        return anchors

    with deterministic_sampling(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "losses", keep_stage)
        patch.setattr(ProposalNetwork, "losses_of_anchors", keep_anchors)
        losses = model(list(x), targets(x.dtype))
    sum(losses.values()).backward()
    index, loss, box_index, box_loss = anchors
    gradients = convert_rcnn({name: p.grad for name, p in model.named_parameters()}, "original")
    return dict(
        losses=losses,
        levels=dict(loss_rpn_cls=_by_level(index, loss), loss_rpn_bbox=_by_level(box_index, box_loss)),
        rpn_samples=[len(box_index), len(index) - len(box_index)],
        stages=stages,
        gradients=gradients,
    )


def _counts(positive: Tensor) -> list[int]:
    return [int(positive.sum()), int((~positive).sum())]


def _by_level(index: Tensor, loss: Tensor) -> Tensor:
    """Sums over the five maps of a 128 x 160 image."""
    ends = torch.tensor([3 * h * w for h, w in ((32, 40), (16, 20), (8, 10), (4, 5), (2, 3))]).cumsum(0)
    return torch.zeros(5, dtype=loss.dtype).index_add(0, torch.bucketize(index, ends, right=True), loss.detach())


def assert_training(found: Mapping, expected: Mapping[str, Tensor], names: Mapping[str, str], rel: float) -> None:
    """`names` are the authors' of the stages' losses and ours."""
    for name, levels in found["levels"].items():
        assert levels.tolist() == pytest.approx(expected[name].tolist(), rel=rel), name
    for theirs, ours in names.items():
        assert found["losses"][ours].item() == pytest.approx(expected[theirs].item(), rel=rel), theirs
    assert len(found["losses"]) == len(names) + 2
    assert sum(found["losses"].values()).item() == pytest.approx(expected["total"].item(), rel=rel)
    assert found["rpn_samples"] == expected["rpn_samples"].tolist()
    for i, stage in enumerate(found["stages"]):
        assert stage["samples"] == expected[f"stage{i}/samples"].tolist()
        if f"stage{i}/rois" in expected:
            close(stage["rois"], expected[f"stage{i}/rois"], 1e-6)
        accuracy = expected["acc" if len(found["stages"]) == 1 else f"s{i}.acc"]
        assert stage["accuracy"].item() == pytest.approx(accuracy.item())


def assert_gradients(found: Mapping, expected: Mapping[str, Tensor], count: int, rel: float) -> None:
    norms = {k.removeprefix("gradient_norm/"): v for k, v in expected.items() if k.startswith("gradient_norm/")}
    assert len(norms) == count
    for key, norm in norms.items():
        assert found["gradients"][key].norm().item() == pytest.approx(norm.item(), rel=rel), key
