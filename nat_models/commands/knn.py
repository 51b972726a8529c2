"""Classifies by the nearest neighbours among features.

    nat-models knn --train train.safetensors --test test.safetensors

Takes what `nat-models features` wrote. Labels are those stored with the features (--split), or else the names of the
images' folders. Without --test a fifth of each class is held out. --baselines DIR, the folder that the features came
from, shows raw pixels and the same network with random weights beside them.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from ..training.embeddings import Features, load_features
from ..training.probing import KS, baselines, check_pair, knn, split_features
from ..training.report import console
from ..writing import write_atomically, writing


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--k", type=int, nargs="+", default=KS, help="numbers of neighbours to choose from")
    add_feature_flags(parser)


def add_feature_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--train", required=True, type=Path, help="features to learn from")
    add("--test", type=Path, help="features to be classified; by default a fifth of the others")
    add("--baselines", type=Path, metavar="DIR", help="the images' folder: compare raw pixels and random weights")
    add("--output", type=Path, help="JSON file to write")


def run(args: argparse.Namespace) -> None:
    compare(args, lambda train, test: knn(train, test, args.k))


def compare(args: argparse.Namespace, method: Callable[[Features, Features], dict]) -> None:
    """Prints what a method makes of the features, and of the baselines."""
    train = load_features(args.train)
    train, test = split_features(train) if args.test is None else (train, load_features(args.test))
    check_pair(train, test)
    rows = {"features": (train, test)}
    if args.baselines is not None:
        both = [baselines(part, args.baselines) for part in (train, test)]
        for name in both[0]:
            parts = (train, test)
            rows[name] = tuple(dataclasses.replace(p, features=b[name]) for p, b in zip(parts, both, strict=True))
    results = [dict(features=name, **method(*pair)) for name, pair in rows.items()]
    title = f"{len(train.names):,} to learn, {len(test.names):,} to test"
    shown = Table("", "method", "choice", "top-1", "macro-F1", title=title)
    for row in results:
        shown.add_row(row["features"], row["method"], row["choice"], f"{row['top1']:.2f}", f"{row['macro_f1']:.2f}")
    console.print(shown)
    if args.output is not None:
        with writing(args.output):
            write_atomically(args.output, json.dumps(results, indent=2))
