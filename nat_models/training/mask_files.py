"""A mask as its file holds it: one whole number per pixel, whatever that number means; and how it lies on its image."""

import warnings
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from ..errors import Unreadable, UserError
from .decoding import Encoded, describe, known_formats, suffixes

# Formats that give back the very numbers that were saved.
_EXACT = ("PNG", "TIFF", "BMP", "GIF", "TGA")
_INEXACT_TIFF = ("jpeg", "webp", "tiff_jpeg")
ARRAY = ".npy"
SUFFIXES = frozenset((".png", ".tif", ".tiff", ".bmp", ".gif", ".tga", ARRAY))
_WIDTH, _HEIGHT, _ORIENTATION = 256, 257, 274  # tags of EXIF and TIFF
_STEPS = {"L;2": 85, "L;2R": 85, "L;4": 17, "L;4R": 17}  # Pillow spreads 2 and 4 bits of grey over 0 .. 255


class MaskFile(NamedTuple):
    """A mask that is a file of its own.

    Attributes:
        name: Its path relative to the data, with slashes.
        path: The file.
        turn: The EXIF orientation, 1 to 8, by which it is turned to lie on its upright image.
    """

    name: str
    path: str
    turn: int = 1

    def open(self) -> BinaryIO:
        return open(self.path, "rb")


class Raw(NamedTuple):
    """What a mask's file holds.

    Attributes:
        values: [H, W] integers before they are turned by `orientation`; of colours 65536 * red + 256 * green + blue.
        orientation: The EXIF orientation that the file states itself, 1 where Pillow has turned it already; None where
            it states none.
        palette: [n, 3] uint8, RGB of its numbers; None without a palette.
    """

    values: np.ndarray
    orientation: int | None
    palette: np.ndarray | None


class Header(NamedTuple):
    """Of an image: height and width in pixels as they are stored, and the EXIF orientation, 1 where none is stated."""

    height: int
    width: int
    orientation: int


def with_arrays() -> frozenset[str]:
    """The endings, in lower case, of images that may have any number of bands."""
    return suffixes() | {ARRAY}


def is_array(image: Encoded) -> bool:
    """Whether it is an array that NumPy saved."""
    return image.path.lower().endswith(ARRAY)


