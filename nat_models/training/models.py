"""A timm model from what users say of it: name, weights, arguments. Names that timm does not know are our errors."""

import argparse
import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import timm
import torch
from timm.data import ImageNetInfo
from timm.models import resolve_model_input_args
from torch import nn

from ..checkpoints.files import read_config
from ..checkpoints.loading import explain_errors
from ..checkpoints.manifest import Weights, published
from ..checkpoints.saving import imagenet_of
from ..errors import UserError, unknown

# Of a computation, by the names of the flags.
MULTI_LABEL = "multi_label_classification"  # config.json's problem_type, transformers' word
_EXPONENT = r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"
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
        name: timm name, or a folder as `resolve_name` takes it.
        pretrained: Load the published weights.
        checkpoint: Load this file instead, converted as published weights are, and with another head or stem where
            the model needs one.
        model_kwargs: More arguments of the model.
        num_classes: None means the model's own; so do in_chans, img_size and drop_path.

    Raises:
        UserError: timm knows no model of this name, or the folder holds none.
        CheckpointError: The weights cannot be found or read, or do not fit.
    """
    name = resolve_name(name)
    overlay = None if checkpoint is None else dict(file=checkpoint, source="")
    requested = dict(img_size=img_size, in_chans=in_chans)
    own = dict(num_classes=num_classes, drop_path_rate=drop_path, pretrained_cfg_overlay=overlay)
    own = {key: value for key, value in own.items() if value is not None}  # or it would undo one of model_kwargs
    with _explain_hub(name):
        kwargs = resolve_model_input_args(name, requested, **{**model_kwargs, **own})
        model = timm.create_model(**kwargs, pretrained=pretrained or checkpoint is not None)
    if name.startswith("local-dir:"):  # timm leaves out what it does not know of config.json
        model.problem_type = read_config(Path(name.removeprefix("local-dir:"), "config.json")).get("problem_type")
    return model


@contextlib.contextmanager
def _explain_hub(name: str) -> Iterator[None]:
    """Of a model by its repository, timm asks the Hub for config.json before any code of ours runs."""
    source, _, repo = name.rpartition(":")
    if source != "hf-hub":
        yield
        return
    try:
        with explain_errors(name, dict(source=source, hf_hub_id=repo)):
            yield
    except KeyError as e:
        if e.args != ("architecture",):
            raise
        raise UserError(
            f"{name}: its config.json is not timm's. For one of transformers' NAT or DiNAT, name the architecture "
            f'and the repository: --model-kwargs "pretrained_cfg_overlay={{hf_hub_id: {repo}}}"'
        ) from None


def computing(precision: str, device: str | torch.device) -> contextlib.AbstractContextManager:
    """In which a network computes in one of PRECISIONS: autocast, or for float32 nothing."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, PRECISIONS[precision])


def resolve_name(name: str) -> str:
    """A model's name as timm takes it: a folder becomes local-dir:FOLDER, that of a run its best/.

    A model of timm's wins over a folder of its name, which ./NAME names.

    Raises:
        UserError: There is neither such a model nor such a folder, or the folder holds no model.
    """
    source, _, rest = name.rpartition(":")
    if source == "local-dir":
        return f"local-dir:{_model_folder(Path(rest))}"
    if timm.is_model(name.split(".")[0]):
        try:
            timm.models.get_pretrained_cfg(name)
        except RuntimeError as e:  # an unknown tag
            raise UserError(str(e)) from None
        return name
    if Path(name).is_dir() or ("/" in name and not source):
        return f"local-dir:{_model_folder(Path(name))}"
    if not source:
        raise unknown("model", name, timm.list_models())
    return name


def _model_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    if not (folder / "config.json").is_file() and (folder / "best" / "config.json").is_file():
        folder = folder / "best"
    if not (folder / "config.json").is_file():
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise UserError(f"{folder} holds no config.json of a model, but {held}.")
    if not timm.is_model(str(read_config(folder / "config.json").get("architecture"))):
        raise UserError(f"{folder / 'config.json'} names no architecture that timm knows.")
    return folder


def class_names(model: nn.Module) -> list[str]:
    """The model's classes, in the order of its outputs: those saved with it, or the synsets of the set of ImageNet that
    has as many, or else their numbers.

    Raises:
        UserError: It has too few outputs to tell classes apart, or not as many as classes were saved with it.
    """
    outputs, names = model.num_classes, model.pretrained_cfg.get("label_names")
    if outputs < (1 if is_multi_label(model) else 2):
        raise UserError(f"The model has {outputs} outputs: there are no classes to tell apart.")
    if names is None and (imagenet := imagenet_of(model)) is not None:
        names = imagenet.label_names()
    if names is None:
        return [str(i) for i in range(outputs)]
    if isinstance(names, Mapping):  # by index, perhaps with gaps
        names = [names.get(i, names.get(str(i), str(i))) for i in range(outputs)]
    if len(names) != outputs:
        raise UserError(f"The model has {outputs} outputs, and {len(names)} class names.")
    return list(names)


