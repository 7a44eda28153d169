"""Define MO-VAE's plain VAE and its beta-TC-VAE network."""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from movae_fast.models.base import GaussianVAE, Norm, check_image_size, norm_layer
from movae_fast.models.likelihoods import Activation, Likelihood


class HalvingConv(nn.Conv2d):
    """Compute a convolution of kernel 3, stride 2, padding 1; where it maps 2x2 to 1x1, as a matrix product.

    In that case only four of its nine taps meet the map and the others meet padding; convolution kernels spend
    their time on laying out the weight, a third of the time of the encoder at 32x32.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[2:] != (2, 2):
            return super().forward(input)
        weight = self.weight[:, :, 1:, 1:].permute(0, 2, 3, 1).flatten(1)  # [out, 4 in]
        out = nn.functional.linear(input.permute(0, 2, 3, 1).flatten(1), weight, self.bias)
        return out[:, :, None, None]


class DoublingConv(nn.ConvTranspose2d):
    """Compute a transposed convolution of kernel 3, stride 2, padding 1, output padding 1; where it maps 1x1 to
    2x2, as a matrix product."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if input.shape[2:] != (1, 1):
            return super().forward(input, output_size)
        weight = self.weight[:, :, 1:, 1:].permute(2, 3, 1, 0).flatten(0, 2)  # [4 out, in]
        assert self.bias is not None
        out = nn.functional.linear(input.flatten(1), weight, self.bias.repeat(4))
        return out.view(-1, 2, 2, self.out_channels).permute(0, 3, 1, 2)


def _down(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(
        HalvingConv(inputs, outputs, 3, stride=2, padding=1), norm_layer(norm, outputs), nn.LeakyReLU()
    )


def _up(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(
        DoublingConv(inputs, outputs, 3, stride=2, padding=1, output_padding=1),
        norm_layer(norm, outputs),
        nn.LeakyReLU(),
    )


def _decoder(latent_dim: int, hidden_dims: Sequence[int], channels: int, side: int, norm: Norm) -> nn.Module:
    """Build a decoder: a Linear layer, an upsampling block per width in reverse order and one more, and a 3x3
    convolution."""
    widths = [*reversed(hidden_dims), hidden_dims[0]]
    return nn.Sequential(
        nn.Linear(latent_dim, hidden_dims[-1] * side * side),
        nn.Unflatten(1, (hidden_dims[-1], side, side)),
        *(_up(a, b, norm) for a, b in itertools.pairwise(widths)),
        nn.Conv2d(hidden_dims[0], channels, 3, padding=1),
    )


class ConvVAE(GaussianVAE):
    """Define MO-VAE's `vae`: strided 3x3 convolutions with BatchNorm down to the latents, and a mirrored
    decoder.

    Objectives: reconstruction and kl, with the weights 1 and 0.00025.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "tanh",
        latent_dim: int = 128,
        hidden_dims: Sequence[int] = (32, 64, 128, 256, 512),
        layer_norm: Norm = "batch",
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__(image_shape, activation, likelihood)
        channels, size, _ = image_shape
        check_image_size("vae", size, 2 ** len(hidden_dims))
        side = size // 2 ** len(hidden_dims)
        self.latent_dim = latent_dim
        widths = [channels, *hidden_dims]
        self.encoder = nn.Sequential(
            *(_down(a, b, layer_norm) for a, b in itertools.pairwise(widths)), nn.Flatten()
        )
        self.mu = nn.Linear(hidden_dims[-1] * side * side, latent_dim)
        self.logvar = nn.Linear(hidden_dims[-1] * side * side, latent_dim)
        self.decoder = _decoder(latent_dim, hidden_dims, self.head_channels, side, layer_norm)

    @classmethod
    def default_weights(cls, image_shape: tuple[int, int, int]) -> tuple[float, ...]:
        return 1.0, 0.00025


class BetaTCVAE(GaussianVAE):
    """Define MO-VAE's `betatc_vae`: 4x4 convolutions without normalisation and a hidden Linear layer of width
    256.

    Objectives (Chen et al. 2018): reconstruction, mi, tc, dwkl, weight 1 each. The weight of dwkl, the
    dimension-wise KL, is annealed linearly over `anneal_steps`.
    """

    objectives = ("reconstruction", "mi", "tc", "dwkl")
    beta_objective = "tc"

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "tanh",
        latent_dim: int = 128,
        hidden_dims: Sequence[int] = (32, 32, 32, 32),
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__(image_shape, activation, likelihood)
        channels, size, _ = image_shape
        check_image_size("betatc_vae", size, 2 ** len(hidden_dims))
        side = size // 2 ** len(hidden_dims)
        self.latent_dim = latent_dim
        layers: list[nn.Module] = []
        for a, b in zip([channels, *hidden_dims], hidden_dims, strict=False):
            layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.LeakyReLU()]
        self.encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(hidden_dims[-1] * side * side, 256))
        self.mu = nn.Linear(256, latent_dim)
        self.logvar = nn.Linear(256, latent_dim)
        self.decoder = _decoder(latent_dim, hidden_dims, self.head_channels, side, "none")
