"""Define the discriminators of FactorVAE and of the hinge GAN, and what each is trained by."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, DEPTH = 1000, 6  # Kim & Mnih 2018
PATCH_WIDTH, MOST_HALVINGS, GROUPS = 64, 3, 8  # Esser et al. 2021, but for the groups
LEAST_PATCHED = 8  # pixels of a side: two 4x4 convolutions behind one halving


class LatentDiscriminator(nn.Module):
    """Tell latents of q(z) from latents whose coordinates were drawn from different images.

    Six layers of 1,000 units with LeakyReLU(0.2), two logits (Kim & Mnih 2018, appendix). `seen` keeps the
    latents of the step, without a gradient, until the discriminator is trained on them.
    """

    compares = True  # examples of a batch with each other: it is trained on the latents of all processes

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        widths = [latent_dim, *[WIDTH] * DEPTH]
        layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.LeakyReLU(0.2))]
        self.net = nn.Sequential(*layers, nn.Linear(WIDTH, 2))
        self.seen: list[tuple[Tensor, ...]] = []

    def forward(self, z: Tensor) -> Tensor:  # [B, D] -> [B, 2]: logits of the joint, and of the product
        if torch.is_grad_enabled() and z.requires_grad:
            self.seen.append((z.detach(),))
        return self.net(z)

    def loss(self, z: Tensor) -> Tensor | None:  # []
        """Return what the discriminator is trained by: one half of the latents [B, D] stands for q(z), the
        other half, permuted, for the product of its marginals. None for less than two latents."""
        half = len(z) // 2
        return discriminator_loss(self.net, z[:half], permuted(z[half:])) if half else None


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


class PatchDiscriminator(nn.Module):
    """Tell patches of images from patches of reconstructions: one logit for each patch (Isola et al. 2017).

    4x4 convolutions of 64, 128, … channels, LeakyReLU(0.2), weights from N(0, 0.02) (standard deviation), as in
    VQGAN (Esser et al. 2021): three of them halve the side, of images below 24 pixels two or one. Where VQGAN
    has BatchNorm, channels are normalised in groups within an image, so that no image's logits depend on the
    batch: accumulated parts and several processes give what one batch does.

    `seen` keeps the images, reconstructions and sample weights of the step, without a gradient, until the
    discriminator is trained on them. Raises ValueError for images below 8 pixels.
    """

    compares = False

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, side, _ = image_shape
        if side < LEAST_PATCHED:
            raise ValueError(f"images of {side} pixels; the discriminator of patches needs {LEAST_PATCHED}")
        halvings = max(n for n in range(1, MOST_HALVINGS + 1) if side >> n >= 3)
        widths = [PATCH_WIDTH << i for i in range(halvings + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            stride = 2 if i < halvings - 1 else 1
            layers += [nn.Conv2d(a, b, 4, stride, 1, bias=False), nn.GroupNorm(GROUPS, b), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.net:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
        self.seen: list[tuple[Tensor, ...]] = []

    def forward(
        self,
        image: Tensor,  # [B, C, S, S] a reconstruction
        x: Tensor,  # [B, C, S, S] what it is one of
        sample_weight: Tensor | None = None,  # [B]
    ) -> Tensor:  # [B]
        """Return the mean logit of each reconstruction's patches."""
        if torch.is_grad_enabled() and image.requires_grad:
            counts = x.new_ones(len(x)) if sample_weight is None else sample_weight.to(x)
            self.seen.append((x.detach(), image.detach(), counts))
        return self.net(image).mean((1, 2, 3))

    def loss(
        self,
        x: Tensor,  # [B, C, S, S]
        image: Tensor,  # [B, C, S, S]
        sample_weight: Tensor,  # [B]
    ) -> Tensor:  # []
        """Return the hinge loss that the discriminator is trained by, (relu(1 - D(x)) + relu(1 + D(image))) /
        2, the mean over patches and images (Lim & Ye 2017)."""
        real, made = (self.net(each).flatten(1) for each in (x, image))
        return (sample_weight * (F.relu(1 - real) + F.relu(1 + made)).mean(1)).mean() / 2
