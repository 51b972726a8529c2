"""Images: which files are some, how they are read in batches, and what becomes of one that cannot be."""

import atexit
import ctypes
import functools
import hashlib
import json
import multiprocessing
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import UserError
from .decoding import WHITE, Encoded, ImageFile, advice, check_header, decode, suffixes
from .sampling import derive_seed

__all__ = ["Encoded", "ImageFile", "ImageSet", "check_images", "decode", "list_images", "load_images"]
__all__ += ["make_loader", "read_batches"]

_THREADS = 8  # that read files
_JUNK = {"thumbs.db", "desktop.ini"}


def scan(
    folder: Path, exclude: Iterable[Path] = (), kinds: frozenset[str] | None = None
) -> tuple[list[ImageFile], Counter]:
    """All images below a folder, ordered by their path alone, and what else lies there, counted by kind.

    Hidden files and folders, __MACOSX, and whatever a run wrote are no data.

    Args:
        folder: Links in it are followed, but never into a folder that they came from.
        exclude: Folders that are passed over.
        kinds: The endings, in lower case, of what is an image here; None takes what `decode` reads.

    Raises:
        UserError: There is no such folder, or it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    images, passed_over = [], Counter()
    excluded = {path.resolve() for path in exclude}
    kinds = suffixes() if kinds is None else kinds

    def visit(path: str, prefix: str, above: frozenset) -> None:
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as e:
            raise UserError(f"Cannot read the folder {path}: {e.strerror}.") from None
        for entry in entries:
            name = entry.name
            if entry.is_dir():
                status = entry.stat()
                identity = (status.st_dev, status.st_ino)
                if name.startswith(".") or name == "__MACOSX":
                    passed_over[f"folder {name}"] += 1
                elif identity in above:
                    passed_over["link to a folder around it"] += 1
                elif is_run(entry.path) or Path(entry.path).resolve() in excluded:
                    passed_over[f"folder {name} of a run"] += 1
                else:
                    visit(entry.path, f"{prefix}{name}/", above | {identity})
            elif name.startswith(".") or name.lower() in _JUNK:
                passed_over["hidden"] += 1
            elif (suffix := os.path.splitext(name)[1].lower()) in kinds:
                images.append(ImageFile(prefix + name, entry.path))
            else:
                passed_over[suffix or "without a suffix"] += 1

    visit(str(folder), "", frozenset([(folder.stat().st_dev, folder.stat().st_ino)]))
    return sorted(images), passed_over


def is_run(path: str) -> bool:
    """Whether training wrote the folder."""
    return os.path.isfile(os.path.join(path, "config.yaml")) and os.path.exists(os.path.join(path, ".lock"))


def say(passed_over: Counter) -> str:
    """What was passed over, in words: "3 .txt, 1 hidden"; nothing where nothing was."""
    parts = []
    for kind, count in sorted(passed_over.items(), key=lambda item: (-item[1], item[0])):
        reason = advice(kind)
        parts.append(f"{count} {kind}" + (f" ({reason})" if reason else ""))
    return ", ".join(parts)


def list_images(folder: Path) -> list[ImageFile]:
    """All images below a folder, as `scan` finds them.

    Raises:
        UserError: There is no such folder, or no image in it.
    """
    images, passed_over = scan(folder)
    if not images:
        raise UserError(f"There are no images in {folder}" + (f", but {say(passed_over)}." if passed_over else "."))
    return images


def check_images(images: Sequence[Encoded], full: bool = False) -> dict[int, UserError]:
    """The images that cannot be read, by their index; headers are read, with `full` all pixels.

    What was found good is remembered in the user's cache, by names, sizes and times of the files.
    """
    digest = hashlib.sha256(b"full" if full else b"headers")
    for image in images:
        with suppress(OSError):
            status = os.stat(image.path)
            digest.update(f"{image.path}\0{image.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nat_models" / "checked"
    remembered = folder / f"{digest.hexdigest()}.json"
    with suppress(OSError, ValueError):
        return {int(i): UserError(message) for i, message in json.loads(remembered.read_text()).items()}

    def check(image: Encoded) -> UserError | None:
        try:
            decode(image, 3) if full else check_header(image)
        except UserError as e:
            return e
        return None

    found = {i: error for i, error in enumerate(threaded(check, images)) if error is not None}
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = remembered.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({i: str(error) for i, error in found.items()}))
        os.replace(temporary, remembered)
    return found


def threaded(work: Callable, items: Iterable) -> list:
    """What `work` makes of each item, in their order."""
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        return list(pool.map(work, items))


class Items(Dataset):
    """What a data set of images has in common with others: items by number or by (epoch, number), errors as values.

    An unreadable image is an error that names it, where timm's ImageDataset would hand out its neighbour instead: a
    score over stand-ins is wrong.

    Args:
        size: Number of items.
        seed: Of an item that is asked for as (epoch, index): what `read` draws depends on these three numbers alone,
            whichever process reads it and whatever was read before.
    """

    collate: Callable[[list], list] = staticmethod(default_collate)  # makes a batch of items

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed

    def read(self, index: int) -> tuple:
        """The item."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int | tuple[int, int]) -> tuple:
        if not isinstance(index, tuple):
            return self.read(index)
        with drawing_from(self.seed, *index):
            return self.read(index[1])

    def __getitems__(self, indices: Sequence) -> list[tuple | UserError]:
        """What a DataLoader makes a batch of. An error is a value here: a DataLoader would raise another one in the
        main process, with the traceback of its worker for a message."""

        def read(index) -> tuple | UserError:
            try:
                return self[index]
            except UserError as e:
                return e

        return [read(index) for index in indices]


