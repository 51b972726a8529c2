"""Folders of weights for others, in timm's format and in that of transformers' NAT and DiNAT: configuration and
safetensors."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from timm.models._hub import save_config_for_hf
from torch import nn

from ..checkpoints import convert_state_dict
from ..errors import UserError
from ..networks.nat import NAT


def save_model(network: nn.Module, folder: Path, *, model_config: Mapping, data_config: Mapping) -> None:
    """Writes config.json and model.safetensors, which timm (`local-dir:FOLDER`) and transformers' AutoModel load.

    Args:
        network: A timm model.
        folder: Exists.
        model_config: More for the top of config.json: label_names; what is None is left out.
        data_config: The preprocessing, in timm's words.
    """
    # safetensors takes no tensor that is channels-last; transformers takes no file that does not say it is PyTorch's.
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata=dict(format="pt"))
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


def save_for_transformers(
    network: nn.Module, folder: Path, *, classes: Sequence[str], data_config: Mapping, problem_type: str | None = None
) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors as transformers' NAT and DiNAT have them.

    Args:
        network: A NAT or DiNAT with a head.
        folder: Exists.
        classes: Names of the outputs; synsets of ImageNet are written as words.
        data_config: The preprocessing, in timm's words.
        problem_type: transformers' word for what the classes are; None for one class per image.

    Raises:
        UserError: transformers has no such network, or no such preprocessing.
    """
    config = transformers_config(network, classes)
    if problem_type is not None:
        config["problem_type"] = problem_type
    preprocessing = _preprocessor_config(data_config)
    # DiNAT's keys are NAT's after another prefix.
    tensors = {
        name.replace("nat.", f"{config['model_type']}.", 1) if name.startswith("nat.") else name: tensor.contiguous()
        for name, tensor in convert_state_dict(network.state_dict(), "transformers").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata=dict(format="pt"))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2))


def transformers_config(network: nn.Module, classes: Sequence[str]) -> dict:
    """The configuration that transformers' NatForImageClassification or DinatForImageClassification has of a network.

    Args:
        network: A NAT or DiNAT with a head.
        classes: Names of the outputs; synsets of ImageNet become words.

    Raises:
        UserError: transformers has no such network; the message says what it lacks.
    """
    if type(network) is not NAT:
        raise UserError(f"transformers has NAT and DiNAT alone, not {type(network).__name__}: --format timm has it.")
    blocks = [list(level.blocks) for level in network.levels]
    every = [block for level in blocks for block in level]
    sizes = {block.attn.kernel_size for block in every}
    dilations = [[block.attn.dilation for block in level] for level in blocks]
    refused = {
        "several kernel sizes, or one that is not square": len(sizes) > 1 or len(set(every[0].attn.kernel_size)) > 1,
        "a dilation for each axis": any(a != b for level in dilations for a, b in level),
        f"the pooling {network.global_pool!r}": network.global_pool != "avg",
        "a network without a head": network.num_classes == 0,
        "attention without rpb": any(block.attn.rpb is None for block in every),
    }
    if lacking := [what for what, found in refused.items() if found]:
        raise UserError(f"transformers' NAT and DiNAT do not have {' or '.join(lacking)}: --format timm does.")
    first, last = every[0], every[-1]
    dilated = any(pair != (1, 1) for level in dilations for pair in level)
    names = _words(classes)
    config = dict(
        architectures=["DinatForImageClassification" if dilated else "NatForImageClassification"],
        model_type="dinat" if dilated else "nat",
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
        patch_size=4,
        num_channels=network.in_chans,
        layer_norm_eps=network.norm.eps,
        hidden_act="gelu",
        initializer_range=0.02,
        id2label={str(i): name for i, name in enumerate(names)},
        label2id={name: i for i, name in enumerate(names)},
        torch_dtype=str(network.norm.weight.dtype).removeprefix("torch."),
    )
    if dilated:
        config["dilations"] = [[pair[0] for pair in level] for level in dilations]
    return config


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
        raise UserError("transformers' preprocessing is said for a square centre crop alone: --format timm has others.")
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
