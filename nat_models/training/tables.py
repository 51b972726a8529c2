"""Tables of images and labels: CSV, TSV, JSON lines, parquet, and folders that Hugging Face datasets saved."""

import csv
import functools
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import UserError
from .decoding import ImageFile
from .listing import Listing, part_named, refuse, some, tidy_labels

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_IMAGE = ("path", "image", "image_path", "file", "file_name", "filename", "filepath", "img", "image_file")
_LABEL = ("label", "labels", "class", "target", "category", "class_name", "fine_label")
_SPLIT = ("split", "set", "subset", "partition")


class Columns(NamedTuple):
    """The names of a table's columns; None means the usual ones."""

    image: str | None = None
    label: str | None = None
    split: str | None = None


USUAL = Columns()


class TableRow(NamedTuple):
    """An image whose bytes are in a row of a parquet file or of a saved dataset."""

    name: str
    path: str
    files: tuple[str, ...]  # none of them: a dataset that datasets saved at `path`
    column: str
    row: int

    def open(self) -> BinaryIO:
        cell = _dataset(self.path, self.files)[self.row][self.column]
        if cell["bytes"] is not None:
            return io.BytesIO(cell["bytes"])
        return open(os.path.join(os.path.dirname(self.path), cell["path"]), "rb")


@functools.lru_cache(maxsize=8)  # a process opens each once; it is mapped into memory, not read
def _dataset(path: str, files: tuple[str, ...]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are told once, as ours
    if files:
        found = datasets.load_dataset("parquet", data_files=list(files), split="train")
    else:
        found = datasets.load_from_disk(path)
    for name, feature in found.features.items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(name, datasets.Image(decode=False))
    return found


def read_table(path: Path, columns: Columns, labelled: bool = True) -> Listing:
    """The rows of a table. Paths of images are relative to its folder.

    A column "labels" has any number of labels per image: a list, or words joined by ; or |.

    Raises:
        UserError: A column is missing, a split has no known name, a label is empty, an image is missing or there twice.
    """
    if path.suffix.lower() == ".parquet":
        return read_datasets({"": (str(path), (str(path),))}, columns, labelled)
    rows = _rows(path)
    if not rows:
        raise UserError(f"{path} has no rows.")
    image, label, split = _choose(path, list(rows[0]), columns, labelled)
    names = [str(row[image] or "").strip() for row in rows]
    labels = [row[label] if label else None for row in rows]
    splits = [row[split] if split else None for row in rows]
    images = [ImageFile(Path(name).as_posix(), str(path.parent / name)) for name in names]
    refuse([f"line {i + 2}" for i, name in enumerate(names) if not name], f"rows of {path} name no image")
    refuse([file.path for file in images if not os.path.isfile(file.path)], f"images of {path} are missing")
    return _listing(path, images, labels, splits, label, labelled)


def _rows(path: Path) -> list[dict]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix.lower() in (".csv", ".tsv"):
                start = file.readline()
                file.seek(0)
                # Where the comma is the decimal point, spreadsheets separate by semicolons.
                separator = (
                    "\t" if path.suffix.lower() == ".tsv" else ";" if start.count(";") > start.count(",") else ","
                )
                rows = list(csv.DictReader(file, delimiter=separator))
                refuse([f"line {i + 2}" for i, row in enumerate(rows) if None in row], f"rows of {path} are too long")
                return rows
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError, csv.Error) as e:
        raise UserError(f"{path} cannot be read as a table: {e}.") from None


def _choose(path: Path, found: Sequence[str], columns: Columns, labelled: bool) -> tuple[str, str | None, str | None]:
    chosen = []
    for what, asked, usual in zip(Columns._fields, columns, (_IMAGE, _LABEL, _SPLIT), strict=True):
        if asked is not None and asked not in found:
            raise UserError(f"{path} has no column {asked!r} (--{what}-column), only {', '.join(found)}.")
        by_lower = {name.strip().lower(): name for name in reversed(found)}
        chosen.append(asked or next((by_lower[name] for name in usual if name in by_lower), None))
    for what, name, usual in zip(Columns._fields, chosen, (_IMAGE, _LABEL, ()), strict=True):
        if name is None and usual and (what == "image" or labelled):
            raise UserError(
                f"{path} has none of the usual columns for the {what} ({', '.join(usual)}), only {', '.join(found)}: "
                f"name it with --{what}-column."
            )
    return tuple(chosen)


