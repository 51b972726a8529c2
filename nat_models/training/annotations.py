"""Annotated images in flat arrays, which the workers of a loader share without copying a Python object."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from .decoding import ImageFile
from .outlines import Outlines


@dataclass(frozen=True)
class Texts:
    """Texts in one array.

    Attributes:
        data: uint8, UTF-8 of all of them.
        starts: [N + 1] int64; text i is starts[i] to starts[i + 1].
    """

    data: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        encoded = [text.encode(errors="surrogateescape") for text in texts]
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([0, *map(len, encoded)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        text = self.data[self.starts[index] : self.starts[index + 1]]
        return text.tobytes().decode(errors="surrogateescape")


class Objects(NamedTuple):
    """What is annotated on one image, all of it on the upright image.

    Attributes:
        image_id: The user's.
        size: (height, width) px of the image.
        boxes: [N, 4] float32, (x1, y1, x2, y2) px.
        labels: [N] int64, indices of classes.
        areas: [N] float64 px, of the outlines as the user gave them, else of the boxes.
        crowd: [N] bool; a crowd is neither an object nor background.
        ids: [N] int64, the user's, above 0.
        outlines: N of them.
    """

    image_id: int
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    ids: np.ndarray
    outlines: Outlines


@dataclass(frozen=True)
class AnnotatedPart:
    """Images and what is annotated on them, for M images and N objects.

    Attributes:
        names: Of the images, relative to the data.
        paths: Of their files.
        image_ids: [M] int64, the user's.
        sizes: [M, 2] int32, height and width of the upright images.
        starts: [M + 1] int64; the objects of image i are starts[i] to starts[i + 1].
        boxes: As in Objects, of all images; so are the others.
        labels: Of all objects.
        areas: Of all objects.
        crowd: Of all objects.
        ids: Of all objects.
        outlines: Of all objects.
    """

    names: Texts
    paths: Texts
    image_ids: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    ids: np.ndarray
    outlines: Outlines

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Objects:
        start, stop = self.starts[index : index + 2].tolist()
        own = slice(start, stop)
        return Objects(
            int(self.image_ids[index]),
            tuple(self.sizes[index].tolist()),
            self.boxes[own],
            self.labels[own],
            self.areas[own],
            self.crowd[own],
            self.ids[own],
            self.outlines.between(start, stop),
        )

    def __iter__(self) -> Iterator[Objects]:
        return (self[i] for i in range(len(self)))

    def image(self, index: int) -> ImageFile:
        """The file of an image."""
        return ImageFile(self.names[index], self.paths[index])

    @property
    def images(self) -> Sequence[ImageFile]:
        """The files of all images, made as they are asked for."""
        return _Images(self)

    @property
    def sizes_of_objects(self) -> np.ndarray:
        """[N, 2] int32: height and width of the image of each object."""
        return np.repeat(self.sizes, np.diff(self.starts), axis=0)

    def subset(self, kept: Sequence[int]) -> "AnnotatedPart":
        """Some of the images, with what is on them: without negatives, for one."""
        objects = [i for image in kept for i in range(self.starts[image], self.starts[image + 1])]
        counts = np.diff(self.starts)[np.asarray(kept, np.int64)]
        return AnnotatedPart(
            Texts.of(self.names[i] for i in kept),
            Texts.of(self.paths[i] for i in kept),
            self.image_ids[kept],
            self.sizes[kept],
            np.cumsum([0, *counts], dtype=np.int64),
            *(array[objects] for array in (self.boxes, self.labels, self.areas, self.crowd, self.ids)),
            Outlines.of(self.outlines[i] for i in objects),
        )

    def update(self, digest) -> None:
        """Adds all that is in the arrays to a hash, but for where the files lie."""
        for field in fields(self):
            if field.name != "paths":
                value = getattr(self, field.name)
                for array in (value,) if isinstance(value, np.ndarray) else vars(value).values():
                    digest.update(hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest())


class _Images(Sequence):
    def __init__(self, part: AnnotatedPart):
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> ImageFile:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.part.image(index)
