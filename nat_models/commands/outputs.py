"""Folders that `nat-models predict` writes: where they may lie, and what the files of an image are called."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..errors import UserError
from ..training.decoding import Encoded, describe
from ..writing import write_atomically


def check_output(output: Path, sources: Sequence[str]) -> None:
    """Raises a UserError for a folder inside what is read."""
    for source in sources:
        if Path(source).is_dir() and output.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(
                f"--output {output} must not lie in what is read, {source}: its pictures would be read too."
            )


def stem_of(image: Encoded, taken: dict[str, str], what: str) -> str:
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
