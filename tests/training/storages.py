"""One picture stored in the ways that people store pictures."""

from pathlib import Path

import numpy as np
from PIL import Image

_TURNED = Image.Exif()
_TURNED[0x0112] = 6  # as a camera held upright writes it: to be turned clockwise by a quarter


def store(image: Image.Image, path: Path, how: str) -> Path:
    """Writes a picture, grey or RGB, in the way `how`; returns the file."""
    suffix, write = STORAGES[how]
    path = path.with_suffix(suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(image, path)
    return path


def _png16(image: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)


def _turned(image: Image.Image, path: Path) -> None:
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=_TURNED, quality=95)


def _float(image: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255).save(path)


def _alpha(image: Image.Image, path: Path) -> None:
    opaque = image.convert("RGBA")
    wider = Image.new("RGBA", image.size, (255, 0, 0, 0))  # red that nobody sees
    wider.paste(opaque)
    wider.save(path)


STORAGES = {
    "png": (".png", lambda image, path: image.save(path)),
    "exif": (".jpg", _turned),
    "exif_png": (".png", _turned),
    "png16": (".png", _png16),
    "float": (".tiff", _float),
    "webp": (".webp", lambda image, path: image.save(path, lossless=True)),
    "avif": (".avif", lambda image, path: image.convert("RGB").save(path, quality=95)),
    "tiff": (".TIF", lambda image, path: image.save(path, format="TIFF")),
    "bmp": (".bmp", lambda image, path: image.save(path)),
    "gif": (".gif", lambda image, path: image.convert("RGB").save(path)),
    "jfif": (".jfif", lambda image, path: image.save(path, format="JPEG", quality=95)),
    "ppm": (".ppm", lambda image, path: image.convert("RGB").save(path)),
    "cmyk": (".jpg", lambda image, path: image.convert("RGB").convert("CMYK").save(path, quality=95)),
    "palette": (".png", lambda image, path: image.convert("RGB").quantize(256).save(path)),
    "alpha": (".png", _alpha),
}
