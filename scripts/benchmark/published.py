"""What papers say of the networks that are compared: ImageNet-1k top-1 at 224 px, for training on ImageNet-1k alone."""

# By family. From EfficientViT on, a figure is the one in the README of the authors' repository (EfficientViT's in
# applications/cls.md), to a decimal. Hiera's is after MAE on the images of ImageNet-1k.
FAMILIES = {
    "NAT": {"nat_mini": 81.8, "nat_tiny": 83.2, "nat_small": 83.7, "nat_base": 84.3},  # arXiv:2204.07143
    "Swin": {"swin_tiny_patch4_window7_224": 81.3, "swin_small_patch4_window7_224": 83.0},  # arXiv:2103.14030
    "ConvNeXt": {"convnext_tiny": 82.1, "convnext_small": 83.1},  # arXiv:2201.03545
    "EfficientViT": {"efficientvit_b2": 82.1, "efficientvit_b3": 83.5},  # arXiv:2205.14756
    "CAFormer": {"caformer_s18": 83.6},  # arXiv:2210.13452
    "ConvFormer": {"convformer_s18": 83.0},  # arXiv:2210.13452
    "InceptionNeXt": {"inception_next_tiny": 82.3},  # arXiv:2303.16900
    "FocalNet": {"focalnet_tiny_srf": 82.1},  # arXiv:2203.11926
    "DaViT": {"davit_tiny": 82.8},  # arXiv:2204.03645
    "Hiera": {"hiera_tiny_224": 82.8},  # arXiv:2306.00989
    "MambaOut": {"mambaout_tiny": 82.7},  # arXiv:2405.07992
}
TOP1 = {name: (family, top1) for family, members in FAMILIES.items() for name, top1 in members.items()}

SWIN_TINY = "swin_tiny_patch4_window7_224"
TINY = [SWIN_TINY, "nat_tiny", "nat_mini", "convnext_tiny"]
# Windowed attention, and the convolutions that it is mostly compared with.
WINDOWED = [name for family in ("NAT", "Swin", "ConvNeXt") for name in FAMILIES[family]]
FIELD = list(TOP1)
