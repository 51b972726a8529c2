"""Draws features: principal components beside the images, or a map of all images.

nat-models picture --kind components --images photo.jpg --model nat_tiny --output components.png
nat-models picture --kind map --features features.safetensors --output map.png
"""

import argparse
from pathlib import Path

from ..errors import UserError
from ..training.drawing import png
from ..training.embeddings import Extractor, load_features
from ..training.models import add_model_flags, model_from_flags
from ..training.probing import compute, draw_components, draw_map
from ..training.report import console
from ..training.splits import find_images
from ..writing import write_atomically, writing


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--kind", choices=("components", "map"), required=True)
    add("--images", nargs="+", help="for components: images, or folders of them")
    add("--features", type=Path, help="for a map: what `nat-models features` wrote")
    add("--method", choices=("tsne", "pca"), default="tsne", help="of a map")
    add("--level", type=int, help="of components, from 0; the last by default")
    add("--output", type=Path, default=Path("picture.png"), help="PNG file to write")
    add_model_flags(parser)


def run(args: argparse.Namespace) -> None:
    if args.kind == "components":
        if not args.images:
            raise UserError("--kind components takes --images.")
        images = find_images(args.images)
        model = model_from_flags(args, num_classes=0)
        extractor = Extractor(model, kind="dense", level=args.level, img_size=args.img_size)
        figure = draw_components(images, compute(extractor, images, extractor.data_config))
    else:
        if args.features is None:
            raise UserError("--kind map takes --features.")
        figure = draw_map(load_features(args.features), args.method)
    with writing(args.output):
        write_atomically(args.output, png(figure))
    console.print(f"look at {args.output}")
