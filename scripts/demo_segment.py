"""Fine-tunes UPerNet on NAT-Mini to find handwritten digits on photographs, and looks at what it learnt.

    python -m scripts.demo_segment

The data are made on the spot, see scripts/digit_scenes.py; a label map says of each pixel which digit's ink it is. The
backbone starts from what scripts/demo.py trained. Everything lands in demo/segment/: data/, run/ and report/. An
interrupted demo is resumed; a finished one is started over. Fails below a mean IoU of 70 % on held-out images.
"""

import sys
from pathlib import Path

import torch

from nat_models.training.drawing import draw_truth, png
from nat_models.training.mask_sets import to_picture
from nat_models.training.segmenters import load_segmenter
from nat_models.training.tasks.segmentation import Segmentation
from nat_models.writing import write_atomically

from .digit_demo import run_demo
from .digit_scenes import write_masks

REQUIRED = {"miou": 70.0}


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
    write_atomically(
        path, png(draw_truth(pictures, labels, about.colours, about.classes, captions=captions, columns=6))
    )


if __name__ == "__main__":
    sys.exit(
        run_demo(__doc__.splitlines()[0], "segment", Segmentation, write=write_masks, draw=draw, required=REQUIRED)
    )