def load_array(image: Encoded) -> np.ndarray:
    """The array of a .npy file, mapped into memory.

    Raises:
        Unreadable: It cannot be read.
    """
    try:
        return np.load(image.path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise Unreadable(f"{describe(image)} cannot be read as an array: {e}") from None


def read_header(image: Encoded) -> Header:
    """Size and orientation of an image, without its pixels where its format allows.

    Raises:
        Unreadable: It is no image.
    """
    if is_array(image):
        shape = load_array(image).shape
        if len(shape) not in (2, 3):
            raise UserError(f"{describe(image)} must be an array [H, W] or [H, W, C], got the shape {list(shape)}.")
        return Header(shape[0], shape[1], 1)
    try:
        with warnings.catch_warnings(), image.open() as file:
            warnings.simplefilter("ignore")
            with Image.open(file, formats=known_formats()) as opened:
                if opened.format == "PNG":
                    opened.load()  # its EXIF may follow the pixels
                elif opened.format == "TIFF":  # Pillow gives the size when it is turned
                    tags = opened.tag_v2
                    return Header(tags[_HEIGHT], tags[_WIDTH], _stated(opened) or 1)
                return Header(opened.height, opened.width, _stated(opened) or 1)
    except Exception as e:  # of a damaged file, Pillow's plugins raise whatever they happen to meet
        raise Unreadable(f"{describe(image)} cannot be read as an image: {e or type(e).__name__}") from None


def read_raw(mask: Encoded, coloured: bool) -> Raw:
    """The numbers of a mask's file.

    Palettes give their indices, grey in 1, 2, 4, 8, 16 or 32 bits its numbers (Pillow alone spreads 2 and 4 bits over
    0 .. 255), arrays [H, W] their integers. RGB gives numbers only where red, green and blue are equal everywhere; with
    `coloured`, everything gives colours.

    Args:
        mask: The file.
        coloured: Whether colours are read, for a table of colours.

    Raises:
        Unreadable: It cannot be read.
        UserError: Its format does not keep numbers exactly (JPEG and others); it holds colours and `coloured` is False;
            it has several frames, transparent pixels, fractions, or 16 bits in several channels.
    """
    if is_array(mask):
        return _from_array(mask, coloured)
    try:
        with warnings.catch_warnings(), mask.open() as file:
            warnings.simplefilter("ignore")
            with Image.open(file, formats=known_formats()) as opened:
                return _from_image(opened, coloured)
    except UserError as e:
        raise UserError(f"{describe(mask)} {e}") from None
    except Exception as e:
        raise Unreadable(f"{describe(mask)} cannot be read as a mask: {e or type(e).__name__}") from None


def _from_array(mask: Encoded, coloured: bool) -> Raw:
    array = load_array(mask)
    if coloured or array.ndim != 2 or array.dtype.kind not in "bui" or not array.size:
        wanted = "a picture, because classes are told by colours" if coloured else "an array [H, W] of integers"
        raise UserError(f"{describe(mask)} must be {wanted}; it is an array {list(array.shape)} of {array.dtype}.")
    return Raw(np.array(array, dtype=np.uint8 if array.dtype.kind == "b" else None), None, None)


def _from_image(image: Image.Image, coloured: bool) -> Raw:
    compression = str(image.info.get("compression", ""))
    if image.format not in _EXACT or compression in _INEXACT_TIFF:
        kind = f"a TIFF with {compression} inside" if image.format == "TIFF" else f"a {image.format} file"
        raise UserError(
            f"is {kind}, which may not give back the numbers that were saved: save masks as PNG, from their source."
        )
    if getattr(image, "n_frames", 1) > 1:
        raise UserError(f"holds {image.n_frames} frames: a mask is one.")
    # How the numbers lie in the file, in Pillow's words, such as L;4 for grey of 4 bits.
    detail = image.tile[0][3] if image.tile else ""
    raw_mode = str(detail[0] if isinstance(detail, tuple) else detail)
    if raw_mode.startswith("L;") and "I" in raw_mode:
        raise UserError("stores its numbers inverted (0 is white): save it as PNG, from its source.")
    if "16" in raw_mode and image.mode in ("LA", "RGB", "RGBA"):
        raise UserError("has 16 bits for each of several channels, of which 8 would be lost: save it in one channel.")
    step, before = _STEPS.get(raw_mode, 1), _stated(image)
    image.load()
    orientation, mode = _stated(image), image.mode
    if before is not None and orientation is None:
        orientation = 1  # a TIFF, which Pillow has turned
    if mode in ("LA", "RGBA"):
        if image.getchannel("A").getextrema() != (255, 255):
            raise UserError("has transparent pixels, which are no class: save it without transparency.")
        image = image.convert(mode := mode[:-1])
    palette = None
    if mode == "P":
        palette = np.asarray(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    if coloured and mode in ("1", "L", "P"):
        image = image.convert(mode := "RGB")
    if mode == "RGB":
        pixels = np.asarray(image)
        if coloured:
            return Raw(pack(pixels), orientation, palette)
        if (pixels != pixels[..., :1]).any():
            colour = pixels[(pixels != pixels[..., :1]).any(axis=2)][0]
            raise UserError(
                f"holds colours, such as {name_colour(pack(colour))}: name them in classes.json, "
                f'{{"colours": {{"{name_colour(pack(colour))}": "road"}}}}.'
            )
        return Raw(np.ascontiguousarray(pixels[..., 0]), orientation, None)
    if coloured or not (mode in ("1", "L", "P", "I") or mode.startswith("I;16")):
        fraction = ": a class is a whole number" if mode == "F" else ""
        raise UserError(f"is of Pillow's mode {mode}, which is none of a {'coloured ' * coloured}mask{fraction}.")
    values = np.asarray(image)
    values = values.astype(np.int32 if values.itemsize > 1 else np.uint8)
    return Raw(values // step if step > 1 else values, orientation, palette)


def _stated(image: Image.Image) -> int | None:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata say nothing
        return None
    return orientation if orientation in range(1, 9) else None


def pack(colours: np.ndarray) -> np.ndarray:
    """RGB, [..., 3] uint8, as one number per colour, [...] int32."""
    return colours.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)


def unpack(colour: int) -> tuple[int, int, int]:
    """Red, green and blue of a packed colour."""
    return colour >> 16, colour >> 8 & 255, colour & 255


def name_colour(colour: int) -> str:
    """A packed colour as #rrggbb."""
    return f"#{colour:06x}"


def turn(values: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W] turned upright, as an EXIF orientation of 1 to 8 says."""
    if orientation in (5, 7):
        values = values.T
    values = {2: np.fliplr, 4: np.flipud}.get(orientation, lambda x: x)(values)
    return np.rot90(values, {3: 2, 6: -1, 7: 2, 8: 1}.get(orientation, 0))


def turn_to(image: Encoded, header: Header, mask: Encoded, raw: Raw, lies: str) -> int:
    """The orientation by which a mask is turned to lie on its upright image.

    A mask that states an orientation is turned by it. Else one of the upright image's size is left, and one of the
    size that the image is stored in is turned with it. Where a mask has both sizes, because the image is square or
    turned by 180 degrees, nothing in the files tells which is right.

    Args:
        image: The image, for errors; `header` is what it says of itself.
        header: Of the image.
        mask: Its mask, for errors.
        raw: What the mask's file holds.
        lies: "shown" if masks without an orientation lie as the image is shown, "stored" if as it is stored; "auto"
            tells it by the sizes.

    Raises:
        UserError: The sizes differ, or do not tell.
    """
    stored = header.height, header.width
    shown = stored[::-1] if header.orientation >= 5 else stored
    own = raw.values.shape
    if raw.orientation is not None:
        result, size = raw.orientation, own[::-1] if raw.orientation >= 5 else own
        fits = size == shown
    elif header.orientation == 1:
        result, fits = 1, own == shown
    elif lies == "auto" and own == shown == stored:
        raise UserError(
            f"{describe(mask)} fits {describe(image)} as it is stored and as its EXIF orientation "
            f"({header.orientation}) shows it: say with mask_orientation which, stored or shown."
        )
    elif own == stored and lies in ("auto", "stored"):
        result, fits = header.orientation, True
    else:
        result, fits = 1, own == shown and lies != "stored"
    if not fits:
        raise UserError(
            f"{describe(mask)} has {own[1]} x {own[0]} pixels, and {describe(image)} {stored[1]} x {stored[0]}"
            + (f", shown as {shown[1]} x {shown[0]}" if shown != stored else "")
            + (f"; mask_orientation is {lies}" if lies != "auto" else "")
            + "."
        )
    return result
