"""Define autoregressive flows, which make a group's posterior richer than a normal distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from movae_fast.models.nvae.convs import MaskedConv2d

EXPAND = 6  # hidden channels per latent channel


class ShiftFlow(nn.Module):
    """Compute z - shift(z), where the shift of a latent depends only on the latents before it; the
    log-determinant is 0."""

    def __init__(self, latents: int, mirror: bool) -> None:
        super().__init__()
        hidden = EXPAND * latents
        last = MaskedConv2d(hidden, latents, 1, strict=False, mirror=mirror)
        with torch.no_grad():
            last.log_norm.sub_(math.log(10))  # shifts start small
        self.shift = nn.Sequential(
            MaskedConv2d(latents, hidden, 3, strict=True, mirror=mirror, bias=False),
            nn.ELU(),
            MaskedConv2d(hidden, hidden, 5, strict=False, mirror=mirror, groups=hidden, bias=False),
            nn.ELU(),
            nn.ELU(),
            last,
        )

    def forward(self, z: Tensor) -> Tensor:  # [B, latents, h, w]
        return z - self.shift(z)


def flow_pairs(latents: int, pairs: int) -> nn.Sequential:
    """Make `pairs` pairs of flows; the second flow of a pair goes through the pixels in reverse order."""
    return nn.Sequential(*(ShiftFlow(latents, mirror) for _ in range(pairs) for mirror in (False, True)))
