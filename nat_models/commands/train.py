"""Fine-tunes a timm model on a folder of images.

    nat-models train --data DIR --config finetune [flags, which win over the YAML file]

DIR holds train/ and val/, each with a folder per class, or it is one tree with a folder per class, of which
--val-fraction is held out. The output folder gets:

    best/, last/            timm folders: timm.create_model("local-dir:output/best", pretrained=True)
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

add_flags = settings.add_flags


def run(args: argparse.Namespace) -> None:
    values, resume = settings.from_flags(args)
    train(values, Classification(values), resume)