class ImageSet(Items):
    """(image, target) of listed images.

    Args:
        images: Where the images are.
        targets: What is learnt of each; None gives the image's index.
        in_chans: 1 decodes to grey, 3 to RGB.
        transform: Takes the decoded image.
        seed: As for Items, of what the transform draws.
        background: What is seen through transparent pixels.
    """

    def __init__(
        self,
        images: Sequence[Encoded],
        targets: Sequence | None,
        in_chans: int,
        transform: Callable,
        *,
        seed: int = 0,
        background: tuple[int, int, int] = WHITE,
    ):
        super().__init__(len(images), seed)
        self.images, self.targets, self.in_chans, self.transform = images, targets, in_chans, transform
        self.background = background

    def read(self, index: int) -> tuple[Tensor, Any]:
        image = self.transform(decode(self.images[index], self.in_chans, self.background))
        return image, index if self.targets is None else self.targets[index]


@contextmanager
def drawing_from(*numbers: int) -> Iterator[None]:
    """Random numbers of Python, NumPy and PyTorch (CPU) that depend on these numbers alone; then all is as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = derive_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _collate(items: list, collate: Callable[[list], list]) -> tuple[list | None, list[UserError]]:
    readable = [item for item in items if not isinstance(item, UserError)]
    return collate(readable) if readable else None, [item for item in items if isinstance(item, UserError)]


@functools.cache
def _ending() -> ctypes.c_byte:
    """What says in the memory of all processes, 1 or 0, whether this one is at its end."""
    ending = multiprocessing.RawValue(ctypes.c_byte, 0)
    atexit.register(setattr, ending, "value", 1)  # after multiprocessing's own, and so called before it
    return ending


def _start_worker(_: int, ending: ctypes.c_byte) -> None:
    """A terminal and some clusters signal workers too; the main process ends them when it has finished its step.

    Workers that an error left get their SIGTERM from multiprocessing at the main process's end, and are waited for.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *args: os._exit(0) if ending.value else None)
    torch.set_num_threads(1)


def make_loader(images: Dataset, batch_size: int, workers: int = 0, **kwargs) -> DataLoader:
    """A loader whose batches `read_batches` takes; accelerate may prepare it. `kwargs` go to DataLoader."""
    collate = functools.partial(_collate, collate=getattr(images, "collate", default_collate))
    start = functools.partial(_start_worker, ending=_ending()) if workers else None
    return DataLoader(images, batch_size, num_workers=workers, collate_fn=collate, worker_init_fn=start, **kwargs)


def load_images(
    images: Sequence[Encoded], data_config: Mapping, batch_size: int, workers: int = 0, **kwargs
) -> DataLoader:
    """A loader of images and their indices as `make_loader` makes one.

    Args:
        images: Where the images are.
        data_config: The preprocessing, in timm's words.
        batch_size: Images per step.
        workers: Processes that load images.
        **kwargs: Of the DataLoader.
    """
    image_set = ImageSet(images, None, data_config["input_size"][0], create_transform(**data_config))
    return make_loader(image_set, batch_size, workers, **kwargs)


def read_batches(loader: Iterable, on_error: Callable[[UserError], None] | None = None) -> Iterator[list[Tensor]]:
    """The batches of `make_loader`, [images, targets].

    Args:
        loader: What make_loader returned, as it is or wrapped.
        on_error: Is told of each unreadable image, which is then left out of its batch. None: the first one is raised.
    """
    try:
        for batch, errors in loader:
            for error in errors:
                if on_error is None:
                    raise error
                on_error(error)
            if batch is not None:
                yield batch
    finally:  # its traceback has this frame: such a cycle would keep the loader's workers when the error is handled
        loader = errors = error = None
