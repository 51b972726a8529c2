"""Finds the images whose features are nearest to an image's.

    nat-models search --features features.safetensors --query photo.jpg --top 5

The query goes through the network and the preprocessing that the features name. Prints a line of JSON per query.
"""

import argparse
import json
from pathlib import Path

from ..errors import UserError
from ..training.decoding import describe
from ..training.embeddings import Extractor, load_features
from ..training.models import add_model_flags, model_from_flags
from ..training.probing import compute, search
from ..training.splits import find_images


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--features", required=True, type=Path, help="what `nat-models features` wrote")
    add("--query", required=True, nargs="+", help="images, or folders of them")
    add("--top", type=int, default=10, help="images to find")
    add_model_flags(parser)
    parser.set_defaults(model=None)


def run(args: argparse.Namespace) -> None:
    if args.top < 1:
        raise UserError(f"--top must be at least 1, got {args.top}.")
    features, queries = load_features(args.features), find_images(args.query)
    if args.model is None:
        args.model = features.metadata["model"]
    elif args.model != features.metadata["model"]:
        raise UserError(f"The features are of {features.metadata['model']}, not of {args.model}.")
    kind, level = features.metadata.get("kind", "pooled"), json.loads(features.metadata.get("level", "null"))
    extractor = Extractor(model_from_flags(args, num_classes=0), kind=kind, level=level)
    found = compute(extractor, queries, json.loads(features.metadata["preprocessing"]))
    for query, nearest in zip(queries, search(features, found, args.top), strict=True):
        rows = [{"image": name, "label": label, "similarity": round(s, 4)} for name, label, s in nearest]
        print(json.dumps({"query": describe(query), "nearest": rows}, ensure_ascii=False), flush=True)
