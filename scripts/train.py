"""Fine-tunes a timm model on a folder of images.

    python scripts/train.py --data DIR [--config configs/finetune.yaml] [flags, which win over the YAML file]

DIR holds train/ and val/, each with a folder per class, or it is one tree with a folder per class, of which
--val-fraction is held out. The output folder gets:

    best/, last/            timm folders: timm.create_model("local-dir:output/best", pretrained=True)
    summary.csv, curve.png  the course, epoch by epoch
    config.yaml             the settings as they were resolved
    state/                  what --resume needs

state/ alone decides how far a run has come, and everything else can be written again from it: a run
killed at any moment goes on with --resume as if nothing had happened. Randomness is a function of seed, epoch and
process, so the course is the same. Works under `accelerate launch`; batch_size is then per process.
"""

import argparse
import csv
import difflib
import io
import json
import math
import os
import random
import shutil
import sys
import time
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path

import timm
import torch
import yaml
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from rich.console import Console
from rich.progress import track
from timm.data import Mixup, create_transform
from timm.data.model_config import resolve_input_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.models import resolve_model_input_args, save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from timm.utils.misc import natural_key
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import nat_models  # noqa: F401  registers the models
from nat_models.checkpoints import CheckpointError

console = Console(highlight=False, soft_wrap=True)


class UserError(Exception):
    """Something the caller can mend; `main` prints it without a traceback."""


def option(default, help: str):
    return field(default=default, metadata=dict(help=help))


@dataclass(frozen=True)
class Config:
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
    cooldown_epochs: int = option(0, "epochs at min_lr behind the schedule")
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
        types_ = typing.get_type_hints(Config)
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


def _unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3)
    return UserError(f"Unknown {what} {name!r}, " + (f"near to {', '.join(close)}." if close else f"known: {known}."))


def read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"There is no config file {path}.")
    values = yaml.safe_load(path.read_text()) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, got {values!r}.")
    known = [f.name for f in fields(Config)]
    for name in values:
        if name not in known:
            raise _unknown(f"key in {path}:", str(name), known)
    return values


def parse_model_kwargs(pairs: Iterable[str]) -> dict:
    """key=value strings as a dict, values read as YAML: kernel_size=3, depths=[3,4,6,5]."""
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise UserError(f"model_kwargs must be key=value, got {wrong[0]!r}.")
    return {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}


def parse_args(argv: Sequence[str] | None = None) -> tuple[Config, bool]:
    """Settings from defaults, then config.yaml of the run to resume, then --config, then flags; and --resume itself."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, or start it")
    wanted = typing.get_type_hints(Config)
    for f in fields(Config):
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
    args, rest = parser.parse_known_args(argv)
    if rest:
        raise _unknown("argument", rest[0].split("=")[0], parser._option_string_actions)
    flags = vars(args)
    config_file, resume = flags.pop("config"), flags.pop("resume")
    if "model_kwargs" in flags:
        flags["model_kwargs"] = parse_model_kwargs(flags["model_kwargs"])
    layers = [read_yaml(config_file) if config_file else {}, flags]
    output = {"output": Config.output, **layers[0], **flags}["output"]
    if resume and (saved := Path(output) / "config.yaml").is_file():
        layers.insert(0, read_yaml(saved))
    values = {}
    for layer in layers:
        if isinstance(values.get("model_kwargs"), dict) and isinstance(layer.get("model_kwargs"), dict):
            layer = {**layer, "model_kwargs": values["model_kwargs"] | layer["model_kwargs"]}
        values |= layer
    return Config(**values), resume


# Data


class ImageFiles(Dataset):
    """(image, target) of listed files. An unreadable one is an error that names it, where timm's ImageDataset would
    hand out its neighbour instead: a score over stand-ins is wrong."""

    def __init__(self, samples: Sequence[tuple[Path, int]], in_chans: int, transform):
        self.samples, self.mode, self.transform = samples, "L" if in_chans == 1 else "RGB", transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, target = self.samples[index]
        try:
            with Image.open(path) as image:
                image = image.convert(self.mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise UserError(f"{path} cannot be read as an image: {e}") from None
        return self.transform(image), target


def list_images(folder: Path) -> list[Path]:
    """All images below a folder, ordered by their path alone: no file system and no locale has a say."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    files = [Path(file) for file, _ in find_images_and_targets(str(folder))[0]]
    if not files:
        raise UserError(f"There are no images in {folder}.")
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _by_class(folder: Path) -> dict[str, list[Path]]:
    found = {}
    for file in list_images(folder):
        parts = file.relative_to(folder).parts
        if len(parts) != 2:
            raise UserError(f"Images must lie in {folder}/CLASS/, or in train/CLASS/ and val/CLASS/; found {file}.")
        found.setdefault(parts[0], []).append(file)
    return found


