"""Fine-tunes UPerNet on NAT-Mini to find handwritten digits on photographs, and looks at what it learnt.

    python scripts/demo_segment.py

The data are made on the spot: scikit-learn's digits, enlarged and turned, on patches of scikit-image's photographs; a
label map says of each pixel which digit's ink it is. No digit and no patch of the held-out images is among the training
images. The backbone starts from what scripts/demo.py trained. Everything lands in demo/segment/: data/, run/ and
report/. An interrupted demo is resumed; a finished one is started over. Fails below a mean IoU of 70 %.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from sklearn.datasets import load_digits

from nat_models.errors import CheckpointError, Stopped, UserError
from nat_models.resources import resource
from nat_models.training.drawing import draw_truth, png
from nat_models.training.engine import train
from nat_models.training.mask_sets import to_picture
from nat_models.training.report import console
from nat_models.training.segmenters import load_segmenter
from nat_models.training.settings import read_yaml
from nat_models.training.tasks.segmentation import Segmentation, SegmentationSettings
from nat_models.writing import write_atomically

DEMO = Path(__file__).resolve().parents[1] / "demo"
REQUIRED = 70.0
SIDE = 96
DIGIT = (40, 60)  # px, least and greatest side of a digit
ATTEMPTS = 30  # to find room for another digit
IMAGES = {"train": 600, "val": 200}
CLASSES = ["background", *map(str, range(10))]


def photographs() -> list[np.ndarray]:
    """Grey photographs that come with scikit-image."""
    names = ("astronaut", "camera", "chelsea", "coffee", "rocket", "brick", "grass", "gravel", "moon", "coins")
    pictures = [getattr(skimage.data, name)() for name in names]
    return [np.asarray(Image.fromarray(picture).convert("L")) for picture in pictures]


def write_data(folder: Path) -> None:
    """images/ and masks/, each with train/ and val/; the folder appears when it is complete."""
    if folder.is_dir():
        return
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    digits, pictures = load_digits(), photographs()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(digits.images))
    cut = len(order) * 4 // 5
    parts = {"train": order[:cut], "val": order[cut:]}
    for part, count in IMAGES.items():
        for kind in ("images", "masks"):
            (temporary / kind / part).mkdir(parents=True)
        for i in range(count):
            image, mask = scene(digits, pictures, parts[part], part == "train", rng)
            Image.fromarray(image).save(temporary / "images" / part / f"{i:04}.png")
            Image.fromarray(mask).save(temporary / "masks" / part / f"{i:04}.png")
    (temporary / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    temporary.rename(folder)


def scene(digits, pictures: list[np.ndarray], chosen: np.ndarray, upper: bool, rng) -> tuple[np.ndarray, np.ndarray]:
    """A patch of a photograph's upper part, or of the rest, with a few digits apart, and its label map."""
    picture = pictures[rng.integers(len(pictures))]
    split = picture.shape[0] - max(SIDE, picture.shape[0] // 4)
    picture = picture[:split] if upper else picture[split:]
    row, col = (rng.integers(length - SIDE + 1) for length in picture.shape)
    image = 127 + picture[row : row + SIDE, col : col + SIDE].astype(np.float32) / 2  # light, for dark ink
    mask = np.zeros((SIDE, SIDE), np.uint8)
    taken = np.zeros((SIDE, SIDE), bool)
    for _ in range(ATTEMPTS):
        index = chosen[rng.integers(len(chosen))]
        side = int(rng.integers(DIGIT[0], DIGIT[1] + 1))
        scan = Image.fromarray((np.pad(digits.images[index], 1) / 16 * 255).astype(np.uint8))
        scan = scan.resize((side, side), Image.Resampling.BICUBIC).rotate(
            float(rng.uniform(-25, 25)), Image.Resampling.BICUBIC, expand=True
        )
        ink = np.asarray(scan, np.float32) / 255
        top, left = (int(rng.integers(SIDE - n + 1)) for n in ink.shape)
        place = np.s_[top : top + ink.shape[0], left : left + ink.shape[1]]
        if taken[place][ink > 0].any():
            continue
        taken[place] |= ink > 0
        image[place] *= 1 - ink
        mask[place][ink > 0.4] = digits.target[index] + 1
    return image.round().astype(np.uint8), mask


def draw(task: Segmentation, folder: Path, path: Path, count: int = 8) -> None:
    """Held-out images, what is true of them, and what the network says."""
    network, about = load_segmenter(folder)
    _, held_out = task.make_datasets(network)
    pictures, labels = [], []
    for i in range(count):
        image, truth = held_out[i]
        with torch.no_grad():
            found = network(image[None])[0].argmax(0)
        pictures += [to_picture(image, about.mean, about.std)] * 3
        labels += [None, truth.numpy(), found.numpy()]
    captions = ["image", "truth", "prediction"] * count
    path.parent.mkdir(exist_ok=True)
    figure = draw_truth(pictures, labels, about.colours, about.classes, captions=captions, columns=6)
    write_atomically(path, png(figure))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from-scratch", action="store_true", help="start from random weights, to compare")
    args = parser.parse_args()
    backbone, demo = DEMO / "run" / "best", DEMO / "segment"
    if not (backbone / "model.safetensors").is_file():
        raise UserError(f"There is no backbone in {backbone}: run `make demo` first.")
    run = demo / ("scratch" if args.from_scratch else "run")
    report = demo / "report" / f"{run.name}.png"
    if report.exists():
        console.print(f"starting over: {demo} holds a finished demo")
        shutil.rmtree(run)
        report.unlink()
    elif run.exists():
        console.print(f"resuming the interrupted demo in {run}")
    demo.mkdir(parents=True, exist_ok=True)
    write_data(demo / "data")
    recipe = read_yaml(resource("configs", "digits_segment.yaml"), SegmentationSettings)
    checkpoint = None if args.from_scratch else str(backbone)
    settings = SegmentationSettings(**recipe, data=str(demo / "data"), output=str(run), checkpoint=checkpoint)
    task = Segmentation(settings)
    rows = train(settings, task, resume=True)
    # The last epoch's figure counts: the best one was chosen on these very images.
    miou = rows[-1]["miou"]
    console.print(
        f"mean IoU on held-out images: {miou:.2f} %, {len(rows)} epochs in {sum(row['seconds'] for row in rows):.0f} s"
    )
    draw(task, run / "last", report)
    console.print(f"look at {run / 'curve.png'} and {report}")
    if miou < REQUIRED and not args.from_scratch:
        print(f"error: mean IoU must reach {REQUIRED} %, got {miou:.2f} %.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Stopped as e:
        sys.exit(str(e))
    except (UserError, CheckpointError) as e:
        sys.exit(f"error: {e}\nDelete {DEMO / 'segment'} to start over.")
