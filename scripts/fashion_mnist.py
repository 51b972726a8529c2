"""Writes Fashion-MNIST as folders of PNG files, for the run that docs/fashion_mnist.md shows.

    python scripts/fashion_mnist.py SOURCE FOLDER
    python scripts/fashion_mnist.py digits FOLDER

SOURCE holds the four files of the data set (train-images-idx3-ubyte.gz and so on), as Debian's package
dataset-fashion-mnist has them. FOLDER gets train/CLASS/ with 60,000 images and test/CLASS/ with 10,000, 28 x 28 and
grey; it appears when it is complete.

`digits` writes scikit-learn's handwritten digits in the same manner, light on dark.

Source: Xiao, Rasul, Vollgraf, arXiv:1708.07747.
"""

import gzip
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")


def read(source: Path, name: str, header: int) -> np.ndarray:
    """The bytes of an IDX file after its header."""
    path = source / name
    if not path.is_file():
        path = source / f"{name}.gz"
    if not path.is_file():
        raise SystemExit(f"error: there is no {name}, or {name}.gz, in {source}")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return np.frombuffer(content, np.uint8, offset=header)


def write_digits(temporary: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = temporary / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels / 16 * 255).round().astype("uint8"))
        image.resize((32, 32), Image.Resampling.BICUBIC).save(path)


def write_fashion(source: Path, temporary: Path) -> None:
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = read(source, f"{prefix}-images-idx3-ubyte", 16).reshape(-1, 28, 28)
        labels = read(source, f"{prefix}-labels-idx1-ubyte", 8)
        for name in CLASSES:
            (temporary / part / name).mkdir(parents=True)
        for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(pixels).save(temporary / part / CLASSES[label] / f"{i:05}.png")


def main(source: str, folder: Path) -> None:
    if folder.exists():
        raise SystemExit(f"error: {folder} exists already")
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if source == "digits":
        write_digits(temporary)
    else:
        write_fashion(Path(source), temporary)
    temporary.rename(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]))
