"""Define VAEs of linear layers: the linear VAE, whose optimum has a closed form, and the MLP for dSprites."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from movae_fast.models.base import GaussianVAE
from movae_fast.models.likelihoods import Activation, Likelihood

PosteriorCov = Literal["shared", "predicted"]
# What a shared log-variance starts from: near the optimum beta / lambda of small betas. From 0, Adam takes
# thousands of steps to get there, and the noise on the way costs weak latents their weights.
LOG_VARIANCE = -4.0


class SharedLogVariance(nn.Module):
    """Return one learned log-variance per latent, the same for every image: [B, …] to [B, D]."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((latent_dim,), LOG_VARIANCE))

    def forward(self, h: Tensor) -> Tensor:
        return self.value.expand(h.shape[0], -1)  # len(h) would fix the batch of an exported program


def _image_layer(inputs: int, channels: int, image_shape: tuple[int, int, int]) -> list[nn.Module]:
    """Return the layers that map [B, inputs] to [B, channels, S, S]."""
    _, height, width = image_shape
    return [nn.Linear(inputs, channels * height * width), nn.Unflatten(1, (channels, height, width))]


class LinearVAE(GaussianVAE):
    """Define `linear_vae`: two linear layers in encoder and decoder each, without nonlinearity (Bae et al.
    2023, section 3.2).

    Encoder: image to latent_dim, then to the mean; decoder: latent_dim to latent_dim, then to the image. There
    are two layers so that the gates of the multi-rate form, which lie between them, can represent the optimum
    at every beta. The layers between latents start as the identity, so that the gates of encoder and decoder
    act on the same latents. The posterior's covariance is diagonal: "shared" by all images, as at the optimum,
    or "predicted" from the first layer. Objectives: reconstruction (squared error summed over an image, no
    output activation) and kl, weight 1 each.
    """

    recons_reduction = "sum"
    default_activation = "none"

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "none",
        latent_dim: int = 32,
        posterior_cov: PosteriorCov = "shared",
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__(image_shape, activation, likelihood)
        self.latent_dim = latent_dim
        values = math.prod(image_shape)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(values, latent_dim))
        self.mu = nn.Linear(latent_dim, latent_dim)
        shared = posterior_cov == "shared"
        self.logvar = SharedLogVariance(latent_dim) if shared else nn.Linear(latent_dim, latent_dim)
        first = nn.Linear(latent_dim, latent_dim)
        self.decoder = nn.Sequential(first, *_image_layer(latent_dim, self.head_channels, image_shape))
        for layer in (self.mu, first):
            nn.init.eye_(layer.weight)


class MLPVAE(GaussianVAE):
    """Define `mlp_vae`: the fully connected network for dSprites (Higgins et al. 2017, with the widths of Chen
    et al. 2018).

    The encoder has ReLU layers of the widths `hidden_dims`; the decoder has Tanh layers of the same widths in
    reverse order, and the first width once more. Objectives: reconstruction (summed over an image) and kl,
    weight 1 each; sigmoid output.
    """

    recons_reduction = "sum"
    default_activation = "sigmoid"

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "sigmoid",
        latent_dim: int = 10,
        hidden_dims: Sequence[int] = (1200, 1200),
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__(image_shape, activation, likelihood)
        self.latent_dim = latent_dim
        values, top = math.prod(image_shape), hidden_dims[-1]
        down = [values, *hidden_dims]
        self.encoder = nn.Sequential(
            nn.Flatten(), *(m for a, b in itertools.pairwise(down) for m in (nn.Linear(a, b), nn.ReLU()))
        )
        self.mu, self.logvar = nn.Linear(top, latent_dim), nn.Linear(top, latent_dim)
        up = [latent_dim, *reversed(hidden_dims), hidden_dims[0]]
        self.decoder = nn.Sequential(
            *(m for a, b in itertools.pairwise(up) for m in (nn.Linear(a, b), nn.Tanh())),
            *_image_layer(up[-1], self.head_channels, image_shape),
        )


class BetaTCMLPVAE(MLPVAE):
    """Define `betatc_mlp_vae`: the network of `mlp_vae` with beta-TC-VAE's objectives (Chen et al. 2018).

    Objectives: reconstruction, mi, tc, dwkl, weight 1 each; the weight of dwkl is annealed as in betatc_vae.
    """

    objectives = ("reconstruction", "mi", "tc", "dwkl")
    beta_objective = "tc"
