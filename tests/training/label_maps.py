"""Small images with masks, in every way that people save them."""

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (32, 40)
GREEN, RED = (0, 128, 0), (255, 0, 0)
# Of three classes, none of them in the same places when turned or mirrored.
LABELS = np.zeros(SIZE, np.uint8)
LABELS[:9, :] = 1
LABELS[20:30, 3:20] = 2
ORIENTED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[:, ::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[::-1].swapaxes(0, 1),
}  # what a camera stores of an upright picture, by the EXIF standard


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def put(path: Path, content: Image.Image | np.ndarray | bytes, **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray) and path.suffix == ".npy":
        np.save(path, content)
    else:
        (Image.fromarray(content) if isinstance(content, np.ndarray) else content).save(path, **kwargs)
    return path


def put_pairs(root: Path, masks: Mapping[str, object] | np.ndarray = LABELS, count: int = 4) -> Path:
    """images/ and masks/: one pair for each mask, or `count` pairs with one and the same."""
    masks = masks if isinstance(masks, Mapping) else {str(i): masks for i in range(count)}
    for i, (stem, mask) in enumerate(masks.items()):
        put(root / "images" / f"{stem}.png", picture(i))
        put(root / "masks" / f"{stem}.png", mask)
    return root


def palette_image(labels: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.frombytes("P", labels.shape[::-1], labels.tobytes())
    flat = [x for colour in colours for x in colour]
    image.putpalette(flat + [0] * (768 - len(flat)))
    return image


def _rows(labels: np.ndarray, bits: int) -> np.ndarray:
    """Each row in fewer than 8 bits a pixel."""
    weights = 1 << np.arange(8 - bits, -1, -bits)
    padded = np.pad(labels, ((0, 0), (0, -labels.shape[1] % (8 // bits))))
    return (padded.reshape(len(labels), -1, 8 // bits) * weights).sum(2).astype(np.uint8)


def grey_tiff(labels: np.ndarray, bits: int, white_is: int = 1) -> bytes:
    """A TIFF of grey in few bits; with white_is=0 its numbers are inverted."""
    data = (labels if bits == 8 else _rows(labels, bits)).tobytes()
    height, width = labels.shape
    entries = [
        (256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, white_is), (273, 4, 200),
        (277, 3, 1), (278, 4, height), (279, 4, len(data)),
    ]  # fmt: skip
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return (b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)).ljust(200, b"\0") + data


def grey_png(labels: np.ndarray, bits: int) -> bytes:
    """A PNG of grey in fewer than 8 bits, which Pillow reads but does not write."""
    rows = _rows(labels, bits)

    return _png(labels.shape, bits, 0, b"".join(b"\0" + row.tobytes() for row in rows))


def rgb_16(labels: np.ndarray) -> bytes:
    """A PNG of grey in three channels of 16 bits."""
    rows = np.stack([labels] * 3, axis=2).astype(">u2")
    return _png(labels.shape, 16, 2, b"".join(b"\0" + row.tobytes() for row in rows))


def _png(shape: tuple[int, int], bits: int, kind: int, rows: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", shape[1], shape[0], bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def five_bands() -> bytes:
    """A TIFF of RGB and two more bands, 2 x 2 pixels, uncompressed."""
    entries = [
        (256, 4, 1, 2), (257, 4, 1, 2), (258, 3, 5, 300), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 400),
        (277, 3, 1, 5), (278, 4, 1, 2), (279, 4, 1, 20), (284, 3, 1, 1), (338, 3, 2, 0),
    ]  # fmt: skip
    body = b"".join(struct.pack("<HHI", tag, kind, n) + struct.pack("<I", value) for tag, kind, n, value in entries)
    directory = struct.pack("<H", len(entries)) + body + struct.pack("<I", 0)
    file = (b"II*\0" + struct.pack("<I", 8) + directory).ljust(300, b"\0")
    return (file + struct.pack("<5H", *[8] * 5)).ljust(400, b"\0") + bytes(range(20))


def colours_of(labels: np.ndarray, *colours: tuple[int, int, int]) -> np.ndarray:
    return np.array(colours, np.uint8)[labels]
