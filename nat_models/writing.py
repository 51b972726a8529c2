"""Files and folders that are whole or not there, and what a disk refuses as an error of one line."""

import csv
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from .errors import UserError


@contextmanager
def writing(path: Path, advice: str = "choose another --output") -> Iterator[None]:
    """Turns what a disk refuses into an error of one line; `advice` is what to do about it."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise UserError(f"Cannot write {path}: {getattr(e, 'strerror', None) or e}: {advice}.") from None


def write_atomically(path: Path, content: str | bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


@contextmanager
def text_file(path: Path) -> Iterator[TextIO]:
    """A text file that is written as its rows come, under a temporary name until all is well. Names of files may stand
    in it, which are bytes of any encoding. What the disk refuses meanwhile is an error of one line."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with writing(path), open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def swap_folder(new: Path, path: Path) -> None:
    """Puts a finished folder in the place of an older one. No system call replaces a folder that is not empty, so for
    an instant there is none at `path`, and `restore_folder` puts the older one back; half of one there never is."""
    old = path.with_name(f"{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(path: Path) -> None:
    old = path.with_name(f"{path.name}.old")
    if old.is_dir() and not path.exists():
        os.replace(old, path)


def csv_text(rows: Iterable[Sequence]) -> str:
    """Rows as CSV, the first one the names of the columns."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
