"""Resize images to the side that a model needs, and convert batches to its data range."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def resize(images: Tensor, size: int, mode: str = "auto") -> Tensor:
    """Resize uint8 images [..., H, W] to [..., size, size]. Raises ValueError if "pad" would have to shrink
    them.

    "pad" surrounds them with zeros, "bilinear" and "bicubic" resample with antialiasing, "auto" pads if at most
    4 pixels are missing on a side (28 to 32) and otherwise resamples (bilinear).
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    fits = height <= size and width <= size
    if mode == "pad" and not fits:
        raise ValueError(f"--resize pad cannot shrink {height}x{width} to {size}x{size}")
    if mode == "pad" or (mode == "auto" and fits and size - min(height, width) <= 4):
        top, left = (size - height) // 2, (size - width) // 2
        return F.pad(images, (left, size - width - left, top, size - height - top))
    if (
        images.dim() == 4 and len(images) > 4096
    ):  # Float copies of a whole set would take four times its memory.
        return torch.cat([resize(chunk, size, mode) for chunk in images.split(4096)])
    return _resample(images, size, "bicubic" if mode == "bicubic" else "bilinear")


def _resample(images: Tensor, size: int, mode: str) -> Tensor:
    # These are the pixels of torchvision's resize to the last bit, without its import of more than a second.
    batch = images if images.dim() == 4 else images[None]
    x = F.interpolate(batch.to(torch.float32), (size, size), mode=mode, align_corners=False, antialias=True)
    pixels = x.clamp_(0, 255).round_().to(torch.uint8)  # Bicubic weights overshoot at edges.
    return pixels if images.dim() == 4 else pixels[0]


def pick(
    images: Tensor,  # [N, C, S, S]
    rows: Tensor,  # [B]
) -> Tensor:  # [B, C, S, S]
    """Return the given rows of the images, in the same memory layout (channels-last stays so).

    Whole images are copied; indexing by [rows] would copy single bytes, which takes twenty times as long on a
    CPU.
    """
    if images.is_contiguous():
        return images.index_select(0, rows)
    return images.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)


def finish(
    images: Tensor,  # [B, C, S, S] uint8
    flip: Tensor | None,  # [B] bool
    normalize: bool,
    bits: int = 8,
) -> Tensor:  # [B, C, S, S] float32
    """Convert images to floats in [0, 1], or in [-1, 1] with `normalize`, mirrored where `flip` is true.

    bits: only the first `bits` bits of each value are kept, which gives 2^bits levels from 0 to 1.
    """
    if flip is not None:
        # Mirroring bytes moves a quarter of what mirroring floats would. Whole images are picked, since
        # torch.where picks single bytes and takes several times as long.
        rows = torch.arange(len(images), device=images.device)
        images = pick(torch.cat([images, images.flip(3)]), rows + len(images) * flip)
    if bits < 8:
        images = images >> (8 - bits)
    x = images.to(torch.float32).div_(2**bits - 1)
    return x.mul_(2).sub_(1) if normalize else x


def batch_of(
    images: Tensor,  # [N, C, S, S] uint8
    labels: Tensor,  # [N]
    rows: Tensor,  # [B]
    flip: Tensor | None,  # [B] bool
    normalize: bool,
    bits: int = 8,
) -> tuple[Tensor, Tensor]:  # [B, C, S, S] float32, [B]
    """Return `finish(pick(images, rows), flip, normalize, bits)` and the labels of `rows`, in a form that
    compiles to one kernel."""
    x = images[rows]
    if bits < 8:
        x = x >> (8 - bits)
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    # A compiled division of float32 is off by a last digit on a GPU. One of float64 is exact, and so is its
    # rounding to float32.
    x = (x.to(torch.float64) / (2**bits - 1)).to(torch.float32)
    x = x * 2 - 1 if normalize else x
    return x.contiguous(memory_format=torch.channels_last), labels[rows]


def to_unit(x: Tensor, normalize: bool) -> Tensor:
    """Convert images in the model's data range to [0, 1], clamped."""
    return ((x + 1) / 2 if normalize else x).clamp(0, 1)
