"""A timm model from what users say of it: name, weights, arguments. Names that timm does not know are our errors."""

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import timm
import torch
from timm.data import ImageNetInfo
from timm.models import resolve_model_input_args
from torch import nn

from ..errors import UserError, unknown

# Of a computation, by the names of the flags.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | None = None,
    model_kwargs: Mapping = MappingProxyType({}),
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | None = None,
    drop_path: float | None = None,
) -> nn.Module:
    """The model with its initial weights.

    Args:
        name: timm name, or a folder that a run wrote: FOLDER, or local-dir:FOLDER as timm says it.
        pretrained: Load the published weights.
        checkpoint: Load this file instead, converted as published weights are, and with another head or stem where
            the model needs one.
        model_kwargs: More arguments of the model.
        num_classes: None means the model's own; so do in_chans, img_size and drop_path.

    Raises:
        UserError: timm knows no model of this name.
        CheckpointError: The weights cannot be found or read, or do not fit.
    """
    name = resolve_name(name)
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise unknown("model", name, timm.list_models())
    overlay = None if checkpoint is None else dict(file=checkpoint, source="")
    requested = dict(img_size=img_size, in_chans=in_chans)
    own = dict(num_classes=num_classes, drop_path_rate=drop_path, pretrained_cfg_overlay=overlay)
    kwargs = resolve_model_input_args(name, requested, **{**model_kwargs, **own})
    return timm.create_model(**kwargs, pretrained=pretrained or checkpoint is not None)


def resolve_name(name: str) -> str:
    """A model's name as timm takes it: a folder of weights becomes local-dir:FOLDER, that of a run its best/.

    Raises:
        UserError: The folder holds no weights.
    """
    folder = Path(name.removeprefix("local-dir:"))
    if not folder.is_dir() or (":" in name and not name.startswith("local-dir:")):
        return name
    for candidate in (folder, folder / "best"):
        if (candidate / "config.json").is_file():
            return f"local-dir:{candidate}"
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise UserError(f"{folder} holds no config.json of a model, but {held}.")


def class_names(model: nn.Module) -> list[str]:
    """The model's classes, in the order of its outputs: those saved with it, or ImageNet-1k's synsets."""
    names = model.pretrained_cfg.get("label_names")
    if names is None and model.num_classes == 1000:
        names = ImageNetInfo().label_names()
    if names is None:
        names = [str(i) for i in range(model.num_classes)]
    if isinstance(names, dict):
        return [names[i] if i in names else names[str(i)] for i in range(len(names))]
    return list(names)


def readable(name: str) -> str:
    """A class as people call it: the first words for a synset of ImageNet, or else its own name."""
    words = ImageNetInfo().label_name_to_description(name) if re.fullmatch(r"n\d{8}", name) else ""
    return words.partition(",")[0] or name


def is_multi_label(model: nn.Module) -> bool:
    """Whether the model was trained on images with any number of labels."""
    return model.pretrained_cfg.get("problem_type") == "multi_label_classification"


def parse_model_kwargs(pairs: Iterable[str]) -> dict:
    """key=value strings as a dict, values read as YAML: kernel_size=3, depths=[3,4,6,5]."""
    pairs = list(pairs)
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise UserError(f"model_kwargs must be key=value, got {wrong[0]!r}.")
    if not pairs:
        return {}
    import yaml

    return {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that name a model which is used as it is, not trained."""
    add = parser.add_argument
    add("--model", default="nat_mini", help="timm name, or a folder that a run wrote")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=True, help="load the published weights")
    add("--checkpoint", help="load this weights file instead")
    add("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="more arguments of the model")
    add("--img-size", type=int, help="height and width; the model's by default")


def model_from_flags(args: argparse.Namespace, num_classes: int | None) -> nn.Module:
    """The model that `add_model_flags` names, in evaluation."""
    if (args.pretrained, args.checkpoint) == (False, None):
        print("the weights are random: neither --pretrained nor --checkpoint", flush=True)
    return make_model(
        args.model,
        pretrained=args.pretrained,
        checkpoint=args.checkpoint,
        model_kwargs=parse_model_kwargs(args.model_kwargs),
        num_classes=num_classes,
        img_size=args.img_size,
    ).eval()
