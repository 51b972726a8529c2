"""Exports a model to one file that runs without this package.

    nat-models export --model nat_tiny --format onnx --output nat_tiny.onnx --dynamic-size --check

onnx         plain ONNX operators, for onnxruntime and its like; with --custom-op, attention calls the C++ kernel,
             which onnxruntime is told of: SessionOptions.register_custom_ops_library(nat_models.custom_ops_library())
pt2          torch.export: torch.export.load("nat_tiny.pt2").module()
aoti         compiled by AOTInductor for this machine: torch._inductor.aoti_load_package("nat_tiny.pt2")
torchscript  a trace: torch.jit.load("nat_tiny.pt")

    nat-models export --model output/best --int8 --calibrate images

int8 is for onnx: linear layers and convolutions in int8, the rest in float32. Ranges are taken from images below DIR,
at most 256, and logits are compared with those of float32 on as many others; where the mean of their cosines is below
0.995, nothing is written.

A folder of a segmenter is exported whole, to the logits of each pixel; that of a detector to its detections.

The file maps "image", [B, C, H, W] in float32, to "logits", [B, num_classes] in float32, for any B; of a segmenter
[B, num_classes, H, W]. H and W are those of --img-size, or any from 32 px with --dynamic-size
(TorchScript: always any; AOTInductor: never). Its metadata holds "model", "preprocessing" (JSON) and
"label_names" (a JSON list, empty if unknown): metadata_props in ONNX, extra files in pt2 and TorchScript,
get_metadata() of an AOTInductor package.

The file of a detector (not aoti) maps one "image", [1, C, H, W], H and W from 33 px, to "boxes" [N, 4] in its pixels,
"labels" [N], "scores" [N] and "masks" [N, 1, 28, 28], probabilities on the boxes, for any N. Its metadata also holds
"category_ids" (a JSON list). Loading pt2 or TorchScript takes torchvision, for its operators.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from ..detector_export import export_detector
from ..errors import UserError
from ..export import DTYPES, FORMATS, check_output, export
from ..quantization import quantize_checked
from ..training.decoding import Encoded
from ..training.detectors import DetectorConfig, is_detector, load_detector
from ..training.images import load_images, read_batches
from ..training.mask_files import with_arrays
from ..training.mask_sets import read_image
from ..training.models import add_model_flags, model_from_flags
from ..training.segmenters import is_segmenter, load_segmenter
from ..training.splits import find_images

_CALIBRATION = 256  # images that ranges are taken from, and as many to compare on
_BATCH = 8


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_flags(parser)
    add("--num-classes", type=int, help="the model's by default")
    add("--format", choices=FORMATS, default="onnx")
    add("--output", type=Path, help="file to write; by default the model's name and the format's suffix")
    add("--dynamic-size", action="store_true", help="take any height and width")
    add("--custom-op", action="store_true", help="ONNX: let attention call the C++ kernel, registered in ONNX Runtime")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights; ONNX computes in float32")
    add("--int8", action="store_true", help="quantise an onnx file, and compare it with float32 on images held out")
    add("--calibrate", type=Path, metavar="DIR", help="with --int8: images as the model will see them; need no labels")
    add("--check", action="store_true", help="run the file beside the model and print the largest difference")
    add("--check-images", nargs="+", metavar="SOURCE", help="of a detector: check on images, not on random ones")


def run(args: argparse.Namespace) -> None:
    output = args.output
    if output is None:
        output = Path(f"{args.model.rpartition('/')[2]}{FORMATS[args.format][0]}")
    check_output(output, args.format, args.dynamic_size, args.custom_op)  # better known before weights are loaded
    _check_int8(args)
    if is_detector(folder := Path(args.model)):
        return _export_detector(args, folder, output)
    if args.check_images is not None:
        raise UserError(f"--check-images is for detectors, and {args.model} is none.")
    model, about = _model(args)
    if args.int8:
        about["finish"] = _quantizer(args, model)
    export(
        model,
        output,
        format=args.format,
        name=args.model,
        img_size=args.img_size,
        dynamic_size=args.dynamic_size,
        dtype=args.dtype,
        check=args.check and not args.int8,  # which compares by itself, and not to be equal
        custom_op=args.custom_op,
        **about,
    )


def _check_int8(args: argparse.Namespace) -> None:
    if args.int8 != (args.calibrate is not None):
        raise UserError("--int8 and --calibrate DIR go together: ranges of activations are taken from images.")
    if not args.int8:
        return
    if args.format != "onnx" or args.dtype != "float32":
        raise UserError(f"--int8 is for --format onnx in float32, got {args.format} in {args.dtype}.")
    if is_detector(Path(args.model)) or is_segmenter(Path(args.model)):
        raise UserError(f"--int8 is for classifiers, which {args.model} is none of.")


def _quantizer(args: argparse.Namespace, model: nn.Module) -> Callable[[Path], None]:
    """What quantises a file by images of --calibrate: one half for ranges, the other to compare on."""
    images = find_images([args.calibrate])
    if len(images) < 2:
        raise UserError(f"--calibrate needs 2 images at least, {args.calibrate} holds {len(images)}.")
    chosen = random.Random(0).sample(images, min(len(images), 2 * _CALIBRATION))
    data_config = resolve_input_data_config(model, dict(img_size=args.img_size))

    def batches(part: list[Encoded]) -> Iterator[Tensor]:
        return (batch for batch, _ in read_batches(load_images(part, data_config, _BATCH)))

    half = (len(chosen) + 1) // 2
    return lambda path: quantize_checked(path, batches(chosen[:half]), batches(chosen[half:]))


def _model(args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """The model, and what its file says of it where the model itself does not."""
    folder = Path(args.model)
    if not is_segmenter(folder):
        return model_from_flags(args, args.num_classes), {}
    _refuse_model_flags(args, "a segmenter")
    network, about = load_segmenter(folder)
    kept = ("mean", "std", "short_side", "long_side")
    return network, dict(preprocessing={key: getattr(about, key) for key in kept}, labels=about.classes)


def _refuse_model_flags(args: argparse.Namespace, what: str) -> None:
    given = (args.num_classes, args.checkpoint, args.model_kwargs or None)
    for flag, value in zip(("--num-classes", "--checkpoint", "--model-kwargs"), given, strict=True):
        if value is not None:
            raise UserError(f"{flag} is not for {what}: {args.model} says what it is.")


def _export_detector(args: argparse.Namespace, folder: Path, output: Path) -> None:
    _refuse_model_flags(args, "a detector")
    if args.dtype != "float32":
        raise UserError(f"A detector is exported in float32, got --dtype {args.dtype}.")
    detector, about = load_detector(folder)
    kept = ("mean", "std", "short_side", "long_side")
    side = about.short_side if args.img_size is None else args.img_size
    export_detector(
        detector,
        output,
        format=args.format,
        name=args.model,
        size=(side, side),
        dynamic_size=args.dynamic_size,
        check=args.check or args.check_images is not None,
        check_images=None if args.check_images is None else _read_images(args.check_images, about, side),
        preprocessing={key: getattr(about, key) for key in kept},
        labels=about.classes,
        category_ids=about.ids(),
        custom_op=args.custom_op,
    )


def _read_images(sources: Sequence[str], about: DetectorConfig, side: int) -> list[Tensor]:
    """Images [C, side, side] as the file of a detector takes them."""
    images = (read_image(image, len(about.mean)) for image in find_images(sources, kinds=with_arrays()))
    squares = (functional.resize(image, [side, side], antialias=True) for image in images)
    pixels = (functional.to_dtype(square.as_subclass(Tensor), torch.float32, scale=True) for square in squares)
    return [functional.normalize(x, list(about.mean), list(about.std)) for x in pixels]
