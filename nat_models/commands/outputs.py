"""Folders that `nat-models predict` writes, for each image files of its name: where they may lie, and those names."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch

from ..errors import UserError
from ..training.decoding import Encoded, describe
from ..training.mask_sets import read_image
from ..training.report import track
from ..writing import write_atomically


def check_output(output: Path, sources: Sequence[str]) -> None:
    """Raises a UserError for a folder inside what is read."""
    for source in sources:
        if Path(source).is_dir() and output.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(
                f"--output {output} must not lie in what is read, {source}: its pictures would be read too."
            )


def read_pictures(
    chunks: Iterable[Sequence[Encoded]], bands: int, what: str, *, skip_unreadable: bool
) -> Iterator[tuple[Encoded, str, torch.Tensor]]:
    """Images with the stems of their files, see `_stem_of`, and their pixels (bands, height, width).

    Raises:
        UserError: An image cannot be read, unless they are skipped; none can; or two have the same stem.
    """
    taken: dict[str, str] = {}
    read = skipped = 0
    for images in chunks:
        for image in track(images, "images"):
            stem = _stem_of(image, taken, what)
            try:
                picture = read_image(image, bands)
            except UserError as e:
                if not skip_unreadable:
                    raise
                print(f"skipped: {e}", file=sys.stderr)
                skipped += 1
                continue
            read += 1
            yield image, stem, picture
    if skipped and not read:
        raise UserError(f"None of the {skipped} images can be read.")


def _stem_of(image: Encoded, taken: dict[str, str], what: str) -> str:
    """The image's name without its suffix, below the folder that it was found in; of a single file the last part.

    Args:
        image: The image.
        taken: The images of earlier stems, by stem; gains this one.
        what: The file that is called so, "label map STEM.png" without the stem.

    Raises:
        UserError: Another image has that stem.
    """
    name = PurePosixPath(image.name)
    if name.is_absolute() or ".." in name.parts or image.name == Path(image.path).as_posix():
        name = PurePosixPath(name.name)
    stem = str(name.with_suffix(""))
    if (other := taken.setdefault(stem, describe(image))) != describe(image):
        kind, _, suffix = what.rpartition(" ")
        raise UserError(f"{other} and {describe(image)} would both have the {kind} {stem}{suffix}: rename one.")
    return stem


def write_below(path: Path, content: bytes) -> None:
    """Writes a file, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
