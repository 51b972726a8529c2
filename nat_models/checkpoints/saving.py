"""Folders of weights for others: a configuration and safetensors, in timm's form and in transformers'."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..errors import UserError

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


def label_names(model: nn.Module) -> list[str]:
    """The checkpoint's class names, else ImageNet's where the number of classes says so, else none."""
    names = model.pretrained_cfg.get("label_names")
    if names is None and (subset := infer_imagenet_subset(model)) is not None:
        names = ImageNetInfo(subset).label_descriptions()
    return list(names) if names is not None and len(names) == model.num_classes else []


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


def transformers_config(model: nn.Module, labels: Sequence[str] = ()) -> dict:
    """The config.json of a network for transformers; model_type is "dinat" where a block is dilated.

    Args:
        model: A NAT with a convolutional stem. One with output_norms is a backbone, whose out_features are all levels.
        labels: Names of the classes; without them transformers numbers them.

    Raises:
        UserError: transformers has no such network.
    """
    blocks = [list(level.blocks) for level in model.levels]
    windows = {block.attn.kernel_size for level in blocks for block in level}
    dilations = [[block.attn.dilation for block in level] for level in blocks]
    square = all(height == width for height, width in windows.union(*dilations))
    if "patch_embed.proj.weight" in model.state_dict() or len(windows) > 1 or not square:
        raise UserError("transformers has NAT and DiNAT alone, with square windows: no DiNAT_s, isotropic or ViT-rpb.")
    dilated = any(dilation != (1, 1) for level in dilations for dilation in level)
    model_type = "dinat" if dilated else "nat"
    first = blocks[0][0]
    config = dict(
        model_type=model_type,
        **_FIXED,
        num_channels=model.in_chans,
        embed_dim=model.embed_dim,
        depths=[len(level) for level in blocks],
        num_heads=[level[0].attn.num_heads for level in blocks],
        kernel_size=first.attn.kernel_size[0],
        mlp_ratio=first.mlp.fc1.out_features / first.attn.dim,
        qkv_bias=first.attn.qkv.bias is not None,
        layer_scale_init_value=0.0 if isinstance(first.ls1, nn.Identity) else 1e-5,
        hidden_dropout_prob=first.attn.proj_drop.p,
        attention_probs_dropout_prob=first.attn.attn_drop,
        drop_path_rate=getattr(blocks[-1][-1].drop_path1, "drop_prob", 0.0),
    )
    if dilated:
        config["dilations"] = [[dilation for dilation, _ in level] for level in dilations]
    name = model_type.capitalize()
    if model.has_output_norms:
        stages = [f"stage{i + 1}" for i in range(len(blocks))]
        return dict(config, architectures=[f"{name}Backbone"], out_features=stages)
    if not model.num_classes:
        return dict(config, architectures=[f"{name}Model"])
    names = list(labels) or [f"LABEL_{i}" for i in range(model.num_classes)]
    ids = {str(i): label for i, label in enumerate(names)}
    return dict(
        config,
        architectures=[f"{name}ForImageClassification"],
        id2label=ids,
        label2id={label: int(i) for i, label in ids.items()},
    )


def transformers_preprocessing(data_config: Mapping) -> dict:
    """timm's preprocessing as a preprocessor_config.json: the short side resized, and the centre cut out.

    From 384 px on, transformers' class resizes to a square instead.
    """
    side = min(data_config["input_size"][1:])
    resample = dict(nearest=0, lanczos=1, bilinear=2, bicubic=3, box=4, hamming=5)[data_config["interpolation"]]
    return dict(
        image_processor_type="ConvNextImageProcessor",
        do_resize=True,
        size=dict(shortest_edge=side),
        crop_pct=data_config["crop_pct"],
        resample=resample,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(data_config["mean"]),
        image_std=list(data_config["std"]),
    )
