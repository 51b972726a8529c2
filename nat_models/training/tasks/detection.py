"""Detection: boxes, classes and masks of objects, by Mask R-CNN or Cascade Mask R-CNN."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...networks.detector import DetectorSettings
from ..anchors import ANCHOR_SIZES, note_anchors
from ..backbones import backbone_kwargs, mean_and_std, synchronised, weights_kwargs
from ..box_sets import LONG_SIDE, SHORT_SIDES, BoxSet, make_box_augmentation, make_box_evaluation
from ..boxes import count_objects, read_box_data
from ..cards import facts_of, model_card
from ..coco_results import CocoMetrics
from ..detecting import detect
from ..detectors import SYSTEMS, DetectorConfig, save_detector
from ..settings import Settings, option

_LISTED = 30  # classes whose AP is told epoch by epoch
_FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar")
# What the task sets itself among the detector's settings.
_OWN = {"min_size", "max_size", "image_mean", "image_std", "resize_in_training", "anchor_sizes"}
_OWN |= {"box_score_thresh", "box_detections_per_img"}


@dataclass(frozen=True)
class DetectionSettings(Settings):
    """The engine's settings, and those of detection alone."""

    system: str = option("mask_rcnn", "mask_rcnn or cascade_mask_rcnn")
    weights: str | None = option(None, "start from this detector, mmdetection's or ours")
    masks: bool = option(True, "learn masks where the data have outlines; off: boxes alone")
    detector_kwargs: dict = field(
        default_factory=dict, metadata=dict(help="more of the detector, named as torchvision does, as key=value")
    )
    anchor_sizes: tuple[float, ...] = option(ANCHOR_SIZES, "of anchors at strides 4, 8, 16, 32 and 64, px")
    max_dets: int = option(100, "objects of an image that are found and measured, the best ones")
    box_score_thresh: float = option(0.05, "what scores less is not found")
    mask_orientation: str = option("auto", "of annotations of images with EXIF orientation: auto, stored or shown")
    allow_empty: bool = option(False, "classes may have no box in training")
    group: str | None = option(None, "a regular expression; images of one match stay in one part")
    skip_bad_annotations: bool = option(False, "leave out annotations that something is wrong with, and count them")
    negatives: bool = option(True, "train on images without an object too; off: leave them out, as the papers do")
    short_sides: tuple[float, ...] = option(SHORT_SIDES, "px, one of which is drawn for the short side in training")
    short_side: int = option(800, "px, in a test")
    long_side: int = option(LONG_SIDE, "px, at most")
    crop: bool = option(True, "every second image is cropped before it is resized, as in the papers")
    crop_short_sides: tuple[float, ...] = option((400, 500, 600), "px, one of which is the short side before a crop")
    crop_sides: tuple[float, ...] = option((384, 600), "px, least and greatest side of a crop")
    hflip: float = option(0.5, "probability of a mirror image")
    augment: bool = option(True, "off: training images are resized alone, to short_side")

    @classmethod
    def rules(cls) -> dict:
        sides = (lambda x: len(x) > 0 and min(x) >= 1, "be sides of at least 1 px")
        known = sorted({f.name for f in fields(DetectorSettings)} - _OWN)
        return super().rules() | {
            "in_chans": (lambda x: x is None or 1 <= x <= 16, "be 1 to 16"),
            "system": (lambda x: x in SYSTEMS, f"be one of {', '.join(SYSTEMS)}"),
            "detector_kwargs": (lambda x: set(x) <= set(known), f"name some of {', '.join(known)}"),
            "anchor_sizes": (lambda x: len(x) == 5 and min(x) > 0, "be five sides above 0, one for each stride"),
            "max_dets": (lambda x: x >= 1, "be at least 1"),
            "box_score_thresh": (lambda x: 0 <= x < 1, "be at least 0 and below 1"),
            "mask_orientation": (lambda x: x in ("auto", "stored", "shown"), "be auto, stored or shown"),
            "short_sides": sides,
            "crop_short_sides": sides,
            "crop_sides": (lambda x: len(x) == 2 and 1 <= x[0] <= x[1], "be two sides, the lesser first"),
            "short_side": (lambda x: x >= 32, "be at least 32"),
            "long_side": (lambda x: x >= 32, "be at least 32"),
            "hflip": (lambda x: 0 <= x <= 1, "lie between 0 and 1"),
        }


