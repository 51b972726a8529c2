"""Neighborhood Attention Transformer.

Source: Hassani, Walton, Li, Li, Shi, "Neighborhood Attention Transformer", CVPR 2023, arXiv:2204.07143.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, calculate_drop_path_rates, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from torch import Tensor

from ..checkpoints import load_weights
from ..complexity import tell_counters
from .blocks import DOWNSAMPLERS, ConvTokenizer, NATLevel, patch_tokenizer
from .features import feature_arguments

__all__ = ["NAT"]


class NAT(nn.Module):
    """Neighborhood Attention Transformer, with timm's interface.

    Nothing in it depends on the image size: any height and width from 32 px runs, levels smaller than the window are
    padded as the published weights expect. Features are NHWC inside.

    Args:
        in_chans: Channels of the image.
        num_classes: 0 gives pooled features instead of logits.
        global_pool: As in timm: "avg", "max", "avgmax", "catavgmax", "" for none.
        embed_dim: Channels of the first level; each further level doubles them.
        depths: Blocks of each level.
        num_heads: Attention heads of each level.
        kernel_size: Odd window size, one for all levels.
        dilations: Spacing of the keys in a window, for each level a number or one for each of its blocks; None for 1.
        patch_size: None makes tokens by two overlapping convolutions of stride 2; a number by patches of that size that
            do not overlap, of an image padded to a multiple of it.
        downsample: Between levels: "conv", an overlapping convolution; "merge", the merging of 2 x 2 neighbours of a
            map padded to even sides; "none", nothing, and all levels have embed_dim channels.
        global_size: None for neighborhood attention. Else every token attends to all, with a position bias for maps of
            global_size x global_size tokens, interpolated for others; there is no window then.
        mlp_ratio: Hidden width of the MLPs over the level's channels.
        qkv_bias: Bias in the qkv projections.
        init_values: Initial value of layer scale; None for none.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of attention and MLP outputs.
        attn_drop_rate: Dropout of attention weights; above 0, training is slower.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0. On a CPU, a block does not compute
            images that it drops.
        output_norms: A LayerNorm for each level's map as features_only and forward_intermediates hand it out, as in the
            published backbones for detection and segmentation; what goes on to the next level is without.
        output_stride: The network's own, which timm's users may state.

    Raises:
        ValueError: depths, num_heads and dilations differ in length; a level's channels are not divisible by its heads;
            global_size with a window; another downsample or output_stride.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | Sequence[int] = 7,
        dilations: Sequence[int | Sequence[int]] | None = None,
        patch_size: int | None = None,
        downsample: str = "conv",
        global_size: int | None = None,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        output_norms: bool = False,
        output_stride: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if len(depths) != len(num_heads):
            raise ValueError(f"depths and num_heads must name the same levels, got {depths=}, {num_heads=}.")
        if downsample not in DOWNSAMPLERS:
            raise ValueError(f"downsample must be one of {DOWNSAMPLERS}, got {downsample=}.")
        if global_size is not None and (kernel_size != 7 or dilations is not None):
            raise ValueError(f"Global attention has no window, got {kernel_size=}, {dilations=} with {global_size=}.")
        dilations = _per_block(dilations, depths)
        widths = [embed_dim * (1 if downsample == "none" else 2**i) for i in range(len(depths))]
        strides = [(patch_size or 4) * width // embed_dim for width in widths]
        if output_stride not in (None, strides[-1]):
            raise ValueError(
                f"output_stride must be {strides[-1]}, there is no form of another stride, got {output_stride=}."
            )
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.embed_dim = embed_dim
        self.num_features = widths[-1]
        self.output_fmt = "NHWC"
        self.feature_info = []

        if patch_size is None:
            self.patch_embed = ConvTokenizer(in_chans, embed_dim, **dd)
        else:
            self.patch_embed = patch_tokenizer(in_chans, embed_dim, patch_size, **dd)
        drop_path = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        levels = []
        for i, depth in enumerate(depths):
            levels.append(
                NATLevel(
                    widths[i],
                    depth,
                    num_heads[i],
                    drop_path=drop_path[i],
                    dilations=dilations[i],
                    downsample=downsample if i > 0 else "none",
                    kernel_size=kernel_size,
                    global_size=global_size,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    init_values=init_values,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    **dd,
                )
            )
            self.feature_info.append(dict(num_chs=widths[i], reduction=strides[i], module=f"levels.{i}"))
        self.levels = nn.Sequential(*levels)
        self.has_output_norms = output_norms
        self.output_norms = nn.ModuleList(nn.LayerNorm(n, **dd) if output_norms else nn.Identity() for n in widths)
        self.norm = nn.LayerNorm(self.num_features, **dd)
        self.head = ClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            input_fmt=self.output_fmt,
            **dd,
        )
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        self.apply(_init_weights)
        tell_counters()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Gives every parameter a new initial value, after `to_empty` say."""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups for layer-wise learning rates: the stem, then a level or a block each, then the norm."""
        blocks = [
            (r"^levels\.(\d+)\.downsample", (0,)),
            (r"^levels\.(\d+)\.\w+\.(\d+)", None),
            (r"^output_norms\.(\d+)", (99999,)),
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^patch_embed", blocks=r"^(?:levels|output_norms)\.(\d+)" if coarse else blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for level in self.levels:
            level.grad_checkpointing = enable

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Sequence[int] | None = None) -> None:
        """Part of timm's interface. Any size runs as it is, so there is nothing to set."""

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Makes a new head; 0 classes remove it, a pooling of "" hands out the map [B, H, W, C]."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.head.in_features = self.num_features  # pruning may have changed it
        self.head.reset(num_classes, pool_type=global_pool)
        stem = next(self.patch_embed.parameters())
        self.head.to(stem.device, stem.dtype)  # older timm makes the new head a float32 one on the CPU
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of the levels, normed if the network has output_norms, and what forward_features returns.

        Args:
            x: [B, in_chans, H, W].
            indices: Levels to take: the last n for an int, all for None.
            norm: Apply the final norm to the last level's map, unless that has one of its own.
            stop_early: Do not run levels after the last one taken.
            output_fmt: "NCHW" or "NHWC", the layout of the maps handed out.
            intermediates_only: Return the maps alone.

        Raises:
            ValueError: Another output_fmt.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(
                f"output_fmt must be 'NCHW' or 'NHWC', got output_fmt='{output_fmt}'."
            )  # TorchScript has no `=`
        take, last = feature_take_indices(len(self.levels), indices)
        intermediates = []
        x = self.patch_embed(x)
        if torch.jit.is_scripting() or not stop_early:  # noqa: SIM108  TorchScript slices no Sequential
            levels = self.levels
        else:
            levels = self.levels[: last + 1]
        for i, (level, output_norm) in enumerate(zip(levels, self.output_norms)):  # noqa: B905  TorchScript's zip
            x = level(x)
            if i in take:
                own = self.has_output_norms or not norm or i < len(self.levels) - 1
                feature = output_norm(x) if own else self.norm(x)
                intermediates.append(feature.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return intermediates
        # The norm is as wide as the last level.
        return self.norm(x) if i == len(self.levels) - 1 else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the levels after the last one taken, with the norm and head they fed; returns the levels taken."""
        take, last = feature_take_indices(len(self.levels), indices)
        cut = last < len(self.levels) - 1
        self.levels = self.levels[: last + 1]
        # A norm of a map that is not handed out would be a parameter without a gradient.
        self.output_norms = nn.ModuleList(n if i in take else nn.Identity() for i, n in enumerate(self.output_norms))
        self.output_norms = self.output_norms[: last + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, H/32, W/32, C], normalised, unpooled."""
        x = self.patch_embed(x)
        x = self.levels(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, H, W, C] -> [B, num_classes]; pre_logits stops at the pooled features."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)


def _init_weights(module: nn.Module) -> None:
    """The authors' initialisation; norms and convolutions keep PyTorch's, rpb is the attention layer's own."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _per_block(dilations: Sequence[int | Sequence[int]] | None, depths: Sequence[int]) -> list[list[int]]:
    """One dilation for each block of each level."""
    if dilations is None:
        return [[1] * depth for depth in depths]
    if isinstance(dilations, int) or len(dilations) != len(depths):
        raise ValueError(f"depths and dilations must name the same levels, got {depths=}, {dilations=}.")
    pairs = zip(dilations, depths, strict=True)
    levels = [[given] * depth if isinstance(given, int) else list(given) for given, depth in pairs]
    if [len(level) for level in levels] != list(depths):
        raise ValueError(f"dilations must have a number for each block of a level, got {depths=}, {dilations=}.")
    return levels


def create_nat(variant: str, pretrained: bool = False, **kwargs) -> NAT:
    """The network that an entrypoint of timm's hands out: `kwargs` are the variant's data with the caller's on top."""
    cache_dir = kwargs.pop("cache_dir", None)
    if kwargs.get("features_only"):
        kwargs.setdefault("num_classes", 0)  # a checkpoint without a head serves too
        kwargs["feature_cfg"] = feature_arguments(kwargs)
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))

    def create(**model_kwargs) -> NAT:
        model = NAT(**model_kwargs)
        if pretrained:  # here, before timm wraps the model for features_only
            load_weights(model, variant, cfg.to_dict(), cache_dir, features_only=bool(kwargs.get("features_only")))
        return model

    return build_model_with_cfg(
        create,
        variant,
        pretrained=False,
        **kwargs,
    )


