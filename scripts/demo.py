"""Trains NAT-Mini from scratch on scikit-learn's 1,797 handwritten digits, and looks at what it learnt.

    python scripts/demo.py

Everything lands in demo/: digits/ (the images, a folder per class), run/ (what `nat-models train --config digits`
writes) and predictions.png. An interrupted demo is resumed; a finished one is started over. Fails if fewer
than 95 % of the images that were held out are named correctly.
"""

import shutil
import sys
from pathlib import Path

import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_transform, resolve_model_data_config

from nat_models.errors import CheckpointError, UserError
from nat_models.resources import resource
from nat_models.training.engine import train
from nat_models.training.images import ImageSet
from nat_models.training.report import console
from nat_models.training.settings import Settings, read_yaml
from nat_models.training.splits import read_data
from nat_models.training.tasks.classification import Classification

DEMO = Path(__file__).resolve().parents[1] / "demo"
REQUIRED = 95.0


def write_digits(folder: Path) -> None:
    """The 8 x 8 scans enlarged to 32 px, as PNG files; the folder appears when it is complete."""
    if folder.is_dir():
        return
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = temporary / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        # 16 grey levels of ink, saved as ink on paper.
        image = Image.fromarray((255 - pixels / 16 * 255).round().astype("uint8"))
        image.resize((32, 32), Image.Resampling.BICUBIC).save(path)
    temporary.rename(folder)


def draw_predictions(settings: Settings, best: Path, path: Path, count: int = 12) -> None:
    """A picture of `count` held-out digits, spread over the classes, with what the best checkpoint takes them for."""
    held_out = read_data(settings.data, val_fraction=settings.val_fraction, seed=settings.seed).parts["val"]
    chosen = [i * len(held_out) // count for i in range(count)]
    model = timm.create_model(f"local-dir:{best}", pretrained=True).eval()
    data_config = resolve_model_data_config(model)
    labels = model.pretrained_cfg["label_names"]
    images = ImageSet(held_out.images, held_out.targets, data_config["input_size"][0], create_transform(**data_config))
    with torch.inference_mode():
        predictions = model(torch.stack([images[i][0] for i in chosen])).argmax(dim=1)
    figure = Figure(figsize=(9, 5), layout="constrained")
    for axes, i, prediction in zip(figure.subplots(2, count // 2).flat, chosen, predictions, strict=True):
        axes.imshow(Image.open(held_out.images[i].path), cmap="gray", vmin=0, vmax=255)
        title = f"true {labels[held_out.targets[i]]}\npredicted {labels[prediction]}"
        axes.set_title(title, color="red" if prediction != held_out.targets[i] else "black")
        axes.axis("off")
    figure.suptitle(f"{count} of {len(held_out)} held-out digits")
    figure.savefig(path, format="png", dpi=120)


def main() -> int:
    if (DEMO / "predictions.png").exists():
        console.print(f"starting over: {DEMO} holds a finished demo")
        shutil.rmtree(DEMO)
    elif DEMO.exists():
        console.print(f"resuming the interrupted demo in {DEMO}")
    DEMO.mkdir(exist_ok=True)
    write_digits(DEMO / "digits")
    run = DEMO / "run"
    recipe = read_yaml(resource("configs", "digits.yaml"))
    settings = Settings(**recipe, data=str(DEMO / "digits"), output=str(run))
    rows = train(settings, Classification(settings), resume=True)
    # The last epoch's figure counts: the best one was chosen on these very images.
    top1 = rows[-1]["top1"]
    console.print(
        f"top-1 on held-out images: {top1:.2f} %, {len(rows)} epochs in {sum(row['seconds'] for row in rows):.0f} s"
    )
    draw_predictions(settings, run / "best", DEMO / "predictions.png")
    console.print(f"look at {DEMO / 'predictions.png'} and {run / 'curve.png'}")
    if top1 < REQUIRED:
        print(f"error: top-1 must reach {REQUIRED} %, got {top1:.2f} %.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, CheckpointError) as e:
        sys.exit(f"error: {e}\nDelete {DEMO} to start over.")
