"""Fine-tunes UPerNet on NAT-Mini to find handwritten digits on photographs, and looks at what it learnt.

    python -m scripts.demo_segment

The data are made on the spot: scikit-learn's digits, enlarged and turned, on patches of scikit-image's photographs; a
label map says of each pixel which digit's ink it is. No digit and no patch of the held-out images is among the training
images. The backbone starts from what scripts/demo.py trained. Everything lands in demo/segment/: data/, run/ and
report/. An interrupted demo is resumed; a finished one is started over. Fails below a mean IoU of 70 %.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

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

from .digit_scenes import write_masks

DEMO = Path(__file__).resolve().parents[1] / "demo"
REQUIRED = 70.0


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
    write_masks(demo / "data")
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
