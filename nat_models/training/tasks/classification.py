"""Image classification: a folder of images per class, cross-entropy, top-1 and top-5."""

import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn

from ..images import ImageSet
from ..models import make_model
from ..settings import Settings
from ..splits import read_data


class Classification:
    """The task of naming an image's class; see Task for what its parts are.

    Raises:
        UserError: The folder of images cannot be taken for classes of images.
    """

    metric = "top1"
    panels = (
        ("cross-entropy (training: augmented, smoothed)", ("train_loss", "val_loss")),
        ("percent of validation images", ("top1", "top5")),
    )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        data = read_data(settings.data, val_fraction=settings.val_fraction, seed=settings.seed)
        self.train, self.val, self.names = data.parts["train"], data.parts["val"], data.names
        self.sizes = len(self.train), len(self.val)
        self.about = f"{len(self.names)} classes"
        self.model_config = dict(label_names=self.names)
        self.mixup = None
        if settings.mixup or settings.cutmix:
            smoothing = dict(label_smoothing=settings.smoothing, num_classes=len(self.names))
            self.mixup = Mixup(settings.mixup, settings.cutmix, **smoothing)

    def make_network(self, initial_weights: bool) -> nn.Module:
        s = self.settings
        weights = dict(pretrained=s.pretrained, checkpoint=s.checkpoint) if initial_weights else {}
        names = ("model_kwargs", "in_chans", "img_size", "drop_path")
        kwargs = {name: getattr(s, name) for name in names}
        return make_model(s.model, num_classes=len(self.names), **kwargs, **weights)

    def make_datasets(self, network: nn.Module) -> tuple[ImageSet, ImageSet]:
        s = self.settings
        preprocessing = {k: getattr(s, k) for k in ("img_size", "crop_pct", "interpolation", "mean", "std")}
        self.data_config = resolve_input_data_config(network, preprocessing)
        augmentation = {k: getattr(s, k) for k in ("auto_augment", "scale", "ratio", "hflip", "color_jitter")}
        augment = create_transform(
            **self.data_config, is_training=True, re_prob=s.reprob, re_mode="pixel", **augmentation
        )
        in_chans = self.data_config["input_size"][0]
        train_set = ImageSet(self.train.images, self.train.targets, in_chans, augment)
        evaluate = create_transform(**self.data_config)
        return train_set, ImageSet(self.val.images, self.val.targets, in_chans, evaluate)

    def losses(self, model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
        images, target = batch
        smoothing = self.settings.smoothing
        if self.mixup is not None:
            images, target = self.mixup(images, target)
            smoothing = 0.0  # mixup smooths its targets itself
        return dict(cross_entropy=F.cross_entropy(model(images), target, label_smoothing=smoothing))

    def measure(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        images, target = batch
        logits = model(images).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
        loss = F.cross_entropy(logits, target, reduction="none")
        return torch.stack([loss, hits[:, 0].float(), hits.any(dim=1).float()], dim=1)

    def metrics(self, measured: Tensor) -> dict[str, float]:
        """Mean cross-entropy, top-1 and, with more than 5 classes, top-5 in percent."""
        loss, top1, top5 = measured.double().mean(dim=0).tolist()
        metrics = dict(val_loss=loss, top1=100 * top1)
        return metrics | (dict(top5=100 * top5) if len(self.names) > 5 else {})