def find_data(config: Config) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]], list[str]]:
    """Training samples, validation samples (file, class index), class names.

    Without train/ and val/, a part of each class is drawn by seed and class name: the same files on every machine, and
    another class more changes nothing for the rest. A class of one image is trained on only.
    """
    root = Path(config.data)
    if (root / "train").is_dir() and (root / "val").is_dir():
        train, val = _by_class(root / "train"), _by_class(root / "val")
        if strangers := sorted(set(val) - set(train)):
            raise UserError(f"Classes in {root / 'val'} that {root / 'train'} lacks: {', '.join(strangers)}.")
    else:
        train, val = _by_class(root), {}
        for name, files in train.items():
            count = min(max(1, round(config.val_fraction * len(files))), len(files) - 1)
            held_out = set(random.Random(f"{config.seed}/{name}").sample(files, count))
            val[name] = [file for file in files if file in held_out]
            train[name] = [file for file in files if file not in held_out]
    names = sorted(train, key=lambda name: (natural_key(name), name))
    if len(names) < 2 or not any(val.values()):
        raise UserError(f"{root} must hold at least 2 classes and an image to validate on, found the classes {names}.")
    train, val = ([(f, i) for i, name in enumerate(names) for f in part.get(name, [])] for part in (train, val))
    return train, val, names


# Model and training


def make_model(config: Config, num_classes: int) -> nn.Module:
    """The model with its initial weights; config.checkpoint wins over config.pretrained."""
    name = config.model
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise _unknown("model", name, timm.list_models())
    # timm loads an own file as it does published weights: converted, and with another head or stem where needed.
    overlay = None if config.checkpoint is None else dict(file=config.checkpoint, source="")
    requested = dict(img_size=config.img_size, in_chans=config.in_chans)
    own = dict(num_classes=num_classes, drop_path_rate=config.drop_path, pretrained_cfg_overlay=overlay)
    kwargs = resolve_model_input_args(name, requested, **{**config.model_kwargs, **own})
    return timm.create_model(**kwargs, pretrained=config.pretrained or config.checkpoint is not None)


def evaluate(model: nn.Module, loader: Iterable, accelerator: Accelerator, description: str = "") -> dict[str, float]:
    """Mean cross-entropy, top-1 and (with more than 5 classes) top-5 in percent, and the number of images.

    Args:
        model: Not wrapped by accelerate; put into eval mode and back.
        loader: Prepared by accelerate. What it repeats to fill the last batch of a process is not counted twice.
    """
    was_training = model.training
    model.eval()
    results = []
    for images, target in _track(loader, accelerator, description):
        with torch.inference_mode(), accelerator.autocast():
            logits = model(images).float()
        ranks = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
        loss = nn.functional.cross_entropy(logits, target, reduction="none")
        batch = torch.stack([loss, ranks[:, 0].float(), ranks.any(dim=1).float()], dim=1)
        results.append(accelerator.gather_for_metrics(batch))
    model.train(was_training)
    results = torch.cat(results).double()
    loss, top1, top5 = results.mean(dim=0).tolist()
    metrics = dict(val_loss=loss, top1=100 * top1)
    return metrics | (dict(top5=100 * top5) if logits.shape[1] > 5 else {}) | dict(images=len(results))


def _track(loader: Iterable, accelerator: Accelerator, description: str) -> Iterable:
    hidden = not (accelerator.is_main_process and console.is_terminal and description)
    return track(loader, description, total=len(loader), console=console, transient=True, disable=hidden)


