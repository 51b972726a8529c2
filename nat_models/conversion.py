"""A checkpoint of any layout as a folder of another, with a check that both compute alike."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from .checkpoints import convert_state_dict, detect_layout, find_network, fit_state_dict, read_checkpoint
from .checkpoints.files import read_config, sha256_of
from .checkpoints.saving import (
    network_arguments,
    save_config,
    save_tensors,
    synsets,
    transformers_config,
    transformers_files,
)
from .errors import UserError, unknown
from .writing import write_atomically, writing

FORMS = ("timm", "transformers", "original")
TOLERANCE = 1e-5  # of a difference, divided by max(1, largest output); float32 sums in another order stay below
# What of transformers' configuration tells the published networks apart.
_DATA = ("embed_dim", "depths", "num_heads", "kernel_size", "dilations", "mlp_ratio", "layer_scale_init_value")


class Described(NamedTuple):
    """What the configuration beside weights says of them."""

    name: str  # timm's
    arguments: dict
    labels: list[str] | None
    problem_type: str | None = None  # transformers' word for what the classes are


class Converted(NamedTuple):
    """What was written."""

    path: Path
    source: str  # layout that was read
    parameters: int
    sha256: str
    difference: float | None  # largest, of logits or feature maps; None where it was not asked for


def describe(checkpoint: Path) -> Described | None:
    """Reads the config.json beside a checkpoint, of timm or transformers; None where there is none.

    Raises:
        UserError: It cannot be read, or is of another network.
    """
    path = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.json"
    if not path.is_file():
        return None
    config = read_config(path)
    if "architecture" in config:
        arguments = dict(config.get("model_args", {}))
        return Described(config["architecture"], arguments, config.get("label_names"), config.get("problem_type"))
    labels = config.get("id2label")
    labels = None if labels is None else [labels[key] for key in sorted(labels, key=int)]
    backbone = config.get("backbone_config")
    problem_type = config.get("problem_type")
    config = backbone or config
    if config.get("model_type") not in ("nat", "dinat"):
        raise UserError(f"{path} is of no NAT: it has neither timm's architecture nor model_type nat or dinat.")
    return Described(*_variant(config), *((None, None) if backbone else (labels, problem_type)))


def _variant(config: Mapping) -> tuple[str, dict]:
    """The registered network that transformers' configuration describes, or the smallest one with its arguments."""
    model_type, arguments = config["model_type"], network_arguments(config)

    def data(name: str, **kwargs) -> dict:
        found = transformers_config(timm.create_model(name, device="meta", **kwargs))
        return {key: found.get(key) for key in _DATA}

    wanted = data(f"{model_type}_mini", **arguments)
    for name in timm.list_models(f"{model_type}_*"):
        with suppress(UserError):  # one that transformers does not have
            if data(name) == wanted:
                return name, {}
    return f"{model_type}_mini", arguments


