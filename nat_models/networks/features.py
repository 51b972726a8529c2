"""What features_only makes of a network, and networks of ours as backbones of segmenters and detectors."""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice

import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from ..ops.tracing import is_exporting

__all__ = ["FeatureMaps", "feature_arguments", "make_backbone", "moved_groups", "normed_maps"]

_STRIDES = [4, 8, 16, 32]


class FeatureMaps(FeatureGetterNet):
    """timm's feature getter, whose maps are NCHW, with gradient checkpointing."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)


def feature_arguments(kwargs: dict) -> dict:
    """Takes out of a model's arguments those of features_only; returns them as timm's feature_cfg.

    The classes "list", "dict", "hook" and "fx" convert no maps: theirs are NHWC and their output_fmt says so, as with
    timm's own NHWC networks. By default four levels, or the last three where all are of one resolution, as in timm's
    vision transformers.

    Raises:
        ValueError: One of these four classes for a network with output_norms, which they would leave out.
    """
    levels = (0, 1, 2, 3) if kwargs.get("downsample") != "none" else 3
    given = {"out_indices": levels, "feature_cls": "getter", **kwargs.pop("feature_cfg", {})}
    given.update({key: kwargs.pop(key) for key in ("out_indices", "feature_cls") if key in kwargs})
    if given["feature_cls"] in ("getter", FeatureGetterNet):
        return dict(given, feature_cls=FeatureMaps, output_fmt="NCHW")
    if kwargs.get("output_norms"):
        raise ValueError(f"output_norms go with the feature_cls 'getter', got {given['feature_cls']!r}.")
    # The levels are one Sequential. timm drops this for classes that do not look into it.
    return dict(given, flatten_sequential=True)


def make_backbone(
    name: str, kwargs: Mapping, *, system: str, drop_path_rate: float | None = None, patterns: Sequence | None = None
) -> nn.Module:
    """A registered network with a norm for each of four levels, without the last norm and the classifier.

    Args:
        name: timm's.
        kwargs: Its arguments; they win over what follows.
        system: What it is for, in messages.
        drop_path_rate: Stochastic depth of the published system; None leaves the network's own.
        patterns: Dilations of the published system, for each level a sequence that repeats over its blocks.

    Raises:
        ValueError: It does not have maps at strides 4, 8, 16 and 32.
    """
    given = dict(kwargs)
    if drop_path_rate is not None:
        given.setdefault("drop_path_rate", drop_path_rate)
    if patterns is not None and "dilations" not in given:
        kept = {key: value for key, value in given.items() if key not in ("pretrained", "pretrained_cfg_overlay")}
        depths = [len(level.blocks) for level in timm.create_model(name, device="meta", **kept).levels]
        given["dilations"] = [list(islice(cycle(p), n)) for p, n in zip(patterns, depths, strict=True)]
    network = timm.create_model(name, features_only=True, output_norms=True, **given).model
    if (found := [info["reduction"] for info in network.feature_info]) != _STRIDES:
        raise ValueError(f"{system} takes a backbone with maps at strides {_STRIDES}, {name} has them at {found}.")
    return network


def normed_maps(backbone: nn.Module, x: Tensor) -> list[Tensor]:
    """[B, in_chans, H, W] -> the normed maps of the levels, NCHW at strides 4, 8, 16, 32."""
    maps = backbone.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
    if is_exporting():  # torch.export would guard on a height or width of 1 for `contiguous`
        return [x.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format) for x in maps]
    return [x.permute(0, 3, 1, 2).contiguous() for x in maps]


def moved_groups(groups: Mapping, prefix: str) -> dict:
    """A backbone's group_matcher for the network that holds it; `prefix` such as "backbone." begins its names there."""
    blocks = groups["blocks"]

    def moved(pattern: str) -> str:
        return pattern.replace("^", "^" + prefix.replace(".", r"\."), 1)

    moved_blocks = moved(blocks) if isinstance(blocks, str) else [(moved(p), value) for p, value in blocks]
    return dict(stem=moved(groups["stem"]), blocks=moved_blocks)
