"""Every setting of a training, once: a key of the YAML file and a flag of the command line."""

import argparse
import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, unknown
from ..resources import resource_folder
from .models import parse_model_kwargs, with_floats


def option(default, help: str):
    return field(default=default, metadata=dict(help=help))


@dataclass(frozen=True)
class Settings:
    """Every setting that the engine knows: a key of the YAML file and, with dashes, a flag. A task's settings are a
    subclass with what is its own."""

    data: str = option("", "images and labels: a folder, a table or shards; required")
    output: str = option("output", "folder for everything that is written")
    val_fraction: float = option(0.1, "part of each class that is held out where there are no validation images")
    image_column: str | None = option(None, "of a table: where the images are; none: by the usual names")
    label_column: str | None = option(None, "of a table: the label or labels; none: by the usual names")
    split_column: str | None = option(None, "of a table: train, val or test; none: by the usual names")
    verify: str = option("headers", "what is checked of every image first: none, headers or full (decodes all)")
    skip_unreadable: bool = option(False, "leave out images that cannot be read, and count them")
    unreadable_limit: float = option(0.01, "greatest part of the images that may be left out")
    seed: int = option(0, "of the split, the initial weights, the order and the augmentation")
    workers: int = option(4, "processes that load images, per training process")
    persistent_workers: bool = option(True, "keep them from epoch to epoch")

    model: str = option("nat_mini", "timm name, or a folder that a run wrote")
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
    freeze: str | None = option(None, "what is not trained: stem, stem..level2, backbone (a linear probe)")
    head_only_epochs: int = option(0, "epochs in which the head alone is trained, before the rest joins in")

    epochs: int = option(30, "length of the schedule")
    warmup_epochs: float = option(3, "epochs of linear warm-up, part of the schedule")
    cooldown_epochs: int = option(0, "epochs at min_lr after the schedule")
    batch_size: int = option(64, "images per process and step")
    grad_accum: int = option(1, "steps per update")
    global_batch_size: int | None = option(None, "images per update, over all processes and steps: sets grad_accum")
    auto_batch_size: bool = option(False, "halve batch_size, and double grad_accum, until a step fits in the memory")
    opt: str = option("adamw", "timm's name of the optimizer")
    sched: str = option("cosine", "of the learning rate: cosine, poly (a straight line) or multistep")
    milestones: tuple[float, ...] = option((), "of multistep: the epochs after which it divides lr by 10")
    lr: float = option(5e-4, "peak learning rate, for the whole batch as it is: nothing is scaled")
    warmup_lr: float = option(1e-6, "learning rate of the first update")
    min_lr: float = option(1e-6, "learning rate at the end of the schedule")
    weight_decay: float = option(0.05, "not on biases, norms and what the model exempts (rpb)")
    layer_decay: float | None = option(None, "factor on the learning rate per block, from the head down")
    clip_grad: float | None = option(None, "largest norm of the gradient")
    ema_decay: float | None = option(None, "average the weights; the average is then evaluated and saved")
    mixed_precision: str = option("no", "no, bf16 or fp16")
    compile: bool = option(False, "torch.compile the network for training")
    channels_last: bool = option(False, "keep convolutions' weights and images channels-last in memory")
    grad_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory, more time")

    metric: str | None = option(None, "decides which epoch is best; none: the task's")
    patience: int | None = option(None, "stop after this many epochs without a better one")
    save_every_steps: int | None = option(None, "updates between two states that --resume can take, within an epoch")
    save_every_minutes: float | None = option(15.0, "minutes between two such states; none: at the end of an epoch")
    keep_every_epochs: int | None = option(None, "keep the weights of every so many epochs, in kept/")
    keep_every_steps: int | None = option(None, "keep the weights of every so many updates, in kept/")
    keep_newest: int | None = option(None, "of what is kept, delete all but this many")
    trackers: str = option("auto", "auto (tensorboard where it is installed), none, or names: tensorboard,wandb")
    profile: bool = option(False, "print where the time went: data, model, evaluation, saving, logging")

    @classmethod
    def rules(cls) -> dict[str, tuple[Callable[[Any], bool], str]]:
        """For each setting that has one, a rule its value must satisfy, and the rule in words after "must"."""
        positive = (lambda x: x is None or x >= 1, "be at least 1")
        fraction = (lambda x: 0 < x < 1, "lie between 0 and 1")
        return {
            "data": (lambda x: x != "", "name images: a folder, a table or shards"),
            "val_fraction": fraction,
            "verify": (lambda x: x in ("none", "headers", "full"), "be none, headers or full"),
            "unreadable_limit": (lambda x: 0 <= x <= 1, "lie between 0 and 1"),
            "seed": (lambda x: 0 <= x < 2**32, "lie between 0 and 2^32 - 1"),
            "workers": (lambda x: x >= 0, "be at least 0"),
            "in_chans": (lambda x: x in (None, 1, 3), "be 1 (grey) or 3 (RGB)"),
            "img_size": positive,
            "head_only_epochs": (lambda x: x >= 0, "be at least 0"),
            "epochs": positive,
            "cooldown_epochs": (lambda x: x >= 0, "be at least 0"),
            "batch_size": positive,
            "grad_accum": positive,
            "global_batch_size": positive,
            "sched": (lambda x: x in ("cosine", "poly", "multistep"), "be cosine, poly or multistep"),
            "lr": (lambda x: x > 0, "be above 0"),
            "clip_grad": (lambda x: x is None or x > 0, "be above 0"),
            "ema_decay": (lambda x: x is None or 0 < x < 1, "lie between 0 and 1"),
            "mixed_precision": (lambda x: x in ("no", "bf16", "fp16"), "be no, bf16 or fp16"),
            "patience": positive,
            "save_every_steps": positive,
            "save_every_minutes": (lambda x: x is None or x > 0, "be above 0"),
            "keep_every_epochs": positive,
            "keep_every_steps": positive,
            "keep_newest": positive,
        }

    def __post_init__(self):
        types_ = typing.get_type_hints(type(self))
        for f in fields(self):
            object.__setattr__(self, f.name, _convert(f.name, getattr(self, f.name), types_[f.name]))
        for name, (holds, rule) in self.rules().items():
            if not holds(value := getattr(self, name)):
                raise UserError(f"{name} must {rule}, got {value!r}.")
        if (self.sched == "multistep") != bool(self.milestones):
            raise UserError(f"milestones go with sched multistep, got {self.milestones} with {self.sched}.")
        if list(self.milestones) != sorted(m for m in self.milestones if 0 < m < self.epochs):
            raise UserError(f"milestones must rise, between 0 and epochs, {self.epochs}, got {self.milestones}.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise UserError(f"warmup_epochs must be below epochs, {self.epochs}, got {self.warmup_epochs!r}.")

    def plain(self) -> dict:
        """The settings as a YAML file has them: with lists for tuples."""
        return json.loads(json.dumps(asdict(self)))


# Settings that a run may change when it is resumed: they say where things are and what is shown, and leave its course.
FREE = {"data", "output", "workers", "persistent_workers", "verify", "save_every_steps", "save_every_minutes"}
FREE |= {"keep_every_epochs", "keep_every_steps", "keep_newest", "trackers", "profile"}


def _convert(name: str, value, wanted):
    """The value as the type its field declares: YAML reads 1e-3 as a string, and a command line has only strings."""
    if isinstance(wanted, types.UnionType):
        if value is None or value == "none":
            return None
        wanted = next(t for t in typing.get_args(wanted) if t is not types.NoneType)
    if wanted is str and value is False:
        value = "no"  # what YAML makes of a bare no
    try:
        if wanted is bool or wanted is dict:
            if isinstance(value, wanted):
                return with_floats(value)
        elif typing.get_origin(wanted) is tuple:
            return tuple(_finite(float(x)) for x in ([value] if isinstance(value, (int, float)) else value))
        elif value is not None and not isinstance(value, (bool, dict, list)):
            return _finite(wanted(str(value)))
    except (TypeError, ValueError):
        pass
    raise UserError(f"{name} must be of type {getattr(wanted, '__name__', wanted)}, got {value!r}.")


def _finite(value):
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError
    return value


def read_yaml(path: Path, schema: type[Settings] = Settings) -> dict:
    """What a YAML file says of the settings, its keys checked; `inherit` names a recipe that it changes."""
    if not path.is_file():
        raise UserError(f"There is no config file {path}.")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is no YAML: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, got {values!r}.")
    inherited = {}
    if (parent := values.pop("inherit", None)) is not None:
        inherited = read_yaml(find_recipe(str(parent)), schema)
    known = [f.name for f in fields(schema)]
    for name in values:
        if name not in known:
            raise unknown(f"key in {path}:", str(name), known)
    return inherited | values


_ARGUMENTS = {"config", "resume", "extend_epochs", "accept_versions", "task", "find_lr", "command"}


def find_recipe(name: str) -> Path:
    """The YAML file that --config means: a path to one, or the bare name of a recipe."""
    path = Path(name)
    if path.is_file() or path.suffix or len(path.parts) != 1:
        return path
    recipes = {file.stem: file for file in resource_folder("configs").glob("*.yaml")}
    if name not in recipes:
        raise UserError(f"There is no recipe {name!r} and no such file; recipes: {', '.join(sorted(recipes))}.")
    return recipes[name]


def add_flags(parser: argparse.ArgumentParser, *schemas: type[Settings]) -> None:
    """A flag for every setting of any of the schemas, and --config, --resume and its companions."""
    parser.add_argument("--config", metavar="NAME", help="a recipe (finetune), or a YAML file of settings")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, or start it")
    parser.add_argument("--extend-epochs", type=int, metavar="N", help="with --resume: make the run N epochs long")
    parser.add_argument(
        "--accept-versions", action="store_true", help="with --resume: go on with other versions of what it runs on"
    )
    wanted, known = {}, {}
    for schema in reversed(schemas):  # of settings of one name, the first schema's is shown
        wanted |= typing.get_type_hints(schema)
        known |= {f.name: f for f in fields(schema)}
    for f in known.values():
        kwargs = dict(default=argparse.SUPPRESS, help=f.metadata["help"])
        if f.default not in (MISSING, None, ""):
            kwargs["help"] += f" ({f.default})"
        kwargs["help"] = kwargs["help"].replace("%", "%%")
        if wanted[f.name] is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif wanted[f.name] is dict:
            kwargs.update(nargs="+", metavar="KEY=VALUE")
        elif "tuple" in str(wanted[f.name]):
            kwargs.update(nargs="+", metavar="X")
        else:
            kwargs["metavar"] = "X"
        parser.add_argument(f"--{f.name.replace('_', '-')}", **kwargs)


@dataclass(frozen=True)
class Resume:
    """How a run that may have begun already is gone on with."""

    wanted: bool = False
    extend_epochs: int | None = None
    accept_versions: bool = False

    def __bool__(self) -> bool:
        return self.wanted


def from_flags(args: argparse.Namespace, schema: type[Settings] = Settings) -> tuple[Settings, Resume]:
    """Settings from defaults, then config.yaml of the run to resume, then --config, then flags; and --resume itself.

    Raises:
        UserError: A value is wrong, or a flag is of another schema.
    """
    known = {f.name for f in fields(schema)}
    given = {name: value for name, value in vars(args).items() if name not in _ARGUMENTS}
    if foreign := [name for name in given if name not in known]:
        raise UserError(f"--{foreign[0].replace('_', '-')} is not of this task: its settings have no {foreign[0]}.")
    flags = given
    resume = Resume(args.resume, args.extend_epochs, args.accept_versions)
    if not resume and (resume.extend_epochs is not None or resume.accept_versions):
        raise UserError("--extend-epochs and --accept-versions go with --resume.")
    pairs = [f.name for f in fields(schema) if f.default_factory is dict]
    flags |= {name: parse_model_kwargs(flags[name], name) for name in pairs if name in flags}
    layers = [{} if args.config is None else read_yaml(find_recipe(args.config), schema), flags]
    output = {"output": schema.output, **layers[0], **flags}["output"]
    if resume and (saved := Path(str(output)) / "config.yaml").is_file():
        layers.insert(0, read_yaml(saved, schema))
    values = {}
    for layer in layers:
        both = [name for name in pairs if all(isinstance(x.get(name), dict) for x in (values, layer))]
        values |= layer | {name: values[name] | layer[name] for name in both}
    return schema(**values), resume
