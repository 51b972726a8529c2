"""Folders of weights for others: a configuration and safetensors, in timm's form and in transformers'."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..errors import UserError
from .layouts import convert_state_dict

# Fields of transformers' NatConfig and DinatConfig, and the arguments of ours that say the same.
_FIELDS = {
    "num_channels": "in_chans",
    "embed_dim": "embed_dim",
    "depths": "depths",
    "num_heads": "num_heads",
    "kernel_size": "kernel_size",
    "dilations": "dilations",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "layer_scale_init_value": "init_values",
    "hidden_dropout_prob": "proj_drop_rate",
    "attention_probs_dropout_prob": "attn_drop_rate",
    "drop_path_rate": "drop_path_rate",
}
_FIXED = dict(patch_size=4, hidden_act="gelu", layer_norm_eps=1e-5)


def save_tensors(state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Writes a state dict as safetensors, as others read it."""
    # safetensors takes no tensor that is channels-last; transformers takes no file that does not say it is PyTorch's.
    tensors = {name: tensor.contiguous() for name, tensor in state_dict.items()}
    save_file(tensors, path, metadata=dict(format="pt"))


def save_model(network: nn.Module, folder: Path, *, model_config: Mapping, data_config: Mapping) -> None:
    """Writes config.json and model.safetensors, which timm (`local-dir:FOLDER`) and transformers' AutoModel load.

    Args:
        network: A timm model.
        folder: Exists.
        model_config: More for the top of config.json: label_names; what is None is left out.
        data_config: The preprocessing, in timm's words.
    """
    save_tensors(network.state_dict(), folder / "model.safetensors")
    save_config(network, folder, model_config=model_config, data_config=data_config)


def save_config(network: nn.Module, folder: Path, *, model_config: Mapping, data_config: Mapping) -> None:
    """Writes config.json alone; arguments as in save_model."""
    config = {name: value for name, value in model_config.items() if value is not None}
    path = folder / "config.json"
    save_config_for_hf(network, path, model_config=config, data_config=dict(data_config))
    written = json.loads(path.read_text())
    # It stands at the top as well, and transformers passes on both. What else timm repeats there, in_chans and
    # global_pool, has to stay: transformers reads it nowhere else.
    written.get("model_args", {}).pop("num_classes", None)
    for stale in ("label_names", "label_descriptions"):  # of the model that this one was fine-tuned from
        written["pretrained_cfg"].pop(stale, None)
    path.write_text(json.dumps(written, indent=2))


def imagenet_of(model: nn.Module) -> ImageNetInfo | None:
    """The set of ImageNet with as many classes as the model; None where there is none, or timm has not its names."""
    subset = infer_imagenet_subset(model)
    with contextlib.suppress(AssertionError):  # timm knows the number of some sets alone
        return None if subset is None else ImageNetInfo(subset)
    return None


def label_names(model: nn.Module) -> list[str]:
    """The checkpoint's class names, else ImageNet's where the number of classes says so, else none."""
    names = model.pretrained_cfg.get("label_names")
    if names is None and (imagenet := imagenet_of(model)) is not None:
        names = imagenet.label_descriptions()
    return list(names) if names is not None and len(names) == model.num_classes else []


def synsets(model: nn.Module) -> list[str]:
    """Classes of a network that names none: ImageNet's where their number says so, else numbers as transformers'."""
    if (imagenet := imagenet_of(model)) is not None:
        return list(imagenet.label_names())
    return [f"LABEL_{i}" for i in range(model.num_classes)]


def network_arguments(config: Mapping) -> dict:
    """The arguments of a NAT that a config.json of transformers' model types "nat" and "dinat" stands for.

    Args:
        config: Such a configuration; what it leaves out has the default of transformers' classes.

    Raises:
        UserError: It asks for what the networks do not have: another activation, patch size or epsilon.
    """
    if other := {name: config[name] for name, value in _FIXED.items() if config.get(name, value) != value}:
        raise UserError(f"NAT and DiNAT have {_FIXED}, got {other} in the configuration.")
    defaults = dict(embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0, drop_path_rate=0.1)
    given = {ours: config[theirs] for theirs, ours in _FIELDS.items() if config.get(theirs) is not None}
    arguments = defaults | given
    arguments["init_values"] = arguments.get("init_values") or None  # theirs is 0.0 for none
    if config.get("model_type") == "nat":
        arguments.pop("dilations", None)
    return arguments


