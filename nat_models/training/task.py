"""What the engine asks of a task."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from .images import ImageSet


class Task(Protocol):
    """What is learnt: data, network, losses and metrics. Optimizer, processes and averaged weights are the engine's.

    Attributes:
        sizes: Numbers of training and of validation images.
        about: What the first line of a run says of the data besides: "10 classes".
        metric: The metric that decides which epoch is best, the greatest; of equal ones that with the lowest val_loss.
        panels: The pictures of curve.png: a unit, and the columns of summary.csv in it.
        model_config: Saved beside the weights for whoever loads them, as is `data_config`; complete once the datasets
            are made.
        data_config: The preprocessing, in timm's words.
    """

    sizes: tuple[int, int]
    about: str
    metric: str
    panels: Sequence[tuple[str, Sequence[str]]]
    model_config: dict
    data_config: dict

    def make_network(self, initial_weights: bool) -> nn.Module:
        """The network, random where `initial_weights` is False: a run that goes on has weights of its own, and the
        initial checkpoint may no longer exist."""

    def make_datasets(self, network: nn.Module) -> tuple[ImageSet, ImageSet]:
        """The images to train on, augmented, and those to validate on."""

    def losses(self, model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
        """The losses of a training batch by name; the engine minimises their sum."""

    def measure(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        """[images, numbers]: what `metrics` wants to know of each image of a validation batch."""

    def metrics(self, measured: Tensor) -> dict[str, float]:
        """The metrics over all validation images, val_loss among them; `measured` is [images, numbers]."""
