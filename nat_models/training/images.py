"""Images: which files are some, how they are decoded, and what becomes of one that cannot be."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import UserError


class Encoded(Protocol):
    """An encoded image, wherever it lies: in a file, a shard or a row of a table.

    Attributes:
        name: What reports and feature files call it: its path relative to the data, with slashes.
        path: The file that holds it.
    """

    name: str
    path: str

    def open(self) -> BinaryIO:
        """Its bytes."""


class ImageFile(NamedTuple):
    """An image that is a file of its own."""

    name: str
    path: str

    def open(self) -> BinaryIO:
        return open(self.path, "rb")


def list_images(folder: Path) -> list[ImageFile]:
    """All images below a folder, ordered by their path alone: no file system and no locale has a say."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    files = [Path(file) for file, _ in find_images_and_targets(str(folder))[0]]
    if not files:
        raise UserError(f"There are no images in {folder}.")
    return sorted(ImageFile(file.relative_to(folder).as_posix(), str(file)) for file in files)


def decode(image: Encoded, in_chans: int) -> Image.Image:
    """The image in mode L for one channel, RGB for three.

    Raises:
        UserError: It cannot be read; the message names it.
    """
    try:
        with image.open() as file, Image.open(file) as opened:
            return opened.convert("L" if in_chans == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(f"{image.path} cannot be read as an image: {e}") from None


class ImageSet(Dataset):
    """(image, target) of listed images. An unreadable one is an error that names it, where timm's ImageDataset would
    hand out its neighbour instead: a score over stand-ins is wrong.

    Args:
        images: Where the images are.
        targets: What is learnt of each; None gives the image's index.
        in_chans: 1 decodes to grey, 3 to RGB.
        transform: Takes the decoded image.
    """

    def __init__(
        self,
        images: Sequence[Encoded],
        targets: Sequence | None,
        in_chans: int,
        transform: Callable,
        seed: int | None = None,
    ):
        self.images, self.targets, self.in_chans, self.transform = images, targets, in_chans, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if isinstance(index, tuple):
            import random

            torch.manual_seed(hash((1, *index)))
            random.seed(hash((1, *index)))
            import numpy

            numpy.random.seed(hash((1, *index)) % 2**32)
            index = index[1]
        image = decode(self.images[index], self.in_chans)
        return self.transform(image), index if self.targets is None else self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Any] | UserError]:
        """What a DataLoader makes a batch of. An error is a value here: a DataLoader would raise another one in the
        main process, with the traceback of its worker for a message."""

        def read(index: int) -> tuple[Tensor, Any] | UserError:
            try:
                return self[index]
            except UserError as e:
                return e

        return [read(index) for index in indices]


def _collate(items: list) -> tuple[list[Tensor] | None, list[UserError]]:
    readable = [item for item in items if not isinstance(item, UserError)]
    return default_collate(readable) if readable else None, [item for item in items if isinstance(item, UserError)]


def make_loader(images: ImageSet, batch_size: int, workers: int = 0, **kwargs) -> DataLoader:
    """A loader whose batches `read_batches` takes; accelerate may prepare it. `kwargs` go to DataLoader."""
    return DataLoader(images, batch_size, num_workers=workers, collate_fn=_collate, **kwargs)


def read_batches(loader: Iterable, on_error: Callable[[UserError], None] | None = None) -> Iterator[list[Tensor]]:
    """The batches of `make_loader`, [images, targets].

    Args:
        loader: What make_loader returned, as it is or wrapped.
        on_error: Is told of each unreadable image, which is then left out of its batch. None: the first one is raised.
    """
    for batch, errors in loader:
        for error in errors:
            if on_error is None:
                raise error
            on_error(error)
        if batch is not None:
            yield batch