def readable(name: str) -> str:
    """A class as people call it: the first words for a synset of ImageNet, or else its own name."""
    words = _words().get(name, "") if re.fullmatch(r"n\d{8}", name) else ""
    return words.partition(",")[0] or name


@functools.cache  # timm reads files of 22,000 lines each time it is asked
def _words() -> dict[str, str]:
    return ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True) | ImageNetInfo().label_descriptions(
        as_dict=True
    )


def is_multi_label(model: nn.Module) -> bool:
    """Whether the model was trained on images with any number of labels."""
    return getattr(model, "problem_type", None) == MULTI_LABEL


def began_from(model: nn.Module) -> Weights | None:
    """The manifest's entry for the weights that a pretrained model began from; None for a file and other weights."""
    cfg = model.pretrained_cfg
    if cfg.get("file") or not cfg.get("hf_hub_id"):
        return None
    return published(cfg["hf_hub_id"], cfg.get("hf_hub_filename"))


def published_as(model: nn.Module) -> Weights | None:
    """The manifest's entry for a pretrained model as it was published; None for one with another head or other sizes,
    whose figures are its own."""
    known = began_from(model)
    if known is None or sum(p.numel() for p in model.parameters()) != known.parameters:
        return None
    return known


def parse_model_kwargs(pairs: Iterable[str], name: str = "model_kwargs") -> dict:
    """key=value strings as a dict, values read as YAML: kernel_size=3, depths=[3,4,6,5]."""
    pairs = list(pairs)
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise UserError(f"{name} must be key=value, got {wrong[0]!r}.")
    if not pairs:
        return {}
    import yaml

    return {key: with_floats(yaml.safe_load(value)) for key, value in (pair.split("=", 1) for pair in pairs)}


def with_floats(value):
    """What YAML gave, with a number for text such as 1e-5: YAML 1.1 takes that for one only where it has a dot."""
    if isinstance(value, dict):
        return {key: with_floats(x) for key, x in value.items()}
    if isinstance(value, list):
        return [with_floats(x) for x in value]
    return float(value) if isinstance(value, str) and re.fullmatch(_EXPONENT, value) else value


def add_model_flags(parser: argparse.ArgumentParser, default: str | None = "nat_mini") -> None:
    """The flags that name a model which is used as it is, not trained; without a default it has to be named."""
    add = parser.add_argument
    add("--model", default=default, required=default is None, help="timm name, or a folder that a run wrote")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=True, help="load the published weights")
    add("--checkpoint", help="load this weights file instead")
    add("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="more arguments of the model")
    add("--img-size", type=positive, help="height and width; the model's by default")


def refuse_flags(args: argparse.Namespace, names: Iterable[str], add_flags: Callable, why: str) -> None:
    """Raises a UserError for a flag of `names` that is given and does nothing here."""
    add_flags(parser := argparse.ArgumentParser())
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} is not for {why}.")


def add_preprocessing_flags(parser: argparse.ArgumentParser) -> None:
    """What else of the preprocessing can be another than the model's."""
    interpolations = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
    add = parser.add_argument
    add("--crop-pct", type=part, help="part of the image's short side that is seen; the model's by default")
    add("--interpolation", choices=interpolations, help="the model's by default")


def add_computing_flags(parser: argparse.ArgumentParser, workers: int = 4) -> None:
    """How a model is run over images."""
    add = parser.add_argument
    add("--batch-size", type=positive, default=64)
    add("--num-workers", type=count, default=workers, help="processes that load images")
    add("--precision", choices=PRECISIONS, default="float32", help="of the computation")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--skip-unreadable", action="store_true", help="leave out images that cannot be read, and say so")


def _number(kind: type, holds: Callable, rule: str) -> Callable[[str], float]:
    """The type of a flag: a number for which `holds`; `rule` says it in words."""

    def parse(text: str) -> float:
        try:
            if holds(value := kind(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")

    return parse


positive = _number(int, lambda x: x >= 1, "an integer of at least 1")
count = _number(int, lambda x: x >= 0, "an integer of at least 0")
part = _number(float, lambda x: 0 < x <= 1, "above 0 and at most 1")
fraction = _number(float, lambda x: 0 < x < 1, "above 0 and below 1")
probability = _number(float, lambda x: 0 <= x <= 1, "from 0 to 1")


def device(name: str) -> str:
    """The type of --device: one that is there."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:  # AssertionError: a PyTorch that was built without it
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used: {str(e).splitlines()[0]}") from None
    return name


def model_from_flags(args: argparse.Namespace, num_classes: int | None) -> nn.Module:
    """The model that `add_model_flags` names, in evaluation."""
    if (args.pretrained, args.checkpoint) == (False, None):
        print("the weights are random: neither --pretrained nor --checkpoint", file=sys.stderr)
    return make_model(
        args.model,
        pretrained=args.pretrained,
        checkpoint=args.checkpoint,
        model_kwargs=parse_model_kwargs(args.model_kwargs),
        num_classes=num_classes,
        img_size=args.img_size,
    ).eval()
