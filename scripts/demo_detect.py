"""Fine-tunes Mask R-CNN on NAT-Mini to find handwritten digits on photographs, and looks at what it learnt.

    python -m scripts.demo_detect

The images are those of the segmentation demo, see scripts/digit_scenes.py, with a box and a mask of each digit in
COCO's JSON. The backbone starts from what scripts/demo.py trained. Everything lands in demo/detect/: data/, run/ and
report/. An interrupted demo is resumed; a finished one is started over. Fails below a box AP50 of 60 % or a mask AP50
of 50 % on held-out images.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from nat_models.training.detectors import load_detector
from nat_models.training.drawing import draw_objects, draw_truth, png
from nat_models.training.mask_sets import to_picture
from nat_models.training.tasks.detection import Detection
from nat_models.writing import write_atomically

from .digit_demo import run_demo
from .digit_scenes import write_coco

REQUIRED = {"box_ap50": 60.0, "mask_ap50": 50.0}
_SHOWN = 0.5  # score from which on a detection is drawn
_ENLARGED = 3


def draw(task: Detection, folder: Path, path: Path, count: int = 8) -> None:
    """Held-out images, what is true of them, and what the network finds."""
    network, config = load_detector(folder)
    _, held_out = task.make_datasets(network)
    pictures = []
    for i in range(count):
        image, truth = held_out[i]
        with torch.no_grad():
            (found,) = network([image])
        kept = found["scores"] >= _SHOWN
        objects = (
            (truth["boxes"], truth["labels"], truth["masks"].dense(), None),
            (found["boxes"][kept], found["labels"][kept], found["masks"][kept, 0] >= 0.5, found["scores"][kept]),
        )
        large = np.kron(to_picture(image), np.ones((_ENLARGED, _ENLARGED, 1), np.uint8))
        pictures.append(large)
        for boxes, labels, masks, scores in objects:
            given = dict(masks=np.kron(masks.numpy().astype(np.uint8), np.ones((1, _ENLARGED, _ENLARGED), np.uint8)))
            given["scores"] = None if scores is None else scores.numpy()
            boxes, labels = boxes.numpy() * _ENLARGED, labels.numpy()
            pictures.append(draw_objects(large, boxes, labels, config.colours, config.classes, **given))
    captions = ["image", "truth", "prediction"] * count
    nothing = [None] * len(pictures)
    write_atomically(
        path, png(draw_truth(pictures, nothing, config.colours, config.classes, captions=captions, columns=6))
    )


if __name__ == "__main__":
    sys.exit(run_demo(__doc__.splitlines()[0], "detect", Detection, write=write_coco, draw=draw, required=REQUIRED))
