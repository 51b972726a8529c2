"""Folders of segmenters: what they are, what their classes are, and how images are prepared for them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from ..networks.upernet import UPerNet, upernet
from .folders import WEIGHTS, find_folder, open_folder, write_folder

_ARCHITECTURE = "upernet"
_ANY = 1_000_000  # px, longer than any image


@dataclass(frozen=True)
class Segmenter:
    """What config.json of a segmenter's folder holds.

    Attributes:
        backbone: timm's name.
        backbone_kwargs: Its arguments, in_chans, dilations and so on; none that fetch weights.
        channels: Of the head.
        classes: Names, in the order of the outputs.
        colours: Of the classes in pictures, red, green and blue from 0 to 255.
        mean: Subtracted from each channel of an image whose values are 0 to 1.
        std: Each channel is then divided by it.
        short_side: Images are resized for a test so that their short side is this many pixels; None leaves them.
        long_side: And so that their long side is at most this many; of use beside short_side alone.
    """

    backbone: str
    backbone_kwargs: Mapping
    channels: int
    classes: Sequence[str]
    colours: Sequence[Sequence[int]]
    mean: Sequence[float]
    std: Sequence[float]
    short_side: int | None = None
    long_side: int | None = None

    @property
    def scale(self) -> tuple[int, int] | None:
        """Long and short side of the box that images are fitted into for a test; None leaves them as they are."""
        if self.short_side is None:
            return None
        return (_ANY if self.long_side is None else self.long_side), self.short_side

    def make_network(self) -> UPerNet:
        """The network, with random weights."""
        kwargs = dict(num_classes=len(self.classes), channels=self.channels)
        return upernet(self.backbone, **kwargs, **self.backbone_kwargs)


def save_segmenter(network: nn.Module, folder: Path, about: Segmenter) -> None:
    """Writes config.json and model.safetensors into a folder that exists."""
    write_folder(network, folder, dict(architecture=_ARCHITECTURE, **asdict(about)))


def is_segmenter(folder: Path) -> bool:
    """Whether save_segmenter wrote the folder, or the best/ of a run in it."""
    return find_folder(folder, (_ARCHITECTURE,)) is not None


def segmenter_of(folder: Path) -> Segmenter:
    """What a folder says of its segmenter, without the weights; of a run's folder its best/.

    Raises:
        UserError: The folder holds no segmenter.
    """
    return _open(folder)[1]


def load_segmenter(folder: Path) -> tuple[UPerNet, Segmenter]:
    """The network in evaluation, and what its folder says of it; of a run's folder its best/.

    Raises:
        UserError: The folder holds no segmenter.
        CheckpointError: The weights cannot be read, or do not fit.
    """
    found, about = _open(folder)
    kwargs = dict(num_classes=len(about.classes), channels=about.channels)
    network = upernet(about.backbone, weights=found / WEIGHTS, **kwargs, **about.backbone_kwargs)
    return network.eval(), about


def _open(folder: Path) -> tuple[Path, Segmenter]:
    found, config = open_folder(folder, (_ARCHITECTURE,), "segmenter", "segment")
    del config["architecture"]
    return found, Segmenter(**config)
