"""Every setting of a training, once: a key of the YAML file and a flag of the command line."""

import argparse
import json
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import yaml

from ..errors import UserError, unknown
from ..resources import resource_folder
from .models import parse_model_kwargs


def option(default, help: str):
    return field(default=default, metadata=dict(help=help))


@dataclass(frozen=True)
class Settings:
    """Every setting: a key of the YAML file and, with dashes, a flag."""

    data: str = option("", "folder of images, required")
    output: str = option("output", "folder for everything that is written")
    val_fraction: float = option(0.1, "part of each class that is held out where there is no val/")
    seed: int = option(0, "of the split, the initial weights, the order and the augmentation")
    workers: int = option(4, "processes that load images, per training process")

    model: str = option("nat_mini", "timm name, or local-dir:FOLDER")
    pretrained: bool = option(False, "start from the published weights")
    checkpoint: str | None = option(None, "start from this weights file")
    model_kwargs: dict = field(default_factory=dict, metadata=dict(help="more arguments of the model, as key=value"))
    in_chans: int | None = option(None, "1 reads images as grey, 3 as RGB; none: the model's")
    img_size: int | None = option(None, "height and width; none: the model's")
    drop_path: float | None = option(None, "stochastic depth; none: the model's")
    crop_pct: float | None = option(None, "part of the image's short side that evaluation sees; none: the model's")
    interpolation: str | None = option(None, "bilinear, bicubic, ...; none: the model's")
    mean: tuple[float, ...] | None = option(None, "subtracted from each channel; none: the model's")
    std: tuple[float, ...] | None = option(None, "each channel is divided by it; none: the model's")

    epochs: int = option(30, "length of the schedule")
    warmup_epochs: int = option(3, "epochs of linear warm-up, part of the schedule")
    cooldown_epochs: int = option(0, "epochs at min_lr after the schedule")
    batch_size: int = option(64, "images per process and step")
    grad_accum: int = option(1, "steps per update")
    opt: str = option("adamw", "timm's name of the optimizer")
    lr: float = option(5e-4, "peak learning rate, for the whole batch as it is: nothing is scaled")
    warmup_lr: float = option(1e-6, "learning rate of the first update")
    min_lr: float = option(1e-6, "learning rate at the end of the schedule")
    weight_decay: float = option(0.05, "not on biases, norms and what the model exempts (rpb)")
    layer_decay: float | None = option(None, "factor on the learning rate per block, from the head down")
    clip_grad: float | None = option(None, "largest norm of the gradient")
    ema_decay: float | None = option(None, "average the weights; the average is then evaluated and saved")
    mixed_precision: str = option("no", "no, bf16 or fp16")

    smoothing: float = option(0.1, "label smoothing")
    mixup: float = option(0.0, "alpha of mixup, 0: off")
    cutmix: float = option(0.0, "alpha of cutmix, 0: off")
    auto_augment: str | None = option(None, "timm's notation, such as rand-m9-mstd0.5-inc1; replaces color_jitter")
    scale: tuple[float, ...] = option((0.08, 1.0), "least and greatest part of the image's area in a random crop")
    ratio: tuple[float, ...] = option((3 / 4, 4 / 3), "least and greatest aspect ratio of a random crop")
    hflip: float = option(0.5, "probability of a mirror image")
    color_jitter: float | None = option(None, "of brightness, contrast and saturation")
    reprob: float = option(0.0, "probability of erasing a random rectangle")

    def __post_init__(self):
        types_ = typing.get_type_hints(Settings)
        for f in fields(self):
            object.__setattr__(self, f.name, _convert(f.name, getattr(self, f.name), types_[f.name]))
        rules = {
            "data": (self.data != "", "name a folder of images"),
            "val_fraction": (0 < self.val_fraction < 1, "lie between 0 and 1"),
            "in_chans": (self.in_chans in (None, 1, 3), "be 1 (grey) or 3 (RGB)"),
            "epochs": (self.epochs >= 1, "be at least 1"),
            "warmup_epochs": (0 <= self.warmup_epochs < self.epochs, f"be below epochs, {self.epochs}"),
            "batch_size": (self.batch_size >= 1, "be at least 1"),
            "grad_accum": (self.grad_accum >= 1, "be at least 1"),
            "mixed_precision": (self.mixed_precision in ("no", "bf16", "fp16"), "be no, bf16 or fp16"),
            "ema_decay": (self.ema_decay is None or 0 < self.ema_decay < 1, "lie between 0 and 1"),
            "scale": (len(self.scale) == 2, "have two values"),
            "ratio": (len(self.ratio) == 2, "have two values"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise UserError(f"{name} must {rule}, got {getattr(self, name)!r}.")
        # Mixup pairs the first image of a batch with the last, and so on.
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise UserError(f"batch_size must be even with mixup or cutmix, got {self.batch_size}.")

    def plain(self) -> dict:
        """The settings as a YAML file has them: with lists for tuples."""
        return json.loads(json.dumps(asdict(self)))


def _convert(name: str, value, wanted):
    """The value as the type its field declares: YAML reads 1e-3 as a string, and a command line has only strings."""
    if isinstance(wanted, types.UnionType):
        if value is None or value == "none":
            return None
        wanted = next(t for t in typing.get_args(wanted) if t is not types.NoneType)
    try:
        if wanted is bool or wanted is dict:
            if isinstance(value, wanted):
                return value
        elif typing.get_origin(wanted) is tuple:
            return tuple(float(x) for x in ([value] if isinstance(value, (int, float)) else value))
        elif value is not None and not isinstance(value, (bool, dict, list)):
            return wanted(str(value))
    except (TypeError, ValueError):
        pass
    raise UserError(f"{name} must be of type {getattr(wanted, '__name__', wanted)}, got {value!r}.")


def read_yaml(path: Path) -> dict:
    """What a YAML file says of the settings, its keys checked."""
    if not path.is_file():
        raise UserError(f"There is no config file {path}.")
    values = yaml.safe_load(path.read_text()) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, got {values!r}.")
    known = [f.name for f in fields(Settings)]
    for name in values:
        if name not in known:
            raise unknown(f"key in {path}:", str(name), known)
    return values


def find_recipe(name: str) -> Path:
    """The YAML file that --config means: a path to one, or the bare name of a recipe."""
    path = Path(name)
    if path.is_file() or path.suffix or len(path.parts) != 1:
        return path
    recipes = {file.stem: file for file in resource_folder("configs").glob("*.yaml")}
    if name not in recipes:
        raise UserError(f"There is no recipe {name!r} and no such file; recipes: {', '.join(sorted(recipes))}.")
    return recipes[name]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting, and --config and --resume."""
    parser.add_argument("--config", metavar="NAME", help="a recipe (finetune), or a YAML file of settings")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, or start it")
    wanted = typing.get_type_hints(Settings)
    for f in fields(Settings):
        kwargs = dict(default=argparse.SUPPRESS, help=f.metadata["help"])
        if f.default not in (MISSING, None, ""):
            kwargs["help"] += f" ({f.default})".replace("%", "%%")
        if wanted[f.name] is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif wanted[f.name] is dict:
            kwargs.update(nargs="+", metavar="KEY=VALUE")
        elif "tuple" in str(wanted[f.name]):
            kwargs.update(nargs="+", metavar="X")
        else:
            kwargs["metavar"] = "X"
        parser.add_argument(f"--{f.name.replace('_', '-')}", **kwargs)


def from_flags(args: argparse.Namespace) -> tuple[Settings, bool]:
    """Settings from defaults, then config.yaml of the run to resume, then --config, then flags; and --resume itself."""
    flags = dict(vars(args))
    config, resume = flags.pop("config"), flags.pop("resume")
    if "model_kwargs" in flags:
        flags["model_kwargs"] = parse_model_kwargs(flags["model_kwargs"])
    layers = [{} if config is None else read_yaml(find_recipe(config)), flags]
    output = {"output": Settings.output, **layers[0], **flags}["output"]
    if resume and (saved := Path(output) / "config.yaml").is_file():
        layers.insert(0, read_yaml(saved))
    values = {}
    for layer in layers:
        if isinstance(values.get("model_kwargs"), dict) and isinstance(layer.get("model_kwargs"), dict):
            layer = {**layer, "model_kwargs": values["model_kwargs"] | layer["model_kwargs"]}
        values |= layer
    return Settings(**values), resume
