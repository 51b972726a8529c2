"""An encoded image as pixels: every still format of Pillow that needs no other program, in 8 bits, upright."""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ..errors import Unreadable

# What people keep pictures in. Of the rest that Pillow opens, some are no pictures (HDF5, GRIB, MPEG), and some are
# programs that another program would have to run (EPS, PDF, WMF).
_FORMATS = tuple(
    "AVIF BMP DDS DIB GIF HEIF ICNS ICO JPEG JPEG2000 MPO PCX PNG PPM PSD QOI SGI TGA TIFF WEBP".split()  # noqa: SIM905
)
# Pictures of cameras and phones that Pillow opens with a plugin, or in no way.
_UNREADABLE = {".heic", ".heif", ".avif", ".webp", ".jxl", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".exr"}

WHITE = (255, 255, 255)


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


@functools.cache
def suffixes() -> frozenset[str]:
    """The endings, in lower case, of files that are images."""
    return frozenset(s for s, format in Image.registered_extensions().items() if format in _FORMATS)


def advice(suffix: str) -> str:
    """What to do about a picture that this Pillow cannot read, or nothing where the suffix is none of a picture."""
    if suffix not in _UNREADABLE:
        return ""
    if suffix in (".heic", ".heif"):
        return "which Pillow reads with pillow-heif registered; convert them"
    return "which this Pillow cannot read; convert them"


def decode(image: Encoded, in_chans: int, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """The image in mode L for one channel, RGB for three.

    Upright, as its EXIF orientation says; the first frame of several; composited on `background` where it is
    transparent. 16-bit grey is scaled by its range, 65,535 to 255; so are 32-bit integers within that range. Grey in
    floating point is scaled by 255 if it lies within [0, 1], and taken as it is if it lies within [0, 255].

    Raises:
        Unreadable: It cannot be read, or its range is not known; the message names it.
    """
    with _opened(image) as opened:
        opened.load()
        return _to_8_bits(_upright(opened), background).convert("L" if in_chans == 1 else "RGB")


def check_header(image: Encoded) -> None:
    """Opens an image without decoding its pixels.

    Raises:
        Unreadable: It is no image.
    """
    with _opened(image):
        pass


@contextmanager
def _opened(image: Encoded) -> Iterator[Image.Image]:
    """The image with its header read; whatever is wrong with it within the block is Unreadable."""
    try:
        with warnings.catch_warnings(), image.open() as file:
            warnings.simplefilter("ignore")  # of large images and damaged metadata; damaged pixels are errors
            with Image.open(file, formats=known_formats()) as opened:
                yield opened
    except Exception as e:  # of a damaged file, Pillow's plugins raise whatever they happen to meet
        raise Unreadable(f"{describe(image)} cannot be read as an image: {e or type(e).__name__}") from None


def describe(image: Encoded) -> str:
    """Where the image is: its file, and what it is called in a file of many."""
    return image.path if image.path.endswith(image.name) else f"{image.path}: {image.name}"


@functools.cache
def known_formats() -> list[str]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata say nothing, and do no harm to the pixels
        return image


def _to_8_bits(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"integers from {values.min()} to {values.max()}, whose range is not known: use 16 bits")
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        clear = image.info.get("transparency")
        if isinstance(clear, int):  # PNG's one transparent grey
            grey[values == clear] = round(sum(background) / 3)
        return Image.fromarray(grey)
    if image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 255):
            raise ValueError(
                f"floating point from {values.min()} to {values.max()}: it must lie within [0, 1] or [0, 255]"
            )
        return Image.fromarray((values * (255 if values.max() <= 1 else 1)).round().astype(np.uint8))
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image.convert("RGBA"))
    return image
