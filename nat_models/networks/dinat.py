"""Dilated Neighborhood Attention Transformer: DiNAT, DiNAT_s, and the isotropic networks it is compared with.

All are the NAT of nat.py with other data. In DiNAT every other block is dilated. DiNAT_s has the frame of Swin: patches
of 4 x 4, and the merging of neighbours between levels. The isotropic networks keep patches of 16 x 16 throughout; each
of their blocks is a level, so that its features can be taken out, as in timm's vision transformers.

Source: Hassani and Shi, "Dilated Neighborhood Attention Transformer", arXiv:2209.15001.
"""

from collections.abc import Sequence

from timm.models import generate_default_cfgs, register_model

from .nat import NAT, create_nat, make_cfg


def _create_dinat(variant: str, pretrained: bool, largest: Sequence[int], model_args: dict) -> NAT:
    """`largest`: for each level, the dilation of every other block from the second on; the others have 1."""
    pairs = zip(largest, model_args["depths"])  # noqa: B905  the network says what is wrong with other levels
    dilations = [[1 if block % 2 == 0 else dilation for block in range(depth)] for dilation, depth in pairs]
    return create_nat(variant, pretrained, **dict(dict(dilations=dilations), **model_args))


def _create_isotropic(variant: str, pretrained: bool, dilation: int, model_args: dict) -> NAT:
    """`dilation`: of every other block from the second on."""
    model_args = dict(dict(depths=(1,) * 12, patch_size=16, downsample="none", mlp_ratio=4), **model_args)
    largest = [dilation if level % 2 else 1 for level in range(len(model_args["depths"]))]
    return create_nat(variant, pretrained, **dict(dict(dilations=largest), **model_args))


def _cfg(path: str = "", **kwargs) -> dict:
    if path:
        kwargs["url"] = f"https://shi-labs.com/projects/dinat/checkpoints/{path}.pth"
    return make_cfg(
        **dict(paper_ids="arXiv:2209.15001", paper_name="Dilated Neighborhood Attention Transformer", **kwargs)
    )


_AT_384 = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)
_PATCHES = dict(first_conv="patch_embed.proj")
_ISOTROPIC = dict(**_PATCHES, pool_size=(14, 14))

default_cfgs = generate_default_cfgs(
    {
        "dinat_mini.shi_in1k": _cfg(hf_hub_id="shi-labs/dinat-mini-in1k-224"),
        "dinat_tiny.shi_in1k": _cfg(hf_hub_id="shi-labs/dinat-tiny-in1k-224"),
        "dinat_small.shi_in1k": _cfg(hf_hub_id="shi-labs/dinat-small-in1k-224"),
        "dinat_base.shi_in1k": _cfg(hf_hub_id="shi-labs/dinat-base-in1k-224"),
        "dinat_large.shi_in22k_ft_in1k": _cfg(hf_hub_id="shi-labs/dinat-large-in22k-in1k-224"),
        "dinat_large.shi_in22k": _cfg(hf_hub_id="shi-labs/dinat-large-in22k-224", num_classes=21841),
        "dinat_large_384.shi_in22k_ft_in1k": _cfg(hf_hub_id="shi-labs/dinat-large-in22k-in1k-384", **_AT_384),
        "dinat_large_11x11_384.shi_in22k_ft_in1k": _cfg(
            hf_hub_id="shi-labs/dinat-large-11x11-in22k-in1k-384", **_AT_384
        ),
        "dinat_s_tiny.shi_in1k": _cfg("imagenet1k/dinat_s_tiny_in1k_224", **_PATCHES),
        "dinat_s_small.shi_in1k": _cfg("imagenet1k/dinat_s_small_in1k_224", **_PATCHES),
        "dinat_s_base.shi_in1k": _cfg("imagenet1k/dinat_s_base_in1k_224", **_PATCHES),
        "dinat_s_large.shi_in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_224", **_PATCHES),
        "dinat_s_large.shi_in22k": _cfg("imagenet22k/dinat_s_large_in22k_224", num_classes=21841, **_PATCHES),
        "dinat_s_large_384.shi_in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_384", **_PATCHES, **_AT_384),
        "nat_isotropic_small.shi_in1k": _cfg("isotropic/nat_isotropic_small_in1k_224", **_ISOTROPIC),
        "nat_isotropic_base.shi_in1k": _cfg("isotropic/nat_isotropic_base_in1k_224", **_ISOTROPIC),
        "dinat_isotropic_small.shi_in1k": _cfg("isotropic/dinat_isotropic_small_in1k_224", **_ISOTROPIC),
        "dinat_isotropic_base.shi_in1k": _cfg("isotropic/dinat_isotropic_base_in1k_224", **_ISOTROPIC),
        "vitrpb_small.shi_in1k": _cfg("isotropic/vitrpb_small_in1k_224", **_ISOTROPIC),
        "vitrpb_base.shi_in1k": _cfg("isotropic/vitrpb_base_in1k_224", **_ISOTROPIC),
    }
)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Mini: 20.0 M parameters, 2.7 GMACs, 81.8 % top-1."""
    model_args = dict(embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3, drop_path_rate=0.2)
    return _create_dinat("dinat_mini", pretrained, (8, 4, 2, 1), dict(model_args, **kwargs))


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Tiny: 27.9 M parameters, 4.3 GMACs, 82.7 % top-1."""
    model_args = dict(embed_dim=64, depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3, drop_path_rate=0.2)
    return _create_dinat("dinat_tiny", pretrained, (8, 4, 2, 1), dict(model_args, **kwargs))


