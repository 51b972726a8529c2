"""Images and their label maps as tensors, changed together: what is drawn for training, and what evaluation sees."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..errors import Unreadable, UserError
from .decoding import Encoded, decode, describe, known_formats
from .images import Items
from .mask_files import is_array, load_array
from .mask_values import IGNORE, MaskReading
from .masks import MaskPart

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ADE20K_SCALE = (2048, 512)  # the long and the short side that an image is fitted into
_SAMPLES_PER_PIXEL = 277  # the TIFF tag
_BYTES = {"RGBA", "CMYK", "RGBX"}


def read_image(image: Encoded, in_chans: int) -> tv_tensors.Image:
    """An image as [in_chans, H, W], upright: uint8, or float32 where its file has more than 8 bits.

    One band is grey and three are RGB, as `decode` makes them of any picture. Four are a picture's four channels as
    they are. Any number of bands is an array [H, W, in_chans] that NumPy saved (.npy), or [H, W] for one: uint8 as it
    is, uint16 divided by 65,535, floating point as it is.

    Raises:
        UserError: It cannot be read, has another number of bands, or numbers of a range that is not known.
    """
    if is_array(image):
        return _from_array(image, in_chans)
    if in_chans not in (1, 3, 4):
        raise UserError(f"{describe(image)} cannot be read as {in_chans} bands: save such images as .npy, [H, W, C].")
    if in_chans < 4 and not image.path.lower().endswith((".tif", ".tiff")):
        return tv_tensors.Image(F.pil_to_tensor(decode(image, in_chans)))
    try:
        with image.open() as file, Image.open(file, formats=known_formats()) as opened:
            opened.load()
            bands, mode = getattr(opened, "tag_v2", {}).get(_SAMPLES_PER_PIXEL, len(opened.getbands())), opened.mode
            four = F.pil_to_tensor(ImageOps.exif_transpose(opened)) if mode in _BYTES and in_chans == 4 else None
    except Exception as e:  # of a damaged file, Pillow's plugins raise whatever they happen to meet
        raise Unreadable(f"{describe(image)} cannot be read as an image: {e or type(e).__name__}") from None
    if bands > 4 or (in_chans == 4 and four is None):
        raise UserError(
            f"{describe(image)} has {bands} bands of Pillow's mode {mode}, and {in_chans} are wanted: "
            "save such images as .npy, [H, W, C]."
        )
    return tv_tensors.Image(F.pil_to_tensor(decode(image, in_chans)) if four is None else four)


def _from_array(image: Encoded, in_chans: int) -> tv_tensors.Image:
    array = load_array(image)
    if array.ndim == 2 and in_chans == 1:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] != in_chans:
        raise UserError(f"{describe(image)} must be an array [H, W, {in_chans}], got {list(array.shape)}.")
    if array.dtype == np.uint16:
        array = array.astype(np.float32) / 65535
    elif array.dtype.kind == "f":
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{describe(image)} holds numbers that are not finite.")
    elif array.dtype != np.uint8:
        raise UserError(
            f"{describe(image)} holds {array.dtype}, whose range is not known: save uint8, uint16 or floating point."
        )
    return tv_tensors.Image(torch.from_numpy(np.array(array.transpose(2, 0, 1), order="C")))


class MaskSet(Items):
    """(image, label map) of images with masks: float32 [C, h, w], and int64 [H, W] of class indices, 255 for ignored.

    Args:
        part: Images and masks.
        reading: Reads masks.
        in_chans: Bands of an image, 1 to 16.
        transform: Takes and gives both, as tv_tensors.
        seed: As for Items, of what the transform draws.
    """

    def __init__(self, part: MaskPart, reading: MaskReading, in_chans: int, transform: nn.Module, *, seed: int = 0):
        super().__init__(len(part), seed)
        self.part, self.reading, self.in_chans, self.transform = part, reading, in_chans, transform

    @staticmethod
    def collate(items: list[tuple[Tensor, Tensor]]) -> list:
        """A batch [images, label maps]: each a tensor where all are of one size, else a list of tensors."""
        sides = map(list, zip(*items, strict=True))
        return [default_collate(s) if len({tuple(x.shape) for x in s}) == 1 else s for s in sides]

    def raw(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """[C, H, W] and uint8 [H, W] as they were read.

        Raises:
            UserError: One cannot be read, or their sizes differ.
        """
        image, mask = self.part.images[index], self.part.masks[index]
        pixels, labels = read_image(image, self.in_chans), self.reading.read(mask)
        if pixels.shape[1:] != labels.shape:
            raise UserError(f"{mask.path} is {list(labels.shape)}, and {image.path} {list(pixels.shape[1:])} (H, W).")
        return pixels, tv_tensors.Mask(torch.from_numpy(labels))

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, labels = self.transform(*self.raw(index))
        return pixels.as_subclass(Tensor), labels.as_subclass(Tensor).long()


def make_augmentation(
    crop_size: int | tuple[int, int],
    *,
    in_chans: int = 3,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    scale: tuple[int, int] | None = None,
    ratio_range: tuple[float, float] = (0.5, 2.0),
    cat_max_ratio: float = 0.75,
    hflip: float = 0.5,
    distort: bool = True,
) -> nn.Module:
    """What training does to an image and its label map: resize by a random ratio, crop, mirror, change colours,
    normalise, pad. Label maps are resized to the nearest pixel, so that no label is invented; what is padded is 255.

    Args:
        crop_size: Height and width of what comes out.
        in_chans: Bands of an image.
        mean: Of each band, on the scale of [0, 1] for 8 and 16 bits.
        std: Of each band, on the same scale.
        scale: Long and short side that the image is fitted into before the ratio; None takes it as it is.
        ratio_range: Least and greatest ratio.
        cat_max_ratio: A crop is drawn again, up to 10 times, while one class has this share of its labelled pixels.
        hflip: Probability of a mirror image.
        distort: Whether colours are changed; see Distort.

    Raises:
        UserError: mean or std do not fit the bands.

    Source: Hassani et al., CVPR 2023, arXiv:2204.07143: the recipe of UPerNet on ADE20K, which takes scale=(2048, 512)
        and crop_size=512.
    """
    size = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)
    return v2.Compose(
        [
            Fit(scale, ratio_range, labels_too=True),
            Crop(size, cat_max_ratio),
            v2.RandomHorizontalFlip(hflip),
            *_as_floats(),
            *([Distort()] if distort else []),
            _normalise(mean, std, in_chans),
            PadTo(size),
        ]
    )


def make_evaluation(
    *,
    in_chans: int = 3,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    scale: tuple[int, int] | None = None,
) -> nn.Module:
    """What evaluation does to an image: resize, normalise. Its label map stays as it is, of the original size, because
    that is what is scored.

    Args:
        in_chans: Bands of an image.
        mean: As for make_augmentation, and so is std.
        std: Of each band.
        scale: Long and short side that the image is fitted into, (2048, 512) for ADE20K; None leaves its size.

    Raises:
        UserError: mean or std do not fit the bands.
    """
    fit = [] if scale is None else [Fit(scale, (1.0, 1.0), labels_too=False)]
    return v2.Compose([*fit, *_as_floats(), _normalise(mean, std, in_chans)])


def _as_floats() -> list[nn.Module]:
    return [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]


def _normalise(mean: Sequence[float], std: Sequence[float], in_chans: int) -> nn.Module:
    if not (len(mean) == len(std) == in_chans and all(x > 0 for x in std)):
        raise UserError(f"mean and std must have a number for each of {in_chans} bands, std above 0; {mean=}, {std=}.")
    return v2.Normalize(list(mean), list(std))


class Fit(nn.Module):
    """Resizes an image, and its label map where `labels_too`, keeping its ratio, by a random factor.

    Bilinear without antialiasing, as in the paper's training.

    Args:
        scale: Long and short side of the box that the image is fitted into, times the factor; None: the image's own.
        ratio_range: Of the factor, uniform.
        labels_too: Whether the label map is resized with it, to the nearest pixel.
    """

    def __init__(self, scale: tuple[int, int] | None, ratio_range: tuple[float, float], labels_too: bool):
        super().__init__()
        self.scale, self.ratio_range, self.labels_too = scale, ratio_range, labels_too

    def forward(self, image: tv_tensors.Image, labels: tv_tensors.Mask) -> tuple:
        least, greatest = self.ratio_range
        size = fitted(tuple(image.shape[-2:]), self.scale, least + (greatest - least) * torch.rand(()).item())
        if size != tuple(image.shape[-2:]):
            image = F.resize(image, list(size), v2.InterpolationMode.BILINEAR, antialias=False)
        if self.labels_too:
            labels = F.resize(labels, list(size), v2.InterpolationMode.NEAREST)
        return image, labels


def fitted(size: tuple[int, int], scale: tuple[int, int] | None, factor: float = 1.0) -> tuple[int, int]:
    """(height, width) of an image that keeps its ratio inside a box.

    Args:
        size: (height, width) of the image.
        scale: Long and short side of the box; None: the image's own.
        factor: On the box.
    """
    if scale is not None:
        long, short = int(max(scale) * factor), int(min(scale) * factor)
        factor = min(long / max(size), short / min(size))
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


class Crop(nn.Module):
    """A random crop, drawn again up to 10 times until the largest class has less than `cat_max_ratio` of its labelled
    pixels, of at least two classes.

    Args:
        size: Height and width; an image that is smaller stays as it is there.
        cat_max_ratio: 1 or more takes the first crop.
    """

    def __init__(self, size: tuple[int, int], cat_max_ratio: float):
        super().__init__()
        self.size, self.cat_max_ratio = size, cat_max_ratio

    def forward(self, image: tv_tensors.Image, labels: tv_tensors.Mask) -> tuple:
        height, width = (min(a, b) for a, b in zip(self.size, labels.shape[-2:], strict=True))
        for _ in range(11):
            top = torch.randint(labels.shape[-2] - height + 1, ()).item()
            left = torch.randint(labels.shape[-1] - width + 1, ()).item()
            if self.cat_max_ratio >= 1:
                break
            inside = labels[..., top : top + height, left : left + width]
            counts = torch.bincount(inside.flatten(), minlength=IGNORE + 1)[:IGNORE]
            if counts.count_nonzero() > 1 and counts.max() < self.cat_max_ratio * counts.sum():
                break
        return tuple(F.crop(x, top, left, height, width) for x in (image, labels))


class Distort(nn.Module):
    """Brightness, contrast, saturation and hue of a float image in [0, 1], each with probability 0.5.

    Brightness is added, up to 32 of 255; contrast is a factor of 0.5 to 1.5, before or after saturation and hue by a
    coin; saturation a factor of 0.5 to 1.5; hue turns by up to a tenth of the circle. Bands other than three have
    brightness and contrast alone, and an image with numbers outside [0, 1] stays as it is.

    torchvision's RandomPhotometricDistort shuffles the channels besides, halves the hue and multiplies the brightness,
    which the paper's training does not.
    """

    def forward(self, image: tv_tensors.Image, labels: tv_tensors.Mask) -> tuple:
        coins = (torch.rand(5) < 0.5).tolist()
        shift, contrast, saturation, hue = (torch.rand(4) * 2 - 1).tolist()
        pixels = image.as_subclass(Tensor)
        if pixels.min() < 0 or pixels.max() > 1:  # what its colours are is not known
            return image, labels
        if coins[0]:
            pixels = (pixels + shift * 32 / 255).clamp(0, 1)
        for after in (False, True):
            if coins[1] and coins[4] == after:
                pixels = (pixels * (1 + contrast / 2)).clamp(0, 1)
            if not after and pixels.shape[0] == 3:
                if coins[2]:
                    pixels = F.adjust_saturation(pixels, 1 + saturation / 2)
                if coins[3]:
                    pixels = F.adjust_hue(pixels, hue / 10)
        return tv_tensors.wrap(pixels, like=image), labels


class PadTo(nn.Module):
    """Pads at the right and bottom: an image with 0, a label map with 255."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def forward(self, image: tv_tensors.Image, labels: tv_tensors.Mask) -> tuple:
        bottom, right = (max(0, a - b) for a, b in zip(self.size, labels.shape[-2:], strict=True))
        padding = [0, 0, right, bottom]
        return F.pad(image, padding, fill=0), F.pad(labels, padding, fill=IGNORE)