class Detection:
    """The task of finding objects; see Task for what its parts are.

    Raises:
        UserError: The data cannot be taken for annotated images, or a setting does not fit them.
    """

    Settings = DetectionSettings

    def __init__(self, settings: DetectionSettings) -> None:
        self.settings = s = settings
        self.data = read_box_data(
            s.data,
            val_fraction=s.val_fraction,
            seed=s.seed,
            exclude=[Path(s.output)],
            group=s.group,
            verify=s.verify,
            skip_unreadable=s.skip_unreadable,
            unreadable_limit=s.unreadable_limit,
            skip_bad_annotations=s.skip_bad_annotations,
            mask_orientation=s.mask_orientation,
            allow_empty=s.allow_empty,
            masks=None if s.masks else False,
            max_dets=s.max_dets,
        )
        self.classes, self.digest = list(self.data.names), self.data.digest()
        self.train, self.val = self.data.parts["train"], self.data.parts["val"]
        if not s.negatives:
            self.train = self.train.subset([i for i, found in enumerate(self.train) if not found.crowd.all()])
        self.sizes = len(self.train), len(self.val)
        self.notes = [*self.data.notes]
        if note := note_anchors(self.train, s.short_side, s.long_side, s.anchor_sizes):
            self.notes.append(note)
        self.about = f"{len(self.classes)} classes, {sum(count_objects(self.data).kept['train']):,} boxes to train on"
        kinds = ("box", "mask") if self.data.masks else ("box",)
        figures = tuple(f"{kind}_{name}" for kind in kinds for name in _FIGURES)
        listed = self.classes if len(self.classes) <= _LISTED else ()
        per_class = [f"{kind}_ap {name}" for kind in kinds for name in listed]
        self.metric = f"{kinds[-1]}_ap"
        self.figures = dict.fromkeys((*figures, *per_class), True)
        self.panels = (("loss", ("train_loss",)), ("percent", figures))
        self.draws = None
        self.config = self._describe()
        self._in_chans = self.config.backbone_kwargs["in_chans"]
        sides = self._in_chans, s.short_side, s.short_side
        self.data_config = dict(input_size=sides, mean=self.config.mean, std=self.config.std)

    def _describe(self) -> DetectorConfig:
        """What the saved folder will say of the network."""
        s = self.settings
        kwargs = backbone_kwargs(s)
        mean, std = mean_and_std(s, self.train.images, kwargs["in_chans"])
        found = dict(box_score_thresh=s.box_score_thresh, box_detections_per_img=s.max_dets)
        return DetectorConfig(
            system=s.system,
            backbone=s.model,
            backbone_kwargs=kwargs,
            classes=self.classes,
            category_ids=list(self.data.category_ids),
            colours=[list(colour) for colour in self.data.colours],
            masks=self.data.masks,
            mean=mean,
            std=std,
            short_side=s.short_side,
            long_side=s.long_side,
            settings=dict(s.detector_kwargs, anchor_sizes=list(s.anchor_sizes), **found),
        )

    def make_network(self, initial_weights: bool) -> nn.Module:
        s = self.settings
        # The augmentation has resized the images; a test leaves that to the network.
        kwargs = dict(weights_kwargs(s, initial_weights), resize_in_training=False)
        network = self.config.make_network(s.weights if initial_weights else None, **kwargs)
        network.transform.paste = False
        return synchronised(network)

    def make_datasets(self, network: nn.Module) -> tuple[BoxSet, BoxSet]:
        s = self.settings
        drawn = dict(short_sides=s.short_sides, crop=s.crop, hflip=s.hflip)
        drawn |= dict(crop_short_sides=s.crop_short_sides, crop_sides=s.crop_sides)
        if not s.augment:
            drawn = dict(short_sides=(s.short_side,), crop=False, hflip=0.0)
        augmentation = make_box_augmentation(long_side=s.long_side, **_whole(drawn))
        common = dict(masks=self.data.masks, in_chans=self._in_chans)
        return (
            BoxSet(self.train, transform=augmentation, seed=s.seed, **common),
            BoxSet(self.val, transform=make_box_evaluation(), **common),
        )

    def losses(self, model: nn.Module, batch: list[list]) -> dict[str, Tensor]:
        images, targets = batch
        losses = model(images, targets)
        if not all(torch.isfinite(loss) for loss in losses.values()):
            place = {image_id: i for i, image_id in enumerate(self.train.image_ids.tolist())}
            names = ", ".join(self.train.names[place[target["image_id"]]] for target in targets)
            wrong = ", ".join(f"{name} {loss.item()}" for name, loss in losses.items() if not torch.isfinite(loss))
            raise UserError(f"Losses of the images {names} are not finite ({wrong}): lower lr or set clip_grad.")
        return losses

    def predict(self, model: nn.Module, batch: list[list]) -> list[dict]:
        """For each image boxes [N, 4], labels [N], scores [N], and masks as a list of compressed run lengths."""
        return detect(model, batch[0])

    def make_metrics(self) -> "DetectionMetrics":
        return DetectionMetrics(self.classes, self.data.masks, max_dets=self.settings.max_dets, listed=_LISTED)

    def save(self, network: nn.Module, folder: Path, rows: Sequence[dict]) -> None:
        save_detector(network, folder, self.config)
        title = f"{self.config.system} with {self.config.backbone}, trained on {Path(self.settings.data).name}"
        facts = facts_of(self, rows, title)
        facts.write(folder)
        preprocessing = {name: getattr(self.config, name) for name in ("mean", "std", "short_side", "long_side")}
        card = model_card(
            facts,
            classes=self.classes,
            data_config=preprocessing,
            source="FOLDER",
            format="nat_models",
            task="object-detection",
        )
        (folder / "README.md").write_text(card)


class DetectionMetrics(CocoMetrics):
    """CocoMetrics of a task's batches."""

    def update(self, predictions: Sequence[dict], batch: Sequence[Sequence]) -> None:
        super().update(predictions, batch[1])


def _whole(drawn: dict) -> dict:
    """Sides are pixels, of which settings make floating-point numbers."""
    return {name: tuple(int(x) for x in value) if isinstance(value, tuple) else value for name, value in drawn.items()}