@register_model
def dinat_small(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Small: 50.7 M parameters, 7.8 GMACs, 83.8 % top-1."""
    model_args = dict(embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2, drop_path_rate=0.3)
    return _create_dinat("dinat_small", pretrained, (8, 4, 2, 1), dict(model_args, **kwargs))


@register_model
def dinat_base(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Base: 89.8 M parameters, 13.7 GMACs, 84.4 % top-1."""
    model_args = dict(
        embed_dim=128, depths=(3, 4, 18, 5), num_heads=(4, 8, 16, 32), mlp_ratio=2, init_values=1e-5, drop_path_rate=0.5
    )
    return _create_dinat("dinat_base", pretrained, (8, 4, 2, 1), dict(model_args, **kwargs))


_LARGE = dict(embed_dim=192, depths=(3, 4, 18, 5), num_heads=(6, 12, 24, 48), mlp_ratio=2, drop_path_rate=0.35)
_LARGE_11 = dict(_LARGE, kernel_size=11)


@register_model
def dinat_large(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large: 200.9 M parameters, 30.6 GMACs, 86.6 % top-1 after ImageNet-22k."""
    return _create_dinat("dinat_large", pretrained, (8, 4, 2, 1), dict(_LARGE, **kwargs))


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large at 384 px: 89.7 GMACs, 87.4 % top-1 after ImageNet-22k."""
    return _create_dinat("dinat_large_384", pretrained, (13, 6, 3, 1), dict(_LARGE, **kwargs))


@register_model
def dinat_large_11x11_384(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large at 384 px with windows of 11 x 11: 92.4 GMACs, 87.5 % top-1 after ImageNet-22k."""
    return _create_dinat("dinat_large_11x11_384", pretrained, (8, 4, 2, 1), dict(_LARGE_11, **kwargs))


_S = dict(patch_size=4, downsample="merge", mlp_ratio=4)


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT_s-Tiny: 28.3 M parameters, 4.5 GMACs, 81.8 % top-1."""
    model_args = dict(_S, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2)
    return _create_dinat("dinat_s_tiny", pretrained, (8, 4, 2, 1), dict(model_args, **kwargs))


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT_s-Small: 49.6 M parameters, 8.7 GMACs, 83.5 % top-1."""
    model_args = dict(_S, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3)
    return _create_dinat("dinat_s_small", pretrained, (8, 4, 2, 1), dict(model_args, **kwargs))


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT_s-Base: 87.8 M parameters, 15.4 GMACs, 83.8 % top-1."""
    model_args = dict(_S, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5)
    return _create_dinat("dinat_s_base", pretrained, (8, 4, 2, 1), dict(model_args, **kwargs))


_S_LARGE = dict(_S, embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), drop_path_rate=0.35)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT_s-Large: 196.5 M parameters, 34.5 GMACs, 86.5 % top-1 after ImageNet-22k."""
    return _create_dinat("dinat_s_large", pretrained, (8, 4, 2, 1), dict(_S_LARGE, **kwargs))


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT_s-Large at 384 px: 101.5 GMACs, 87.4 % top-1 after ImageNet-22k."""
    return _create_dinat("dinat_s_large_384", pretrained, (13, 6, 3, 1), dict(_S_LARGE, **kwargs))


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-iso-Small: 22.0 M parameters, 4.3 GMACs, 80.0 % top-1."""
    model_args = dict(embed_dim=384, num_heads=(12,) * 12, drop_path_rate=0.1)
    return _create_isotropic("nat_isotropic_small", pretrained, 1, dict(model_args, **kwargs))


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-iso-Base: 86.3 M parameters, 16.9 GMACs, 81.6 % top-1."""
    model_args = dict(embed_dim=768, num_heads=(24,) * 12, drop_path_rate=0.4)
    return _create_isotropic("nat_isotropic_base", pretrained, 1, dict(model_args, **kwargs))


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-iso-Small: 22.0 M parameters, 4.3 GMACs, 80.8 % top-1."""
    model_args = dict(embed_dim=384, num_heads=(12,) * 12, drop_path_rate=0.1)
    return _create_isotropic("dinat_isotropic_small", pretrained, 2, dict(model_args, **kwargs))


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-iso-Base: 86.3 M parameters, 16.9 GMACs, 82.1 % top-1."""
    model_args = dict(embed_dim=768, num_heads=(24,) * 12, drop_path_rate=0.4)
    return _create_isotropic("dinat_isotropic_base", pretrained, 2, dict(model_args, **kwargs))


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs) -> NAT:
    """ViT-rpb-Small, with attention of all tokens to all: 22.1 M parameters, 4.6 GMACs, 81.2 % top-1."""
    model_args = dict(embed_dim=384, num_heads=(12,) * 12, global_size=14, dilations=None, drop_path_rate=0.1)
    return _create_isotropic("vitrpb_small", pretrained, 1, dict(model_args, **kwargs))


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs) -> NAT:
    """ViT-rpb-Base, with attention of all tokens to all: 86.5 M parameters, 17.5 GMACs, 82.5 % top-1."""
    model_args = dict(embed_dim=768, num_heads=(24,) * 12, global_size=14, dilations=None, drop_path_rate=0.4)
    return _create_isotropic("vitrpb_base", pretrained, 1, dict(model_args, **kwargs))
