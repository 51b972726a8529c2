"""Image classification: cross-entropy, or binary cross-entropy where an image has several labels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
    MultilabelAveragePrecision,
    MultilabelExactMatch,
    MultilabelF1Score,
)

from ...checkpoints.saving import save_model
from ...errors import UserError
from ..cards import facts_of, model_card
from ..images import ImageSet
from ..models import MULTI_LABEL, began_from, make_model
from ..settings import Settings, option
from ..splits import Part, drop_unreadable, read_data
from ..tables import Columns
from ..weighting import class_weights


@dataclass(frozen=True)
class ClassificationSettings(Settings):
    """The engine's settings, and those of classification alone."""

    smoothing: float = option(0.1, "label smoothing")
    class_weights: str | None = option(None, "balanced (the rarer, the heavier), or cat=2,dog=0.5; of the loss")
    sampler: str = option("shuffle", "shuffle, or balanced: every class is drawn equally often")
    mixup: float = option(0.0, "alpha of mixup, 0: off")
    cutmix: float = option(0.0, "alpha of cutmix, 0: off")
    auto_augment: str | None = option(None, "timm's notation, such as rand-m9-mstd0.5-inc1; replaces color_jitter")
    scale: tuple[float, ...] = option((0.08, 1.0), "least and greatest part of the image's area in a random crop")
    ratio: tuple[float, ...] = option((3 / 4, 4 / 3), "least and greatest aspect ratio of a random crop")
    hflip: float = option(0.5, "probability of a mirror image")
    color_jitter: float | None = option(None, "of brightness, contrast and saturation")
    reprob: float = option(0.0, "probability of erasing a random rectangle")
    augment: bool = option(True, "off: training images are cropped and scaled as validation images are")

    @classmethod
    def rules(cls) -> dict:
        pair = (lambda x: len(x) == 2 and 0 < x[0] <= x[1], "be two values, the lesser first")
        probability = (lambda x: 0 <= x <= 1, "lie between 0 and 1")
        return super().rules() | {
            "smoothing": (lambda x: 0 <= x < 1, "be at least 0 and below 1"),
            "sampler": (lambda x: x in ("shuffle", "balanced"), "be shuffle or balanced"),
            "mixup": (lambda x: x >= 0, "be at least 0"),
            "cutmix": (lambda x: x >= 0, "be at least 0"),
            "scale": pair,
            "ratio": pair,
            "hflip": probability,
            "reprob": probability,
        }

    def __post_init__(self):
        super().__post_init__()
        # Mixup pairs the first image of a batch with the last, and so on.
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise UserError(f"batch_size must be even with mixup or cutmix, got {self.batch_size}.")