def make_cfg(**kwargs) -> dict:
    """What timm keeps of a checkpoint: where it is, and how its accuracy was measured."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        # How the published accuracy was measured. The Hub's preprocessor_config.json says otherwise (it resizes
        # straight to the input size), which scores lower.
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2204.07143",
        "paper_name": "Neighborhood Attention Transformer",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "nat_mini.shi_in1k": make_cfg(hf_hub_id="shi-labs/nat-mini-in1k-224"),
        "nat_tiny.shi_in1k": make_cfg(hf_hub_id="shi-labs/nat-tiny-in1k-224"),
        "nat_small.shi_in1k": make_cfg(hf_hub_id="shi-labs/nat-small-in1k-224"),
        "nat_base.shi_in1k": make_cfg(hf_hub_id="shi-labs/nat-base-in1k-224"),
    }
)


@register_model
def nat_mini(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Mini: 20.0 M parameters, 2.7 GMACs, 81.8 % top-1."""
    model_args = dict(embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3, drop_path_rate=0.2)
    return create_nat("nat_mini", pretrained, **dict(model_args, **kwargs))


@register_model
def nat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Tiny: 27.9 M parameters, 4.3 GMACs, 83.2 % top-1."""
    model_args = dict(embed_dim=64, depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3, drop_path_rate=0.2)
    return create_nat("nat_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def nat_small(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Small: 50.7 M parameters, 7.8 GMACs, 83.7 % top-1."""
    model_args = dict(
        embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2, init_values=1e-5, drop_path_rate=0.3
    )
    return create_nat("nat_small", pretrained, **dict(model_args, **kwargs))


@register_model
def nat_base(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Base: 89.8 M parameters, 13.7 GMACs, 84.3 % top-1."""
    model_args = dict(
        embed_dim=128, depths=(3, 4, 18, 5), num_heads=(4, 8, 16, 32), mlp_ratio=2, init_values=1e-5, drop_path_rate=0.5
    )
    return create_nat("nat_base", pretrained, **dict(model_args, **kwargs))