def _listing(
    path: Path, images: Sequence, labels: Sequence, splits: Sequence, column: str | None, labelled: bool
) -> Listing:
    listing = Listing(multi_label=labelled and (column or "").strip().lower() == "labels")
    seen = set()
    refuse([image.name for image in images if image in seen or seen.add(image)], f"images of {path} are listed twice")
    if listing.multi_label:
        several = [_several(label) for label in labels]
    elif labelled:
        several = [(label,) for label in tidy_labels(["" if label is None else str(label) for label in labels])]
        refuse(
            [image.name for image, (label,) in zip(images, several, strict=True) if not label], "images have no label"
        )
    else:
        several = [()] * len(images)
    unknown = {str(split) for split in splits if split is not None and part_named(str(split)) is None}
    refuse(sorted(map(repr, unknown)), f"words in the split column of {path} are none of train, val, test")
    for image, labels_, split in zip(images, several, splits, strict=True):
        listing.add("" if split is None else part_named(str(split)), image, labels_)
    return listing


def _several(labels: Any) -> tuple[str, ...]:
    if labels is None:
        return ()
    if isinstance(labels, str):
        labels = labels.replace("|", ";").split(";")
    labels = labels if isinstance(labels, (list, tuple)) else [labels]
    return tuple(dict.fromkeys(label for label in (str(x).strip() for x in labels) if label))


def is_saved_dataset(folder: Path) -> bool:
    """Whether Hugging Face datasets saved the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_saved_dataset(folder: Path, columns: Columns, labelled: bool = True) -> Listing:
    """A Dataset or a DatasetDict that was saved with save_to_disk."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        refuse([name for name in splits if part_named(name) is None], "splits are none of train, validation, test")
        return read_datasets({part_named(name): (str(folder / name), ()) for name in splits}, columns, labelled)
    return read_datasets({"": (str(folder), ())}, columns, labelled)


def parquet_parts(folder: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The parquet files of a folder, as the Hub's repositories have them: data/train-00000-of-00002.parquet."""
    parts: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        part = part_named(path.name.partition("-")[0].partition(".")[0]) or part_named(path.parent.name) or ""
        parts.setdefault(part, []).append(str(path))
    if "" in parts and len(parts) > 1:
        raise UserError(f"Parquet files that begin with none of train, validation, test: {some(parts[''])}.")
    return {part: (files[0], tuple(files)) for part, files in parts.items()}


def read_datasets(parts: dict[str, tuple[str, tuple[str, ...]]], columns: Columns, labelled: bool = True) -> Listing:
    """Images and labels of parquet files or saved datasets, by part."""
    import datasets

    listing = Listing()
    for part, (path, files) in parts.items():
        try:
            rows = _dataset(path, files)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
            raise UserError(f"{path} cannot be read as a dataset: {' '.join(str(e).split())}.") from None
        image, label, split = _choose(Path(path), rows.column_names, columns, labelled)
        feature = rows.features[label] if label else None
        labels = list(rows[label]) if label else [None] * len(rows)
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.ClassLabel):
            listing.names = inner.names
            text = lambda x: inner.names[x] if x is not None and x >= 0 else None  # noqa: E731, B023
            labels = [[text(x) for x in label] if isinstance(label, list) else text(label) for label in labels]
        if isinstance(rows.features[image], (datasets.Image, dict)):
            images = [TableRow(f"{part or 'row'}/{i:08}", path, files, image, i) for i in range(len(rows))]
        else:
            files_ = [(str(name), str(Path(path).parent / str(name))) for name in rows[image]]
            images = [ImageFile(Path(name).as_posix(), file) for name, file in files_]
            refuse([file.path for file in images if not os.path.isfile(file.path)], f"images of {path} are missing")
        splits = list(rows[split]) if split and not part else [part or None] * len(rows)
        found = _listing(Path(path), images, labels, splits, label, labelled)
        listing.multi_label |= found.multi_label
        for name, items in found.parts.items():
            listing.parts.setdefault(name, []).extend(items)
    return listing
