"""Folders of detectors: what they are, what their classes are, and how images are prepared for them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn

from ..networks.cascade_rcnn import cascade_mask_rcnn
from ..networks.detector import Detector
from ..networks.mask_rcnn import mask_rcnn
from .folders import WEIGHTS, find_folder, open_folder, write_folder

SYSTEMS = {"mask_rcnn": mask_rcnn, "cascade_mask_rcnn": cascade_mask_rcnn}


@dataclass(frozen=True)
class DetectorConfig:
    """What config.json of a detector's folder holds.

    Attributes:
        system: One of SYSTEMS.
        backbone: timm's name.
        backbone_kwargs: Its arguments, in_chans, dilations and so on; none that fetch weights.
        classes: Names, in the order of the network's labels.
        category_ids: Of the classes in the data that were trained on; None where they had none.
        colours: Of the classes in pictures, red, green and blue from 0 to 255.
        masks: Whether it has mask heads.
        mean: Subtracted from each channel of an image whose values are 0 to 1.
        std: Each channel is then divided by it.
        short_side: Images are resized for a test so that their short side is this many pixels.
        long_side: And so that their long side is at most this many.
        settings: More of networks.detector.DetectorSettings.
    """

    system: str
    backbone: str
    backbone_kwargs: Mapping
    classes: Sequence[str]
    category_ids: Sequence[int | None]
    colours: Sequence[Sequence[int]]
    masks: bool
    mean: Sequence[float]
    std: Sequence[float]
    short_side: int
    long_side: int
    settings: Mapping = field(default_factory=dict)

    def make_network(self, weights: str | Path | None = None, **kwargs) -> Detector:
        """The network: with random weights, those of a file, or what more arguments of SYSTEMS ask for."""
        return SYSTEMS[self.system](
            self.backbone,
            len(self.classes),
            weights,
            masks=self.masks,
            image_mean=self.mean,
            image_std=self.std,
            min_size=self.short_side,
            max_size=self.long_side,
            **{**self.settings, **self.backbone_kwargs, **kwargs},
        )

    def ids(self) -> list[int]:
        """The user's category id of each class; where one is unknown they are numbered from 1."""
        known = list(self.category_ids)
        return list(range(1, len(known) + 1)) if None in known or len(set(known)) < len(known) else known


def save_detector(network: nn.Module, folder: Path, config: DetectorConfig) -> None:
    """Writes config.json and model.safetensors into a folder that exists."""
    write_folder(network, folder, dict(architecture=config.system, **asdict(config)))


def is_detector(folder: Path) -> bool:
    """Whether save_detector wrote the folder, or the best/ of a run in it."""
    return find_folder(folder, SYSTEMS) is not None


def detector_of(folder: Path) -> DetectorConfig:
    """What a folder says of its detector, without the weights; of a run's folder its best/.

    Raises:
        UserError: The folder holds no detector.
    """
    return _open(folder)[1]


def load_detector(folder: Path) -> tuple[Detector, DetectorConfig]:
    """The network in evaluation, and what its folder says of it; of a run's folder its best/.

    Raises:
        UserError: The folder holds no detector.
        CheckpointError: The weights cannot be read, or do not fit.
    """
    found, config = _open(folder)
    return config.make_network(found / WEIGHTS).eval(), config


def _open(folder: Path) -> tuple[Path, DetectorConfig]:
    found, config = open_folder(folder, SYSTEMS, "detector", "detect")
    del config["architecture"]
    return found, DetectorConfig(**config)
