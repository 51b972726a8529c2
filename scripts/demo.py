"""Trains NAT-Mini from scratch on scikit-learn's 1,797 handwritten digits, and looks at what it learnt.

    python scripts/demo.py

Everything lands in demo/: digits/ (the images, a folder per class), run/ (what `nat-models train --config digits`
writes) and report/ (confusion matrix, worst mistakes). An interrupted demo is resumed; a finished one is started over.
Fails if fewer than 97 % of the images that were held out are named correctly.
"""

import shutil
import sys
from pathlib import Path

import timm
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import resolve_model_data_config

from nat_models.errors import CheckpointError, UserError
from nat_models.resources import resource
from nat_models.training.engine import train
from nat_models.training.evaluation import judge, predict, write_report
from nat_models.training.models import class_names
from nat_models.training.report import console
from nat_models.training.settings import read_yaml
from nat_models.training.splits import read_data
from nat_models.training.tasks.classification import Classification, ClassificationSettings

DEMO = Path(__file__).resolve().parents[1] / "demo"
REQUIRED = 97.0


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


def write_judgement(settings: ClassificationSettings, best: Path, folder: Path) -> None:
    """What the last weights make of the held-out digits: figures, confusion matrix, worst mistakes."""
    held_out = read_data(settings.data, val_fraction=settings.val_fraction, seed=settings.seed).parts["val"]
    model = timm.create_model(f"local-dir:{best}", pretrained=True)
    names = class_names(model)
    predictions = predict(model, held_out.images, resolve_model_data_config(model))
    judgement = judge(predictions.probabilities, held_out.targets, names)
    write_report(folder, predictions, held_out.targets, judgement)
    width = max(map(len, names))
    console.print("true class (rows) and predicted class (columns):")
    for name, row in zip(names, judgement.confusion.tolist(), strict=True):
        console.print(f"  {name:>{width}}  " + " ".join(f"{count:3}" if count else "  ." for count in row))


def main() -> int:
    if (DEMO / "report" / "mistakes.png").exists():
        console.print(f"starting over: {DEMO} holds a finished demo")
        shutil.rmtree(DEMO)
    elif DEMO.exists():
        console.print(f"resuming the interrupted demo in {DEMO}")
    DEMO.mkdir(exist_ok=True)
    write_digits(DEMO / "digits")
    run = DEMO / "run"
    recipe = read_yaml(resource("configs", "digits.yaml"), ClassificationSettings)
    settings = ClassificationSettings(**recipe, data=str(DEMO / "digits"), output=str(run))
    rows = train(settings, Classification(settings), resume=True)
    # The last epoch's figure counts: the best one was chosen on these very images.
    top1 = rows[-1]["top1"]
    console.print(
        f"top-1 on held-out images: {top1:.2f} %, {len(rows)} epochs in {sum(row['seconds'] for row in rows):.0f} s"
    )
    write_judgement(settings, run / "last", DEMO / "report")
    report = DEMO / "report"
    console.print(f"look at {run / 'curve.png'}, {report / 'confusion.png'} and {report / 'mistakes.png'}")
    if top1 < REQUIRED:
        print(f"error: top-1 must reach {REQUIRED} %, got {top1:.2f} %.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, CheckpointError) as e:
        sys.exit(f"error: {e}\nDelete {DEMO} to start over.")
