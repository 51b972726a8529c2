"""Fine-tunes or trains a network on your images.

    nat-models train --data DIR --config finetune [flags, which win over the YAML file]
    nat-models train --task segment --data DIR --config segment_small

To classify, DIR holds train/ and val/, each with a folder per class, or it is one tree with a folder per class, of
which --val-fraction is held out; to segment, images/ and masks/ with files of one name. The output folder gets:

    best/, last/            weights: timm.create_model("local-dir:output/best", pretrained=True) of a classifier,
                            nat_models.training.segmenters.load_segmenter of a segmenter
    summary.csv, curve.png  the course, epoch by epoch
    config.yaml             the settings as they were resolved
    state/                  what --resume needs

A run killed at any moment goes on with --resume as if nothing had happened. Several processes:
`accelerate launch -m nat_models train ...`; batch_size is then per process.
"""

import argparse

from ..training import settings
from ..training.engine import train
from ..training.tasks.classification import Classification
from ..training.tasks.detection import Detection
from ..training.tasks.segmentation import Segmentation
from ..training.tuning import find_lr

TASKS = {"classify": Classification, "segment": Segmentation, "detect": Detection}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=TASKS, default="classify", help="what is learnt")
    parser.add_argument("--find-lr", action="store_true", help="train nothing; draw the loss over the learning rate")
    settings.add_flags(parser, *(task.Settings for task in TASKS.values()))


def run(args: argparse.Namespace) -> None:
    task = TASKS[args.task]
    values, resume = settings.from_flags(args, task.Settings)
    if args.find_lr:
        find_lr(values, task(values))
        return
    train(values, task(values), resume)
