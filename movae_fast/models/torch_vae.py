"""Define torch-vae's network, and a fully convolutional one that follows the DCGAN guidelines."""

import itertools

from torch import nn

from movae_fast.models.base import GaussianVAE, check_image_size
from movae_fast.models.cnn_vae import dcgan_init
from movae_fast.models.likelihoods import Activation, Likelihood


class TorchVAE(GaussianVAE):
    """Define `torch_vae`: three strided 3x3 convolutions (max_filters/4, /2, full), Linear heads, and a
    mirrored decoder.

    Objectives: reconstruction (squared error summed over an image) and kl, weight 1 each; sigmoid output.
    """

    recons_reduction = "sum"
    default_activation = "sigmoid"

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "sigmoid",
        latent_dim: int = 128,
        max_filters: int = 128,
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__(image_shape, activation, likelihood)
        channels, size, _ = image_shape
        check_image_size("torch_vae", size, 8)
        if max_filters < 4:
            raise ValueError(
                f"--max_filters {max_filters}: torch_vae's first layer has a quarter of it; give >= 4"
            )
        self.latent_dim = latent_dim
        side = size // 8
        widths = [max_filters // 4, max_filters // 2, max_filters]
        layers: list[nn.Module] = []
        for a, b in zip([channels, *widths], widths, strict=False):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.LeakyReLU()]
        self.encoder = nn.Sequential(*layers, nn.Flatten())
        self.mu = nn.Linear(max_filters * side * side, latent_dim)
        self.logvar = nn.Linear(max_filters * side * side, latent_dim)
        widths = widths[::-1]
        layers = [
            nn.Linear(latent_dim, max_filters * side * side),
            nn.Unflatten(1, (max_filters, side, side)),
        ]
        for a, b in itertools.pairwise(widths):
            up = nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=1)
            layers += [up, nn.BatchNorm2d(b), nn.LeakyReLU()]
        layers.append(
            nn.ConvTranspose2d(widths[-1], self.head_channels, 3, stride=2, padding=1, output_padding=1)
        )
        self.decoder = nn.Sequential(*layers)


class DCGANVAE(GaussianVAE):
    """Define `dcgan_vae`: fully convolutional, after the DCGAN guidelines (Radford et al. 2016).

    Strided 4x4 convolutions with BatchNorm and LeakyReLU lead to a 4x4 map, which one convolution maps to mu
    and another to logvar. The decoder has transposed convolutions with BatchNorm and ReLU, from a 1x1 latent
    map, and a tanh output. There is no hidden Linear layer. `max_filters` is the width at 4x4, which halves
    with each doubling of the side.
    """

    recons_reduction = "sum"
    default_activation = "tanh"

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "tanh",
        latent_dim: int = 128,
        max_filters: int = 128,
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__(image_shape, activation, likelihood)
        channels, size, _ = image_shape
        stages = (size // 4).bit_length() - 1
        if size != 4 * 2**stages or stages < 1:
            powers = [2 ** max(3, size.bit_length() - 1), 2 ** max(3, size.bit_length())]
            raise ValueError(
                f"--image_size {size} does not fit dcgan_vae: its strides need a power of two from 8 up;"
                f" the nearest are {' and '.join(map(str, sorted(set(powers))))}"
            )
        if max_filters < 2 ** (stages - 1):
            raise ValueError(
                f"--max_filters {max_filters} leaves dcgan_vae no channel; give >= {2 ** (stages - 1)}"
            )
        self.latent_dim = latent_dim
        widths = [max_filters // 2**i for i in reversed(range(stages))]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip([channels, *widths], widths, strict=False)):
            # The guidelines leave the input layer and the output layer unnormalised.
            norm = [nn.BatchNorm2d(b)] if i > 0 else []
            layers += [nn.Conv2d(a, b, 4, stride=2, padding=1, bias=i == 0), *norm, nn.LeakyReLU(0.2)]
        self.encoder = nn.Sequential(*layers)
        self.mu = nn.Sequential(nn.Conv2d(max_filters, latent_dim, 4), nn.Flatten())
        self.logvar = nn.Sequential(nn.Conv2d(max_filters, latent_dim, 4), nn.Flatten())
        widths = widths[::-1]
        layers = [
            nn.Unflatten(1, (latent_dim, 1, 1)),
            nn.ConvTranspose2d(latent_dim, max_filters, 4, bias=False),
        ]
        layers += [nn.BatchNorm2d(max_filters), nn.ReLU()]
        for a, b in itertools.pairwise(widths):
            layers += [
                nn.ConvTranspose2d(a, b, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(),
            ]
        head = nn.ConvTranspose2d(widths[-1], self.head_channels, 4, stride=2, padding=1)
        self.decoder = nn.Sequential(*layers, head)
        self.apply(dcgan_init)