def train_epoch(model, loader, optimizer, scheduler, ema, mixup, config, accelerator, updates: int, description: str):
    """One pass over the data, `updates` updates into the run; returns the mean loss and the last learning rate."""
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else config.smoothing)  # mixup smooths itself
    model.train()
    total = torch.zeros((), device=accelerator.device)
    for step, (images, target) in enumerate(_track(loader, accelerator, description), start=1):
        if mixup:
            images, target = mixup(images, target)
        with accelerator.accumulate(model):
            loss = criterion(model(images), target)
            accelerator.backward(loss)
            if accelerator.sync_gradients and config.clip_grad is not None:
                accelerator.clip_grad_norm_(model.parameters(), config.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach()
        # Asking the device for a number makes it wait, hence not at each step.
        if (step % 20 == 0 or step == len(loader)) and not math.isfinite(total.item()):
            raise UserError(f"The loss is {total.item()} in {description}, step {step}: lower lr or set clip_grad.")
        if accelerator.sync_gradients:
            updates += 1
            group = optimizer.param_groups[0]
            lr = group["lr"] / group.get("lr_scale", 1.0)  # before layer decay
            scheduler.step_update(updates)
            if ema is not None:
                ema.update(accelerator.unwrap_model(model), step=updates)
    return accelerator.reduce(total / len(loader), reduction="mean").item(), lr


class Course:
    """A row per finished epoch, saved with the training state."""

    def __init__(self):
        self.rows = []

    def state_dict(self) -> dict:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict) -> None:
        self.rows = state["rows"]

    def best(self) -> dict:
        return max(self.rows, key=lambda row: (row["top1"], -row["val_loss"], -row["epoch"]))


def train(config: Config, resume: bool = False) -> list[dict[str, float]]:
    """Runs or continues a training; returns what summary.csv holds."""
    output = Path(config.output)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.grad_accum,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
    )
    main_process = accelerator.is_main_process
    resuming = check_output(config, output, resume)
    accelerator.wait_for_everyone()  # nobody writes before everybody looked

    train_samples, val_samples, names = find_data(config)
    if (whole := config.batch_size * accelerator.num_processes) > len(train_samples):
        raise UserError(f"batch_size x processes, {whole}, must not exceed the {len(train_samples)} training images.")
    set_seed(config.seed)
    # The weights of a run that goes on are its own: where it began from may be out of reach by now.
    start = replace(config, pretrained=False, checkpoint=None) if resuming else config
    model = make_model(start, len(names)).to(accelerator.device)
    preprocessing = {k: getattr(config, k) for k in ("img_size", "crop_pct", "interpolation", "mean", "std")}
    data_config = resolve_input_data_config(model, preprocessing)
    in_chans = data_config["input_size"][0]
    augmentation = {k: getattr(config, k) for k in ("auto_augment", "scale", "ratio", "hflip", "color_jitter")}
    transform = create_transform(
        **data_config, is_training=True, re_prob=config.reprob, re_mode="pixel", **augmentation
    )
    train_set = ImageFiles(train_samples, in_chans, transform)
    val_set = ImageFiles(val_samples, in_chans, create_transform(**data_config))
    common = dict(batch_size=config.batch_size, num_workers=config.workers, pin_memory=torch.cuda.is_available())
    train_loader = DataLoader(train_set, shuffle=True, drop_last=True, **common)
    val_loader = DataLoader(val_set, **common)
    mixup = None
    if config.mixup or config.cutmix:
        mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=len(names))

    decay = dict(weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    optimizer = create_optimizer_v2(model, opt=config.opt, lr=config.lr, **decay)
    # The average of few updates would be little more than the initial weights, so its decay rises with their number.
    ema = None if config.ema_decay is None else ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
    model, optimizer, train_loader, val_loader = accelerator.prepare(model, optimizer, train_loader, val_loader)
    updates_per_epoch = math.ceil(len(train_loader) / config.grad_accum)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        cooldown_epochs=config.cooldown_epochs,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    course = Course()
    accelerator.register_for_checkpointing(course, *([] if ema is None else [ema]))
    shipped = accelerator.unwrap_model(model) if ema is None else ema.module
    publish_args = (output, course, shipped, dict(label_names=names), data_config)

    if main_process:
        parameters = sum(p.numel() for p in model.parameters())
        console.print(f"{len(train_samples):,} training and {len(val_samples):,} validation images, ", end="")
        console.print(f"{len(names)} classes, {config.model} with {parameters:,} parameters on {accelerator.device}")
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "config.yaml", yaml.safe_dump(_plain(config), sort_keys=False))
        restore_folder(output / "state")
    accelerator.wait_for_everyone()
    if resuming:
        accelerator.load_state(str(output / "state"))
        if main_process:
            publish(*publish_args)  # the run may have been killed between its state and these
            console.print(f"{output}: continuing after epoch {len(course.rows)} of {epochs}")
    for epoch in range(len(course.rows) + 1, epochs + 1):
        started = time.perf_counter()
        set_seed(config.seed + 100_003 * epoch, device_specific=True)
        train_loader.set_epoch(epoch)
        updates = (epoch - 1) * updates_per_epoch
        scheduler.step_update(updates)
        args = (model, train_loader, optimizer, scheduler, ema, mixup, config, accelerator, updates)
        loss, lr = train_epoch(*args, f"epoch {epoch}/{epochs}")
        trained = time.perf_counter()
        metrics = evaluate(shipped, val_loader, accelerator, "validation")
        del metrics["images"]
        speed = len(train_loader) * whole / (trained - started)
        timing = dict(seconds=round(time.perf_counter() - started, 2), images_per_second=round(speed, 1))
        course.rows.append(dict(epoch=epoch, lr=lr, train_loss=loss, **metrics, **timing))
        commit(accelerator, output / "state")
        if main_process:
            publish(*publish_args)
            row = course.rows[-1].items()
            console.print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row))
    if main_process:
        best = course.best()
        console.print(f"best: epoch {best['epoch']} with top-1 {best['top1']:.2f} %, in {output / 'best'}")
    accelerator.wait_for_everyone()
    return course.rows