def save_for_transformers(
    network: nn.Module, folder: Path, *, classes: Sequence[str], data_config: Mapping, problem_type: str | None = None
) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors as transformers' NAT and DiNAT have them.

    Args:
        network: A NAT or DiNAT.
        folder: Exists.
        classes: Names of the outputs; synsets of ImageNet are written as words.
        data_config: The preprocessing, in timm's words.
        problem_type: transformers' word for what the classes are; None for one class per image.

    Raises:
        UserError: transformers has no such network, or no such preprocessing.
    """
    files = transformers_files(network, classes=classes, data_config=data_config, problem_type=problem_type)
    model_type = files["config.json"]["model_type"]
    tensors = convert_state_dict(network.state_dict(), "transformers", model_type=model_type)
    save_tensors(tensors, folder / "model.safetensors")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))


def transformers_files(
    network: nn.Module, *, classes: Sequence[str], data_config: Mapping, problem_type: str | None = None
) -> dict[str, dict]:
    """What stands beside the tensors, by the names of files; arguments as in save_for_transformers."""
    config = transformers_config(network, classes)
    if problem_type is not None:
        config["problem_type"] = problem_type
    return {"config.json": config, "preprocessor_config.json": _preprocessor_config(data_config)}


def transformers_config(network: nn.Module, classes: Sequence[str] = ()) -> dict:
    """The configuration that transformers has of a network; model_type is "dinat" where a block is dilated.

    Args:
        network: A NAT or DiNAT. One with output_norms is a backbone, whose out_features are all levels; one without a
            head a NatModel or DinatModel.
        classes: Names of the outputs; synsets of ImageNet become words.

    Raises:
        UserError: transformers has no such network; the message says what it lacks.
    """
    blocks = [list(level.blocks) for level in network.levels]
    every = [block for level in blocks for block in level]
    sizes = {block.attn.kernel_size for block in every}
    dilations = [[block.attn.dilation for block in level] for level in blocks]
    refused = {
        "patches that do not overlap (DiNAT_s, isotropic networks, ViT-rpb)": hasattr(
            network.patch_embed, "patch_size"
        ),
        "several kernel sizes, or one that is not square": len(sizes) > 1 or len(set(every[0].attn.kernel_size)) > 1,
        "a dilation for each axis": any(a != b for level in dilations for a, b in level),
        f"the pooling {network.global_pool!r}": network.global_pool != "avg",
        "attention without rpb": any(block.attn.rpb is None for block in every),
    }
    if lacking := [what for what, found in refused.items() if found]:
        raise UserError(f"transformers' NAT and DiNAT do not have {' or '.join(lacking)}: timm's form does.")
    first, last = every[0], every[-1]
    dilated = any(pair != (1, 1) for level in dilations for pair in level)
    config = dict(
        model_type="dinat" if dilated else "nat",
        **_FIXED,
        num_channels=network.in_chans,
        embed_dim=network.embed_dim,
        depths=[len(level) for level in blocks],
        num_heads=[level[0].attn.num_heads for level in blocks],
        kernel_size=first.attn.kernel_size[0],
        mlp_ratio=first.mlp.fc1.out_features / network.embed_dim,
        qkv_bias=first.attn.qkv.bias is not None,
        layer_scale_init_value=getattr(first.ls1, "init_values", 0.0),
        drop_path_rate=getattr(last.drop_path1, "drop_prob", 0.0),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.02,
        torch_dtype=str(first.norm1.weight.dtype).removeprefix("torch."),
    )
    if dilated:
        config["dilations"] = [[pair[0] for pair in level] for level in dilations]
    name = "Dinat" if dilated else "Nat"
    if network.has_output_norms:
        stages = [f"stage{i + 1}" for i in range(len(blocks))]
        return dict(architectures=[f"{name}Backbone"], **config, out_features=stages)
    if network.num_classes == 0:
        return dict(architectures=[f"{name}Model"], **config)
    names = _words(classes)
    return dict(
        architectures=[f"{name}ForImageClassification"],
        **config,
        id2label={str(i): name for i, name in enumerate(names)},
        label2id={name: i for i, name in enumerate(names)},
    )


def _words(classes: Sequence[str]) -> list[str]:
    """The classes as people call them. Two synsets may have one word, and transformers finds a class by its name."""
    words = ImageNetInfo().label_descriptions(as_dict=True)
    described = [words.get(name, name) for name in classes]
    return [
        f"{text} ({name})" if described.count(text) > 1 and text != name else text
        for name, text in zip(classes, described, strict=True)
    ]


def _preprocessor_config(data_config: Mapping) -> dict:
    """timm's evaluation as BitImageProcessor does it: the short side to img_size / crop_pct, then the centre."""
    (channels, height, width), crop_pct = data_config["input_size"], data_config["crop_pct"]
    if data_config.get("crop_mode", "center") != "center" or height != width:
        raise UserError("transformers' preprocessing is said for a square centre crop alone: timm's form has others.")
    return dict(
        image_processor_type="BitImageProcessor",
        do_convert_rgb=channels == 3,
        do_resize=True,
        size=dict(shortest_edge=int(height / crop_pct)),
        resample=int(Image.Resampling[data_config["interpolation"].upper()]),
        do_center_crop=True,
        crop_size=dict(height=height, width=width),
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(data_config["mean"]),
        image_std=list(data_config["std"]),
    )