class Classification:
    """The task of naming an image's class or classes; see Task for what its parts are.

    Raises:
        UserError: The data cannot be taken for images of classes, or a setting does not fit them.
    """

    Settings = ClassificationSettings

    def __init__(self, settings: ClassificationSettings) -> None:
        self.settings = settings
        data = read_data(
            settings.data,
            val_fraction=settings.val_fraction,
            seed=settings.seed,
            exclude=[Path(settings.output)],
            columns=Columns(settings.image_column, settings.label_column, settings.split_column),
        )
        drop_unreadable(data, verify=settings.verify, skip=settings.skip_unreadable, limit=settings.unreadable_limit)
        self.train, self.val, self.classes = data.parts["train"], data.parts["val"], data.names
        self.multi_label, self.notes, self.digest = data.multi_label, data.notes, data.digest()
        self.sizes = len(self.train), len(self.val)
        self.about = f"{len(self.classes)} {'labels' if self.multi_label else 'classes'}"
        names = self.make_metrics().names
        self.metric = "map" if self.multi_label else "top1"
        self.figures = {"val_loss": False, **dict.fromkeys(names, True)}
        kind = "binary cross-entropy" if self.multi_label else "cross-entropy"
        self.panels = (
            (f"{kind} (training: augmented, smoothed)", ("train_loss", "val_loss")),
            ("percent", names),
        )
        self.class_weights = class_weights(settings.class_weights, _counts(self.train), len(self.train), self.classes)
        self.draws = equal_draws(self.train) if settings.sampler == "balanced" else None
        self.mixup = None
        if settings.mixup or settings.cutmix:
            if self.multi_label:
                raise UserError("mixup and cutmix are for one label per image; the data have several.")
            smoothing = dict(label_smoothing=settings.smoothing, num_classes=len(self.classes))
            self.mixup = Mixup(settings.mixup, settings.cutmix, **smoothing)

    def make_network(self, initial_weights: bool) -> nn.Module:
        s = self.settings
        weights = dict(pretrained=s.pretrained, checkpoint=s.checkpoint) if initial_weights else {}
        names = ("model_kwargs", "in_chans", "img_size", "drop_path")
        kwargs = {name: getattr(s, name) for name in names}
        return make_model(s.model, num_classes=len(self.classes), **kwargs, **weights)

    def make_datasets(self, network: nn.Module) -> tuple[ImageSet, ImageSet]:
        s = self.settings
        preprocessing = {k: getattr(s, k) for k in ("img_size", "crop_pct", "interpolation", "mean", "std")}
        self.data_config = resolve_input_data_config(network, preprocessing)
        plain = create_transform(**self.data_config)
        augmented = plain
        if s.augment:
            augmentation = {k: getattr(s, k) for k in ("auto_augment", "scale", "ratio", "hflip", "color_jitter")}
            augmented = create_transform(
                **self.data_config, is_training=True, re_prob=s.reprob, re_mode="pixel", **augmentation
            )
        in_chans = self.data_config["input_size"][0]
        return (
            ImageSet(self.train.images, self._targets(self.train), in_chans, augmented, seed=s.seed),
            ImageSet(self.val.images, self._targets(self.val), in_chans, plain),
        )

    def _targets(self, part: Part) -> Sequence:
        return _MultiHot(part.targets, len(self.classes)) if self.multi_label else part.targets

    def losses(self, model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
        images, target = batch
        smoothing = self.settings.smoothing
        if self.mixup is not None:
            images, target = self.mixup(images, target)
            smoothing = 0.0  # mixup smooths its targets itself
        logits = model(images)
        weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        if self.multi_label:
            soft = target * (1 - smoothing) + smoothing / 2
            return dict(binary_cross_entropy=F.binary_cross_entropy_with_logits(logits, soft, pos_weight=weights))
        if weights is None:
            return dict(cross_entropy=F.cross_entropy(logits, target, label_smoothing=smoothing))
        if target.dim() == 1:
            target = F.one_hot(target, len(self.classes)).to(logits.dtype)
            target = target * (1 - smoothing) + smoothing / len(self.classes)
        # A mean over images: divided by the sum of its weights, a batch would count by what happens to be in it.
        return dict(cross_entropy=-(target * weights * logits.log_softmax(dim=1)).sum(dim=1).mean())

    def predict(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        """Logits, [B, classes] in float32."""
        return model(batch[0]).float()

    def make_metrics(self) -> "ClassificationMetrics":
        return ClassificationMetrics(len(self.classes), self.multi_label)

    def save(self, network: nn.Module, folder: Path, rows: Sequence[dict]) -> None:
        config = dict(label_names=self.classes, problem_type=MULTI_LABEL if self.multi_label else None)
        save_model(network, folder, model_config=config, data_config=self.data_config)
        s, data = self.settings, Path(self.settings.data).name
        began = began_from(network) if s.pretrained and s.checkpoint is None else None
        facts = facts_of(
            self,
            rows,
            f"{s.model}, trained on {data}",
            license=None if began is None else began.license,
            base_model=None if began is None else began.repo,
        )
        facts.write(folder)
        card = model_card(facts, classes=self.classes, data_config=self.data_config, source="FOLDER")
        (folder / "README.md").write_text(card)


class ClassificationMetrics(nn.Module):
    """Mean cross-entropy, and figures in percent: top1, top5 with more than 5 classes, and macro averages; for several
    labels per image mean average precision (map), F1 at a probability of one half, and how many are wholly right."""

    def __init__(self, num_classes: int, multi_label: bool):
        super().__init__()
        self.multi_label, self.loss = multi_label, MeanMetric()
        if multi_label:
            figures = dict(
                map=MultilabelAveragePrecision(num_classes),
                macro_f1=MultilabelF1Score(num_classes, average="macro"),
                micro_f1=MultilabelF1Score(num_classes, average="micro"),
                exact=MultilabelExactMatch(num_classes),
            )
        else:
            figures = dict(top1=MulticlassAccuracy(num_classes, average="micro"))
            if num_classes > 5:
                figures["top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
            figures["macro_precision"] = MulticlassPrecision(num_classes)
            figures["macro_recall"] = MulticlassRecall(num_classes)
            figures["macro_f1"] = MulticlassF1Score(num_classes)
        # torchmetrics would share the counts of metrics that agree on the first batch, as top-1 and top-5 may.
        self.names, self.figures = list(figures), MetricCollection(figures, compute_groups=False)

    def update(self, logits: Tensor, batch: list[Tensor]) -> None:
        target = batch[1]
        if self.multi_label:
            self.loss.update(F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=1))
            self.figures.update(logits.sigmoid(), target.long())
        else:
            self.loss.update(F.cross_entropy(logits, target, reduction="none"))
            self.figures.update(logits, target)

    def compute(self) -> dict[str, float]:
        values = self.figures.compute()
        return dict(val_loss=self.loss.compute().item()) | {name: 100 * values[name].item() for name in self.names}


class _MultiHot(Sequence):
    """Targets as rows of 0 and 1, made when they are asked for."""

    def __init__(self, targets: Sequence[Sequence[int]], num_classes: int):
        self.targets, self.num_classes = targets, num_classes

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Tensor:
        row = torch.zeros(self.num_classes)
        row[list(self.targets[index])] = 1
        return row


def _counts(part: Part) -> Counter:
    """How many images have each label."""
    return Counter(label for target in part.targets for label in (target if isinstance(target, tuple) else (target,)))


def equal_draws(train: Part) -> list[float]:
    """For each image how often it is drawn: one over the number of its class; of several labels the rarest counts."""
    counts = _counts(train)
    return [
        1 / min((counts[i] for i in (target if isinstance(target, tuple) else (target,))), default=len(train))
        for target in train.targets
    ]
