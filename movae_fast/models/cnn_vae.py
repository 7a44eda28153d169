"""Define the convolutional networks of the VAE/beta-VAE/MMD-VAE collection."""

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from movae_fast.models.base import GaussianVAE, check_image_size
from movae_fast.models.likelihoods import Activation, Likelihood


class CNNVAE(GaussianVAE):
    """Define `cnn_vae`: convolutions of kernel 4 and stride 2 down to 4x4, a 4x4 convolution to 1x1, and an MLP
    for each of mu and logvar.

    The decoder mirrors it with transposed convolutions from a 1x1 latent map. Objectives: reconstruction and
    kl. The published loss is the mean squared error over pixels plus coef_kl times 2 KL / (number of values of
    an image), which is the default weight of kl here (the published KL lacks the factor 1/2).
    """

    default_activation = "tanh"

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "tanh",
        latent_dim: int = 128,
        dim: int = 64,
        dim_mults: Sequence[int] | None = None,
        with_bn: bool = True,
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__(image_shape, activation, likelihood)
        channels, size, _ = image_shape
        if dim_mults is None:  # enough stages to reach 4x4
            check_image_size("cnn_vae", size, 8)
            dim_mults = tuple(2**i for i in range((size // 4).bit_length() - 1))
        if size != 4 * 2 ** len(dim_mults):
            raise ValueError(
                f"--image_size {size} does not fit cnn_vae with {len(dim_mults)} dim_mults: its last layer"
                f" needs a 4x4 map, that is --image_size {4 * 2 ** len(dim_mults)} (each entry halves the side)"
            )
        self.latent_dim = latent_dim
        widths = [dim * m for m in dim_mults]
        # Both ends stay unnormalised: no BatchNorm straight after the first convolution.
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, stride=2, padding=1)]
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            norm = [nn.BatchNorm2d(a)] if with_bn and i > 0 else []
            layers += [*norm, nn.LeakyReLU(0.2), nn.Conv2d(a, b, 4, stride=2, padding=1)]
        top = widths[-1]
        layers += [*([nn.BatchNorm2d(top)] if with_bn else []), nn.LeakyReLU(0.2), nn.Conv2d(top, top, 4)]
        self.encoder = nn.Sequential(*layers, nn.Flatten())
        self.mu = self._head(top, latent_dim)
        self.logvar = self._head(top, latent_dim)

        widths = widths[::-1]
        layers = [nn.Unflatten(1, (latent_dim, 1, 1)), nn.ConvTranspose2d(latent_dim, top, 4)]
        for a, b in zip(widths, [*widths[1:], self.head_channels], strict=True):
            norm = [nn.BatchNorm2d(a)] if with_bn else []
            layers += [*norm, nn.LeakyReLU(0.2), nn.ConvTranspose2d(a, b, 4, stride=2, padding=1)]
        self.decoder = nn.Sequential(*layers)
        self.apply(dcgan_init)

    @staticmethod
    def _head(inputs: int, outputs: int) -> nn.Sequential:
        hidden = inputs // 2
        return nn.Sequential(
            nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(), nn.Linear(hidden, outputs)
        )

    @classmethod
    def default_weights(cls, image_shape: tuple[int, int, int]) -> tuple[float, ...]:
        channels, height, width = image_shape
        return 1.0, 2 / (channels * height * width)


class MMDVAE(CNNVAE):
    """Define `mmd_vae` (InfoVAE, Zhao et al. 2017): the network of `cnn_vae` with a third objective, mmd.

    The published loss is reconstruction + (1 - alpha) KL + (alpha + lambda - 1) MMD(z, prior); the trainer's
    settings mmd_alpha and mmd_lambda multiply the default weights.
    """

    objectives = ("reconstruction", "kl", "mmd")
    beta_objective = "mmd"
    draws_prior = True

    @classmethod
    def default_weights(cls, image_shape: tuple[int, int, int]) -> tuple[float, ...]:
        return *super().default_weights(image_shape), 1.0


def dcgan_init(module: nn.Module) -> None:
    """Initialise a layer as DCGAN does (Radford et al. 2016): weights from N(0, 0.02), normalisation scales
    from N(1, 0.02) (standard deviations), biases 0."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
        with torch.no_grad():
            module.weight.normal_(1.0, 0.02)
            module.bias.zero_()
