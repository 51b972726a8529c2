"""Semantic segmentation: a class for each pixel, by UPerNet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from ...errors import UserError
from ...networks.upernet import upernet
from ..backbones import backbone_kwargs, mean_and_std, synchronised, weights_kwargs
from ..cards import facts_of, model_card
from ..mask_sets import MaskSet, make_augmentation, make_evaluation
from ..mask_values import IGNORE
from ..masks import read_mask_data
from ..pixel_losses import LOSSES, pixel_loss
from ..segmenters import Segmenter, save_segmenter
from ..settings import Settings, option
from ..weighting import class_weights

_LISTED = 30  # classes whose IoU is told epoch by epoch


@dataclass(frozen=True)
class SegmentationSettings(Settings):
    """The engine's settings, and those of segmentation alone."""

    channels: int = option(512, "of the head; 512 in the published systems")
    head_drop_rate: float = option(0.1, "dropout of whole channels before the classifiers")
    weights: str | None = option(None, "start from this UPerNet, mmsegmentation's, transformers' or ours")
    classes: str | None = option(None, "a file that names the values of masks; none: classes.json of the data")
    reduce_zero_label: bool = option(False, "0 is ignored and the others move down by one, as in ADE20K")
    mask_values: str | None = option(None, "values that mean another one, as in 255:1")
    mask_orientation: str = option("auto", "of masks beside images with EXIF orientation: auto, stored or shown")
    allow_empty: bool = option(False, "classes may have no pixel in the training masks")
    group: str | None = option(None, "a regular expression; images of one match stay in one part")
    crop_size: int = option(512, "side of the square that training sees")
    short_side: int | None = option(512, "to which images are resized; none: left as they are")
    long_side: int | None = option(2048, "at most, for images that are much longer than high")
    resize: tuple[float, ...] = option((0.5, 2.0), "least and greatest factor on that size in training")
    cat_max_ratio: float = option(0.75, "a crop of one class above this part is drawn again")
    hflip: float = option(0.5, "probability of a mirror image")
    photometric: bool = option(True, "distort brightness, contrast, saturation and hue")
    augment: bool = option(True, "off: training images are resized and cropped at random alone")
    loss: str = option("cross_entropy", "cross_entropy, focal or dice, or several joined by +")
    loss_mean: str = option("all", "pixels that the mean is over: all, as the paper's, or labelled")
    auxiliary_weight: float = option(0.4, "of the auxiliary head's loss")
    class_weights: str | None = option(None, "balanced, or road=2,sky=0.5; of cross_entropy and focal")
    batch_norm: str = option("batch", "statistics in training: batch, running, or frozen (nothing of it is trained)")

    @classmethod
    def rules(cls) -> dict:
        positive = (lambda x: x is None or x >= 1, "be at least 1")
        return super().rules() | {
            "in_chans": (lambda x: x is None or 1 <= x <= 16, "be from 1 to 16"),
            "channels": positive,
            "head_drop_rate": (lambda x: 0 <= x < 1, "be at least 0 and below 1"),
            "crop_size": (lambda x: x >= 32, "be at least 32"),
            "short_side": positive,
            "long_side": positive,
            "resize": (lambda x: len(x) == 2 and 0 < x[0] <= x[1], "be two values, the lesser first"),
            "cat_max_ratio": (lambda x: 0 < x <= 1, "be above 0 and at most 1"),
            "hflip": (lambda x: 0 <= x <= 1, "lie between 0 and 1"),
            "loss": (
                lambda x: len(set(x.split("+"))) == len(x.split("+")) and set(x.split("+")) <= set(LOSSES),
                f"be one or more of {', '.join(LOSSES)}, joined by +",
            ),
            "mask_orientation": (lambda x: x in ("auto", "stored", "shown"), "be auto, stored or shown"),
            "loss_mean": (lambda x: x in ("all", "labelled"), "be all or labelled"),
            "auxiliary_weight": (lambda x: x >= 0, "be at least 0"),
            "batch_norm": (lambda x: x in ("batch", "running", "frozen"), "be batch, running or frozen"),
        }

    def __post_init__(self):
        super().__post_init__()
        if self.batch_norm == "batch" and self.batch_size == 1:
            raise UserError(
                "BatchNorm has no statistics of one image, and grad_accum does not enlarge its batch: set batch_size "
                "to 2 or more, or batch_norm to running or frozen."
            )
        if self.loss_mean == "labelled" and self.loss == "dice":
            raise UserError("loss_mean is of cross_entropy and focal; dice is over labelled pixels as it is.")