def convert(
    checkpoint: Path,
    output: Path,
    *,
    to: str,
    name: str | None = None,
    model_kwargs: Mapping | None = None,
    check: bool = False,
) -> Converted:
    """Writes model.safetensors, and the config.json of its form, into a folder.

    Args:
        checkpoint: A file or folder in any layout, whatever stands around the network; a pickle is read without running
            code from it.
        output: The folder; made where it is missing.
        to: One of FORMS. "timm": our names, for `local-dir:FOLDER` and the Hub. "transformers": its names, config.json
            and preprocessor_config.json. "original": the authors' names, without a configuration.
        name: timm's name of the network; needed where no config.json stands beside the checkpoint.
        model_kwargs: More of its arguments, such as dilations.
        check: Load both, run both on random images, and compare.

    Raises:
        UserError: Nobody says what network it is, or it is none of ours; the form does not exist, or not for this
            network; the output holds the checkpoint or cannot be written; the check found a difference above TOLERANCE.
        CheckpointError: The weights cannot be read, or are not this network's.
    """
    if to not in FORMS:
        raise UserError(f"A checkpoint is converted to one of {', '.join(FORMS)}, got {to!r}.")
    if output.exists() and output.resolve() in (checkpoint.resolve(), checkpoint.resolve().parent):
        raise UserError(f"The output {output} holds the checkpoint: choose another one.")
    described = describe(checkpoint) if name is None else Described(name, {}, None)
    if described is None:
        raise UserError(f"Beside {checkpoint} is no config.json that says what network it is: pass its name, --model.")
    known = timm.list_models(module=["nat", "dinat"])
    if described.name.partition(".")[0] not in known:
        raise unknown("model", described.name, known)
    arguments = dict(described.arguments, **(model_kwargs or {}))

    tensors = find_network(read_checkpoint(checkpoint)).tensors
    ours = convert_state_dict(tensors, "nat_models")
    has_norm = "norm.weight" in ours
    arguments |= _told_by(ours)
    target = timm.create_model(described.name, device="meta", **arguments)
    fitted = fit_state_dict(ours, target, num_classes=target.num_classes, features_only=not has_norm)
    state_dict = {key: value for key, value in fitted.items() if key in ours}
    labels = described.labels if described.labels and len(described.labels) == target.num_classes else None
    data_config = resolve_data_config({}, model=target)
    files = {}
    if to == "transformers":
        if not has_norm and not target.has_output_norms:
            raise UserError("transformers' networks have a norm after the last level or after each; this has neither.")
        names = labels or synsets(target)
        files = transformers_files(target, classes=names, data_config=data_config, problem_type=described.problem_type)
        state_dict = convert_state_dict(state_dict, to, model_type=files["config.json"]["model_type"])
    elif to == "original":
        state_dict = convert_state_dict(state_dict, to)
    path = output / "model.safetensors"
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        temporary = output / "model.safetensors.tmp"
        save_tensors(state_dict, temporary)
        if to == "timm":
            told = dict(label_names=labels, problem_type=described.problem_type)
            save_config(target, output, model_config=told, data_config=data_config)
        for name, content in files.items():
            write_atomically(output / name, json.dumps(content, indent=2))
        temporary.replace(path)

    difference = None
    if check:
        maps = target.has_output_norms or not has_norm
        difference = _difference(checkpoint, output, to, described.name, dict(arguments, features_only=maps))
        if not difference <= TOLERANCE:
            raise UserError(f"{checkpoint} and {output} differ by {difference:.1e}, which is above {TOLERANCE:.0e}.")
    parameters = sum(tensor.numel() for tensor in state_dict.values())
    return Converted(path, detect_layout(tensors), parameters, sha256_of(path), difference)


def _told_by(ours: Mapping[str, Tensor]) -> dict:
    """Arguments of the network that a checkpoint's tensors tell."""
    head = ours.get("head.fc.weight")
    stem = next(ours[key] for key in ("patch_embed.proj.0.weight", "patch_embed.proj.weight") if key in ours)
    norms = dict(output_norms=True) if "output_norms.0.weight" in ours else {}
    return dict(norms, num_classes=0 if head is None else len(head), in_chans=stem.shape[1])


@torch.no_grad()
def _difference(checkpoint: Path, output: Path, to: str, name: str, arguments: Mapping) -> float:
    """Largest difference of what two files compute for random images, divided by max(1, largest number)."""

    def load(name: str, **kwargs) -> nn.Module:
        return timm.create_model(name, pretrained=True, **kwargs).eval()

    def from_file(path: Path) -> nn.Module:
        return load(name, pretrained_cfg_overlay=dict(file=str(path), source=""), **arguments)

    source = from_file(checkpoint)
    if to == "timm":
        converted = load(f"local-dir:{output}", features_only=arguments["features_only"])
    elif to == "original":
        converted = from_file(output)
    else:
        converted = _in_transformers(output)
    size = timm.get_pretrained_cfg(name).input_size[1:]
    image = torch.randn(2, arguments["in_chans"], *size)
    expected, found = source(image), converted(image)
    if isinstance(expected, Tensor):
        expected, found = [expected], [found]
    pairs = zip(expected, found, strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1)) for a, b in pairs)


def _in_transformers(folder: Path) -> Callable[[Tensor], Tensor | tuple[Tensor, ...]]:
    try:
        from .integrations import hf_transformers
    except ModuleNotFoundError as e:
        raise UserError(f"The check of transformers' form needs transformers: {e}") from None
    (architecture,) = read_config(folder / "config.json")["architectures"]
    model = getattr(hf_transformers, architecture).from_pretrained(folder).eval()

    def run(image: Tensor) -> Tensor | tuple[Tensor, ...]:
        output = model(image)
        return next(output[key] for key in ("logits", "feature_maps", "pooler_output") if key in output)

    return run
