"""Turn grey levels into black and white pixels, the same ones in every loader, process and resumed run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from movae_fast.choices import Binarization

STATIC_SEED = 777  # The static draw is the same for everybody, whatever the seed of a run.
LOW_32_BITS = 0xFFFFFFFF


@dataclass(frozen=True)
class Binarizer:
    """Binarize the images of one split: not at all, by a threshold, or by a static or dynamic random draw
    (`mode`).

    A draw depends on nothing but seed, split, epoch, row and position, so that a resumed epoch, other processes
    and other loaders get the same pixels. It is computed on the device and keeps no state.
    """

    mode: Binarization
    split: str
    seed: int

    def __call__(
        self,
        images: Tensor,  # [B, C, S, S] uint8
        rows: Tensor,  # [B], the images' places in the split
        epoch: int | None,
    ) -> Tensor:  # [B, C, S, S] uint8
        """Return images with the values 0 and 255, or the images themselves if `mode` is "none".

        epoch: the number of the training epoch. If it is None, "dynamic" makes the same draw as "static".
        """
        if self.mode == "none":
            return images
        if self.mode == "threshold":
            return (images > 127).to(torch.uint8).mul_(255)
        key = STATIC_SEED
        if self.mode == "dynamic" and epoch is not None:
            key = hash32(hash32(self.seed) + epoch + 1)
        key = hash32(2 * key + (self.split == "train"))
        keys = hash32(rows.to(images.device) + key)
        positions = torch.arange(images[0].numel(), device=images.device)
        draws = hash32(keys[:, None] + hash32(positions)) >> 8  # [B, C S S], 24 bits each
        white = draws.view(images.shape) * 255 < images.to(torch.int64) << 24
        return white.to(torch.uint8).mul_(255)


Integers = TypeVar("Integers", int, Tensor)


def hash32(x: Integers) -> Integers:
    """Return a hash of the low 32 bits of x, in [0, 2^32): the mixing function lowbias32."""
    x = x & LOW_32_BITS
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & LOW_32_BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & LOW_32_BITS  # The product may wrap in int64; its low bits are right.
    return x ^ (x >> 16)