# Files


def _plain(config: Config) -> dict:
    return json.loads(json.dumps(asdict(config)))  # tuples become lists, as YAML has them


def check_output(config: Config, output: Path, resume: bool) -> bool:
    """Whether there is a run to go on with.

    A run is never overwritten, and never continued with other settings: the course would not be the same.
    """
    if not any((output / name).is_dir() for name in ("state", "state.old")):
        return False
    if not resume:
        raise UserError(f"{output} holds a run already: continue it with --resume, or choose another --output.")
    saved = _plain(Config(**read_yaml(output / "config.yaml")))
    for name, new in _plain(config).items():
        if saved[name] != new and name not in ("data", "output", "workers"):
            raise UserError(
                f"{name} must stay {saved[name]!r}, as the run in {output} began, to resume it; got {new!r}."
            )
    return True


def write_atomically(path: Path, content: str | bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def swap_folder(new: Path, path: Path) -> None:
    """Puts a finished folder in the place of an older one. No system call replaces a folder that is not empty, so for
    an instant there is none at `path`, and `restore_folder` puts the older one back; half of one there never is."""
    old = path.with_name(f"{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(path: Path) -> None:
    old = path.with_name(f"{path.name}.old")
    if old.is_dir() and not path.exists():
        os.replace(old, path)


def commit(accelerator: Accelerator, state: Path) -> None:
    """Saves all that continuing needs; from the swap on, the epoch counts as done."""
    temporary = state.with_name(f"{state.name}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        swap_folder(temporary, state)


def publish(output: Path, course: Course, model: nn.Module, model_config: dict, data_config: dict) -> None:
    """Writes what users read; nothing but course and weights goes in, so it can be done again after a kill."""
    targets = ["last", "best"] if course.best() is course.rows[-1] else ["last"]
    for target in targets:
        temporary = output / f"{target}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        save_for_hf(model, temporary, model_config=model_config, safe_serialization=True, data_config=data_config)
        swap_folder(temporary, output / target)
    table = io.StringIO()
    writer = csv.DictWriter(table, course.rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(course.rows)
    write_atomically(output / "summary.csv", table.getvalue())
    write_atomically(output / "curve.png", plot(course.rows))


def plot(rows: Sequence[dict]) -> bytes:
    """Losses and accuracy over the epochs, as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    curves = [
        ("cross-entropy (training: augmented, smoothed)", ["train_loss", "val_loss"]),
        ("percent of validation images", ["top1", "top5"]),
    ]
    for axes, (unit, names) in zip(figure.subplots(1, 2), curves, strict=True):
        for name in names:
            if name in rows[0]:
                axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], label=name, marker=".")
        axes.set(xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    try:
        train(*parse_args(argv))
    except (UserError, CheckpointError) as e:
        # From a worker process of the loader the message arrives behind a traceback.
        print(f"error: {str(e).rpartition('UserError: ')[2].strip()}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
