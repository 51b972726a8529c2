"""What the engine asks of a task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from torch.utils.data import Dataset

from .settings import Settings


class Metrics(Protocol):
    """Figures over a stream of batches; torchmetrics inside, which adds up over processes."""

    def update(self, predictions: Sequence, batch: list) -> None:
        """Counts a batch; `predictions` are what the task's `predict` made of it."""

    def compute(self) -> dict[str, float]:
        """The figures of all that was counted, in all processes."""


class Task(Protocol):
    """What is learnt: data, network, losses and metrics. Optimizer, processes and averaged weights are the engine's.

    Attributes:
        settings: Of the run.
        sizes: Numbers of training and of validation images.
        about: What the first line of a run says of the data besides: "10 classes".
        notes: Lines on the data that a user should see, such as what was passed over.
        classes: Their names, in the order of the network's outputs.
        digest: Of the data: names, sizes, labels and parts of the images.
        metric: The metric that decides which epoch is best, if the settings name none.
        figures: What `Metrics.compute` gives, and whether more is better.
        panels: The pictures of curve.png: a unit, and the columns of summary.csv in it.
        data_config: The preprocessing, in timm's words; known once the datasets are made.
        draws: For each training image how often it is drawn, relative to others; None draws each once an epoch.
    """

    settings: Settings
    sizes: tuple[int, int]
    about: str
    notes: Sequence[str]
    classes: list[str]
    digest: str
    metric: str
    figures: Mapping[str, bool]
    panels: Sequence[tuple[str, Sequence[str]]]
    data_config: dict
    draws: Sequence[float] | None

    def make_network(self, initial_weights: bool) -> nn.Module:
        """The network, random where `initial_weights` is False: a run that goes on has weights of its own, and the
        initial checkpoint may no longer exist."""

    def make_datasets(self, network: nn.Module) -> tuple[Dataset, Dataset]:
        """The images to train on, augmented, and those to validate on. An item of the former is asked for by
        (epoch, index), and its augmentation depends on nothing else but the seed."""

    def losses(self, model: nn.Module, batch: list) -> dict[str, Tensor]:
        """The losses of a training batch by name, each a mean over its images; the engine minimises their sum."""

    def predict(self, model: nn.Module, batch: list) -> Sequence:
        """What the model makes of each image of a validation batch."""

    def make_metrics(self) -> Metrics:
        """Figures that have counted nothing yet."""

    def save(self, network: nn.Module, folder: Path, rows: Sequence[dict]) -> None:
        """Writes the network for whoever uses it, with its card; `rows` are the epochs so far, the last its own."""
