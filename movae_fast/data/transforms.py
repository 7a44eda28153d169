"""From an original image to the side that a model wants; everything in uint8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

# CelebA's crops as the systems document them: (top, left, height, width) of the 178x218 original.
CELEBA_CROPS = {
    "center148": (35, 15, 148, 148),  # CenterCrop 148, MO-VAE
    "center140": (39, 19, 140, 140),
    "stylegan": (57, 25, 128, 128),  # 128 around (x 89, y 121)
    "none": None,
}


def resize(images: Tensor, size: int, mode: str = "auto") -> Tensor:
    """uint8 images [..., H, W] to [..., size, size].

    "pad" adds zeros around (28 to 32 without touching a value), "bilinear" and "bicubic" resample with
    antialiasing, "auto" pads where the difference is at most 4 pixels and resamples (bilinear) elsewhere.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    fits = height <= size and width <= size
    if mode == "pad" and not fits:
        raise ValueError(f"--resize pad cannot shrink {height}x{width} to {size}x{size}")
    if mode == "pad" or (mode == "auto" and fits and size - min(height, width) <= 4):
        top, left = (size - height) // 2, (size - width) // 2
        return TF.pad(images, [left, top, size - width - left, size - height - top])
    interpolation = InterpolationMode.BICUBIC if mode == "bicubic" else InterpolationMode.BILINEAR
    if images.dim() == 4 and len(images) > 4096:  # keep the float copies of a whole set small
        return torch.cat([resize(part, size, mode) for part in images.split(4096)])
    return TF.resize(images, [size, size], interpolation=interpolation, antialias=True)


def pick(images: Tensor, rows: Tensor) -> Tensor:
    """Rows [B] of images [N, C, S, S], in the same layout: channels last stay last.

    Copies whole images; indexing by [rows] copies bytes, twenty times slower on a CPU.
    """
    if images.is_contiguous():
        return images.index_select(0, rows)
    return images.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)


Binarization = Literal["none", "threshold", "static", "dynamic"]
STATIC_SEED = 777  # of the draw that everybody shares, whatever a run's seed
LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Binarizer:
    """Grey levels to black and white, by the `mode` of `--binarize`, for one split.

    A draw is a function of seed, split, epoch, row and position and of nothing else, so that a resumed epoch,
    other processes and other loaders get the same pixels; it is made on the device and keeps no state.
    """

    mode: Binarization
    split: str
    seed: int

    def __call__(self, images: Tensor, rows: Tensor, epoch: int | None) -> Tensor:
        """uint8 images [B, C, S, S] of the split's rows [B] to 0 and 255; without an epoch, the static draw."""
        if self.mode == "none":
            return images
        if self.mode == "threshold":
            return (images > 127).to(torch.uint8).mul_(255)
        key = STATIC_SEED
        if self.mode == "dynamic" and epoch is not None:
            key = mixed(mixed(self.seed) + epoch + 1)
        key = mixed(2 * key + (self.split == "train"))
        keys = mixed(rows.to(images.device) + key)
        positions = torch.arange(images[0].numel(), device=images.device)
        draws = mixed(keys[:, None] + mixed(positions)) >> 8  # [B, C S S] of 24 bits
        white = draws.view(images.shape) * 255 < images.to(torch.int64) << 24
        return white.to(torch.uint8).mul_(255)


Integers = TypeVar("Integers", int, Tensor)


def mixed(x: Integers) -> Integers:
    """Integers to well-mixed ones of 32 bits: the finaliser lowbias32 of their low 32 bits."""
    x = x & LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & LOW  # in int64 the product may wrap: its low bits are right
    return x ^ (x >> 16)


def finish(images: Tensor, flip: Tensor | None, normalize: bool) -> Tensor:
    """uint8 [B, C, S, S] to float32 in [0, 1], or [-1, 1] with `normalize`; rows of `flip` mirrored."""
    if flip is not None:
        # On bytes, a quarter of what floats would move; picking whole images is several times faster than
        # torch.where, which picks bytes.
        rows = torch.arange(len(images), device=images.device)
        images = pick(torch.cat([images, images.flip(3)]), rows + len(images) * flip)
    x = images.to(torch.float32).div_(255)
    return x.mul_(2).sub_(1) if normalize else x


def batch_of(
    images: Tensor,  # [N, C, S, S] uint8
    labels: Tensor,  # [N]
    rows: Tensor,  # [B]
    flip: Tensor | None,  # [B] bool
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """`finish(pick(images, rows), flip, normalize)` and labels, so that the compiler makes one kernel of it."""
    x = images[rows]
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    # A compiled division of float32 is off by a last digit on a GPU; of float64 it is exact, its rounding too.
    x = (x.to(torch.float64) / 255).to(torch.float32)
    x = x * 2 - 1 if normalize else x
    return x.contiguous(memory_format=torch.channels_last), labels[rows]


def to_unit(x: Tensor, normalize: bool) -> Tensor:
    """Images in the model's data range back to [0, 1], clamped."""
    return ((x + 1) / 2 if normalize else x).clamp(0, 1)
