"""Define the discriminator of FactorVAE, and what it is trained by."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, DEPTH = 1000, 6  # Kim & Mnih 2018


class LatentDiscriminator(nn.Module):
    """Tell latents of q(z) from latents whose coordinates were drawn from different images.

    Six layers of 1,000 units with LeakyReLU(0.2), two logits (Kim & Mnih 2018, appendix). `seen` keeps the
    latents of the step, without a gradient, until the discriminator is trained on them.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        widths = [latent_dim, *[WIDTH] * DEPTH]
        layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.LeakyReLU(0.2))]
        self.net = nn.Sequential(*layers, nn.Linear(WIDTH, 2))
        self.seen: list[Tensor] = []

    def forward(self, z: Tensor) -> Tensor:  # [B, D] -> [B, 2]: logits of the joint, and of the product
        if torch.is_grad_enabled() and z.requires_grad:
            self.seen.append(z.detach())
        return self.net(z)


def discriminator_loss(
    net: Callable[[Tensor], Tensor],
    joint: Tensor,  # [B, D]
    product: Tensor,  # [B, D]
) -> Tensor:  # []
    """Return the mean of the two cross-entropies, of the joint as class 0 and of the product as class 1."""
    first, second = net(joint), net(product)
    zeros = torch.zeros(len(first), dtype=torch.int64, device=first.device)
    ones = torch.ones(len(second), dtype=torch.int64, device=second.device)
    return (F.cross_entropy(first, zeros) + F.cross_entropy(second, ones)) / 2


def permuted(z: Tensor) -> Tensor:  # [B, D]
    """Return z with each coordinate permuted over the batch by itself."""
    order = torch.rand(z.shape, device=z.device).argsort(0)
    return z.gather(0, order)
