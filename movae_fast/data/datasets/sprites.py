"""Render sprites with dSprites' five factors, on the device where they are needed.

dSprites (Matthey et al. 2017) has 3 shapes x 6 scales x 40 orientations x 32 x 32 positions = 737,280 white
shapes on black. Here each index determines an image and its factors without any file: the shapes are implicit
functions, evaluated for a whole batch at once.
"""

import math

import torch
from torch import Tensor

from movae_fast.data.datasets.facts import SPRITES_SIZES as FACTOR_SIZES
from movae_fast.data.sources import ImageSource

SIZE = math.prod(FACTOR_SIZES)


def factors_of(index: Tensor) -> Tensor:
    """Return the factor values [B, 5] int64 of indices [B] in [0, 737280); the last factor varies fastest."""
    values = []
    for size in reversed(FACTOR_SIZES):
        values.append(index % size)
        index = index // size
    return torch.stack(values[::-1], dim=1)


def index_of(factors: Tensor) -> Tensor:
    """Return the indices [B] int64 of factor values [B, 5]: the inverse of `factors_of`."""
    index = torch.zeros_like(factors[:, 0])
    for i, size in enumerate(FACTOR_SIZES):
        index = index * size + factors[:, i]
    return index


def _signed_distances(u: Tensor, v: Tensor) -> Tensor:
    """Return the approximate signed distances [3, ...] of points (u, v) to the three unit shapes, negative
    inside."""
    square = torch.maximum(u.abs(), v.abs()) - 0.8
    # f / |grad f| is the distance to first order, which is enough for antialiasing over one pixel.
    a, b = 1.0, 0.6
    f = (u / a).square() + (v / b).square() - 1
    grad = torch.hypot(2 * u / a**2, 2 * v / b**2)
    ellipse = f / grad.clamp_min(1e-6)
    x, y = u * 1.15, 0.1 - v * 1.15  # An image's rows grow downwards, and the heart's lobes are at the top.
    g = x.square() + y.square() - 1
    f = g**3 - x.square() * y**3
    grad = torch.hypot(6 * x * g.square() - 2 * x * y**3, 6 * y * g.square() - 3 * x.square() * y.square())
    heart = f / (1.15 * grad.clamp_min(1e-6))
    return torch.stack([square, ellipse, heart])


def render(
    factors: Tensor,  # [B, 5] int64: shape, scale, orientation, pos_x, pos_y
    size: int = 64,
    antialias: bool = False,
) -> Tensor:  # [B, 1, size, size] uint8, 0 or 255 (in between with antialias)
    """Render the images of the given factor values, on the factors' device."""
    shape, scale, orientation, pos_x, pos_y = factors.unbind(1)

    def column(x: Tensor) -> Tensor:
        return x.to(torch.float32)[:, None, None]

    # Lengths are in pixels of an image of side 64. The largest sprite at an outermost position lies inside it.
    radius = 12.0 * (0.5 + column(scale) / 10)
    angle = column(orientation) * (2 * math.pi / FACTOR_SIZES[2])
    pixel = (torch.arange(size, device=factors.device, dtype=torch.float32) + 0.5) * (64 / size)
    x = pixel[None, None, :] - (16 + column(pos_x) * (32 / 31))
    y = pixel[None, :, None] - (16 + column(pos_y) * (32 / 31))
    u = (x * torch.cos(angle) + y * torch.sin(angle)) / radius
    v = (y * torch.cos(angle) - x * torch.sin(angle)) / radius
    distance = _signed_distances(u, v).gather(0, shape[None, :, None, None].expand(1, *u.shape))[0]
    distance = distance * radius * (size / 64)  # in pixels of this image
    coverage = (0.5 - distance).clamp(0, 1) if antialias else (distance < 0).to(torch.float32)
    return (coverage * 255).round().to(torch.uint8)[:, None]


class Sprites(ImageSource):
    """Render the images of one split when they are asked for. Labels are the shapes."""

    def __init__(self, index: Tensor, size: int, device: torch.device, antialias: bool = False) -> None:
        self.index, self.size, self.antialias = index.to(device), size, antialias

    def __len__(self) -> int:
        return len(self.index)

    def factors(self, rows: Tensor) -> Tensor:
        """Return the factor values [B, 5] int64 of rows [B] of this split."""
        return factors_of(self.index[rows.to(self.index.device)])

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images [B, 1, S, S] of `rows`, rendered now, and their shapes [B]."""
        factors = factors_of(self.index[rows])
        return render(factors, self.size, self.antialias), factors[:, 0]


def split_index(split: str, test_size: int = 10_000) -> Tensor:
    """Return the indices of a split's images: all are shuffled once in a fixed order, and the last `test_size`
    are the test split."""
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))
    return order[-test_size:] if split == "test" else order[:-test_size]