def band_statistics(images: Sequence[Encoded], in_chans: int, most: int = 200) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each band over all pixels, on the scale that make_augmentation takes.

    Args:
        images: Of which at most `most`, evenly spread, are read.
        in_chans: Bands of an image.
        most: How many images are read.

    Raises:
        UserError: An image cannot be read.
    """
    total, squares, count = torch.zeros(in_chans, dtype=torch.float64), torch.zeros(in_chans, dtype=torch.float64), 0
    for i in sorted({round(i) for i in np.linspace(0, len(images) - 1, min(most, len(images)))}):
        pixels = F.to_dtype(read_image(images[i], in_chans).as_subclass(Tensor), torch.float64, scale=True).flatten(1)
        total, squares, count = total + pixels.sum(1), squares + pixels.square().sum(1), count + pixels.shape[1]
    mean = total / count
    return mean.tolist(), (squares / count - mean**2).clamp(min=0).sqrt().tolist()


def shrunk(image: Tensor, longest: int) -> Tensor:
    """An image [C, H, W] as it is, or resized to `longest` px if it is wider or higher."""
    factor = longest / max(image.shape[1:])
    return image if factor >= 1 else F.resize(image, list(fitted(image.shape[1:], None, factor)), antialias=True)


def to_picture(image: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> np.ndarray:
    """[H, W, 3] uint8 to look at, of an image [C, H, W]: its first three bands, or the first as grey.

    Args:
        image: uint8, or floats in [0, 1]; other floats are spread over their range.
        mean: What was subtracted from each band, to be added again; None for an image that is not normalised.
        std: What each band was divided by.
    """
    pixels = F.to_dtype(image.as_subclass(Tensor), torch.float32, scale=True)
    if mean is not None:
        pixels = pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    pixels = pixels[:3] if pixels.shape[0] >= 3 else pixels[:1].expand(3, -1, -1)
    if pixels.max() > 1.5 or pixels.min() < -0.5:
        low, high = pixels.quantile(0.02), pixels.quantile(0.98)
        pixels = (pixels - low) / (high - low).clamp(min=1e-12)
    return (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
