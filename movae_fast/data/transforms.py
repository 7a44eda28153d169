"""From an original image to the side that a model wants; everything in uint8."""

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
    """`finish(pick(images, rows), flip, normalize)` and labels (to rounding), so that the compiler makes
    one kernel of it.
    """
    x = images[rows]
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    x = x.to(torch.float32) / 255
    x = x * 2 - 1 if normalize else x
    return x.contiguous(memory_format=torch.channels_last), labels[rows]


def to_unit(x: Tensor, normalize: bool) -> Tensor:
    """Images in the model's data range back to [0, 1], clamped."""
    return ((x + 1) / 2 if normalize else x).clamp(0, 1)
