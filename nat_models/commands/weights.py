"""Lists the published weights: architecture and tag, repository, size, top-1, licence, and what is cached here.

    nat-models weights 'nat_*'

A size is that of the tensors in float32. Nothing is downloaded: what is cached is read from the Hub's cache, which
HF_HOME or HF_HUB_CACHE move.
"""

import argparse
import json

from ..checkpoints import Weights, list_weights
from ..errors import unknown

_HEADER = ("weights", "parameters", "size", "top-1", "licence", "cached", "where")


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("pattern", nargs="?", default="*", help="of names, with wildcards as in timm.list_models; all by default")
    add("--json", action="store_true", help="print JSON: what the manifest knows, megabytes and the cached file")


def run(args: argparse.Namespace) -> None:
    found = list_weights(args.pattern)
    if not found:
        names = [weights.name for weights in list_weights()]
        raise unknown("weights", args.pattern, {*names, *(name.partition(".")[0] for name in names)})
    if args.json:
        print(json.dumps([_plain(weights) for weights in found], indent=2))
        return
    rows = [_HEADER, *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def _plain(weights: Weights) -> dict:
    architecture, _, tag = weights.name.partition(".")
    cached = weights.cached()
    return dict(
        architecture=architecture,
        tag=tag,
        **weights._asdict(),
        megabytes=round(weights.megabytes, 1),
        cached=None if cached is None else str(cached),
    )


def _row(weights: Weights) -> tuple[str, ...]:
    return (
        weights.name,
        f"{weights.parameters / 1e6:.1f} M",
        f"{weights.megabytes:.0f} MB",
        "" if weights.top1 is None else f"{weights.top1} %",
        weights.license,
        "no" if weights.cached() is None else "yes",
        _place(weights),
    )


def _place(weights: Weights) -> str:
    if weights.repo is None:
        return weights.url
    return weights.repo if weights.revision is None else f"{weights.repo}@{weights.revision[:12]}"
