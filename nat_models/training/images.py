"""Images: which files are some, how they are decoded, and what becomes of one that cannot be."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import UserError


def list_images(folder: Path) -> list[Path]:
    """All images below a folder, ordered by their path alone: no file system and no locale has a say."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    files = [Path(file) for file, _ in find_images_and_targets(str(folder))[0]]
    if not files:
        raise UserError(f"There are no images in {folder}.")
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


class ImageFiles(Dataset):
    """(image, target) of listed files. An unreadable one is an error that names it, where timm's ImageDataset would
    hand out its neighbour instead: a score over stand-ins is wrong."""

    def __init__(self, samples: Sequence[tuple[Path, int]], in_chans: int, transform: Callable):
        self.samples, self.mode, self.transform = samples, "L" if in_chans == 1 else "RGB", transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, target = self.samples[index]
        try:
            with Image.open(path) as image:
                image = image.convert(self.mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise UserError(f"{path} cannot be read as an image: {e}") from None
        return self.transform(image), target

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int] | UserError]:
        """What a DataLoader makes a batch of. An error is a value here: a DataLoader would raise another one in the
        main process, with the traceback of its worker for a message."""

        def read(index: int) -> tuple[Tensor, int] | UserError:
            try:
                return self[index]
            except UserError as e:
                return e

        return [read(index) for index in indices]


def _collate(items: list) -> tuple[list[Tensor] | None, list[UserError]]:
    readable = [item for item in items if not isinstance(item, UserError)]
    return default_collate(readable) if readable else None, [item for item in items if isinstance(item, UserError)]


def make_loader(images: ImageFiles, batch_size: int, workers: int = 0, **kwargs) -> DataLoader:
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
