"""Trains a linear probe on features: logistic regression, its penalty chosen on a part of them.

    nat-models probe --train train.safetensors --test test.safetensors

Takes what `nat-models features` wrote; labels, --test and --baselines are as in `nat-models knn`.
"""

import argparse

from ..training.probing import PENALTIES, probe
from .knn import add_feature_flags, compare


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--c", type=float, nargs="+", default=PENALTIES, help="inverse penalties to choose from")
    add_feature_flags(parser)


def run(args: argparse.Namespace) -> None:
    compare(args, lambda train, test: probe(train, test, args.c))