class Segmentation:
    """The task of naming the class of each pixel; see Task for what its parts are.

    Raises:
        UserError: The data cannot be taken for images and masks, or a setting does not fit them.
    """

    Settings = SegmentationSettings
    metric = "miou"

    def __init__(self, settings: SegmentationSettings) -> None:
        self.settings = s = settings
        self.data = read_mask_data(
            Path(s.data),
            val_fraction=s.val_fraction,
            seed=s.seed,
            exclude=[Path(s.output)],
            classes=s.classes,
            reduce_zero_label=s.reduce_zero_label,
            mask_values=s.mask_values,
            group=s.group,
            verify=s.verify,
            skip_unreadable=s.skip_unreadable,
            unreadable_limit=s.unreadable_limit,
            mask_orientation=s.mask_orientation,
            allow_empty=s.allow_empty,
        )
        self.classes, self.digest = list(self.data.names), self.data.digest()
        self.train, self.val = self.data.parts["train"], self.data.parts["val"]
        self.sizes = len(self.train.images), len(self.val.images)
        counts = self.data.counts
        self.notes = list(self.data.notes)
        if not sum(counts.pixels["val"]):
            raise UserError("No pixel of the validation masks is labelled: nothing could be measured.")
        self.about = f"{len(self.classes)} classes"
        per_class = [f"iou {name}" for name in self.classes] if len(self.classes) <= _LISTED else []
        figures = ("miou", "mean_accuracy", "pixel_accuracy")
        self.figures = {"val_loss": False, **dict.fromkeys((*figures, *per_class), True)}
        self.panels = (("loss", ("train_loss", "val_loss")), ("percent", figures))
        self.draws = None
        pixels = dict(enumerate(counts.pixels["train"]))
        self.class_weights = class_weights(s.class_weights, pixels, sum(pixels.values()), self.classes)
        self.about_network = self._describe()
        sides = (about := self.about_network).backbone_kwargs["in_chans"], s.crop_size, s.crop_size
        self.data_config = dict(input_size=sides, mean=about.mean, std=about.std)

    def _describe(self) -> Segmenter:
        """What the saved folder will say of the network."""
        s = self.settings
        kwargs = backbone_kwargs(s)
        mean, std = mean_and_std(s, self.train.images, kwargs["in_chans"])
        return Segmenter(
            backbone=s.model,
            backbone_kwargs=kwargs,
            channels=s.channels,
            classes=self.classes,
            colours=[list(colour) for colour in self.data.colours],
            mean=mean,
            std=std,
            short_side=s.short_side,
            long_side=s.long_side,
        )

    def make_network(self, initial_weights: bool) -> nn.Module:
        s, about = self.settings, self.about_network
        kwargs = dict(num_classes=len(self.classes), channels=about.channels, head_drop_rate=s.head_drop_rate)
        kwargs |= about.backbone_kwargs | weights_kwargs(s, initial_weights)
        network = synchronised(upernet(about.backbone, weights=s.weights if initial_weights else None, **kwargs))
        network.keep_statistics = s.batch_norm != "batch"
        for module in network.modules() if s.batch_norm == "frozen" else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
        return network

    def make_datasets(self, network: nn.Module) -> tuple[MaskSet, MaskSet]:
        s, about = self.settings, self.about_network
        in_chans = about.backbone_kwargs["in_chans"]
        common = dict(in_chans=in_chans, mean=about.mean, std=about.std, scale=about.scale)
        drawn = dict(ratio_range=s.resize, hflip=s.hflip, distort=s.photometric)
        if not s.augment:
            drawn = dict(ratio_range=(1.0, 1.0), hflip=0.0, distort=False)
        augmentation = make_augmentation(s.crop_size, **common, **drawn, cat_max_ratio=s.cat_max_ratio)
        return (
            MaskSet(self.train, self.data.reading, in_chans, augmentation, seed=s.seed),
            MaskSet(self.val, self.data.reading, in_chans, make_evaluation(**common)),
        )

    def losses(self, model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        s = self.settings
        logits, auxiliary = model(images)
        given = dict(labels=labels, mean=s.loss_mean, weights=self.class_weights)
        kinds = s.loss.split("+")
        losses = {kind: pixel_loss(kind, logits, **given) for kind in kinds}
        if s.auxiliary_weight:
            losses |= {f"auxiliary_{kind}": s.auxiliary_weight * pixel_loss(kind, auxiliary, **given) for kind in kinds}
        return losses

    def predict(self, model: nn.Module, batch: list[list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """For each image its label map [H, W], of its own size, and its loss."""
        found = []
        for image, labels in zip(*batch, strict=True):  # one at a time: their sizes differ
            logits = model(image[None]).float()
            logits = F.interpolate(logits, labels.shape, mode="bilinear", align_corners=False)
            loss = pixel_loss("cross_entropy", logits, labels[None], self.settings.loss_mean)
            found.append((logits[0].argmax(0), loss))
        return found

    def make_metrics(self) -> "SegmentationMetrics":
        return SegmentationMetrics(self.classes)

    def save(self, network: nn.Module, folder: Path, rows: Sequence[dict]) -> None:
        about = self.about_network
        save_segmenter(network, folder, about)
        facts = facts_of(self, rows, f"UPerNet with {about.backbone}, trained on {Path(self.settings.data).name}")
        facts.write(folder)
        preprocessing = {name: getattr(about, name) for name in ("mean", "std", "short_side", "long_side")}
        card = model_card(
            facts,
            classes=self.classes,
            data_config=preprocessing,
            source="FOLDER",
            format="nat_models",
            task="image-segmentation",
        )
        (folder / "README.md").write_text(card)


class SegmentationMetrics(nn.Module):
    """Figures from one confusion matrix of all pixels, in percent; ignored pixels count nowhere.

    miou is the mean intersection over union of the classes that are there, in labels or predictions; mean_accuracy the
    mean part of a class's pixels that is right, pixel_accuracy that of all pixels. val_loss is a mean over images.
    """

    def __init__(self, classes: Sequence[str]):
        super().__init__()
        self.classes, self.loss = list(classes), MeanMetric()
        self.confusion = MulticlassConfusionMatrix(len(classes), ignore_index=IGNORE)

    def update(self, predictions: Sequence[tuple[Tensor, Tensor]], batch: Sequence[Sequence[Tensor]]) -> None:
        for (labels, loss), true in zip(predictions, batch[1], strict=True):
            self.confusion.update(labels[None], true[None])
            self.loss.update(loss)

    def compute(self) -> dict[str, float]:
        figures, (iou, _) = scores(self.confusion.compute())
        figures = dict(val_loss=self.loss.compute().item(), **figures)
        if len(self.classes) > _LISTED:
            return figures
        return figures | {f"iou {name}": value for name, value in zip(self.classes, iou, strict=True)}


def scores(matrix: Tensor) -> tuple[dict[str, float], tuple[list[float], list[float]]]:
    """Figures of a confusion matrix, [true, predicted] counts of pixels, in percent.

    Returns:
        miou, mean_accuracy and pixel_accuracy, as SegmentationMetrics says; IoU and accuracy of each class, nan for one
        of which there is nothing to say: that is in neither labels nor predictions, or for accuracy not in labels.
    """
    matrix = matrix.double()
    right, true, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
    union = true + predicted - right
    iou, accuracy = 100 * right / union, 100 * right / true
    figures = dict(
        miou=iou[union > 0].mean().item(),
        mean_accuracy=accuracy[true > 0].mean().item(),
        pixel_accuracy=(100 * right.sum() / matrix.sum()).item(),
    )
    return figures, (iou.tolist(), accuracy.tolist())
