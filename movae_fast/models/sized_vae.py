"""Define the convolutional networks on which multi-rate VAEs are compared, each for images of one size.

`cnn_vae_28/32/64` are pythae's networks, `resnet_vae_28/32/64` those of Bae et al. (2023), whose residual
blocks have two 3x3 convolutions; an option selects pythae's blocks, a narrow bottleneck. Objectives of all:
reconstruction (summed over an image) and kl, weight 1 each; sigmoid output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from movae_fast.models.base import GaussianVAE
from movae_fast.models.likelihoods import Activation, Likelihood

ResidualBlock = Literal["author", "pythae"]
# A convolution: channels (None: the image's), kernel, stride, padding, and a transposed one's output padding.
# An empty tuple stands for a residual block.
Layer = tuple[int | None, int, int, int, int] | tuple[()]
RESIDUAL: Layer = ()

CNN_ENCODER: tuple[Layer, ...] = tuple((width, 4, 2, 1, 0) for width in (128, 256, 512, 1024))
CNN_DECODERS: dict[int, tuple[Layer, ...]] = {
    28: ((512, 3, 2, 1, 0), (256, 3, 2, 1, 1), (None, 3, 2, 1, 1)),
    32: ((512, 4, 2, 1, 0), (256, 4, 2, 1, 1), (None, 4, 1, 2, 0)),
    64: ((512, 5, 2, 2, 0), (256, 5, 2, 1, 0), (128, 5, 2, 2, 1), (None, 5, 1, 1, 0)),
}
CNN_FIRST_SIDE = {28: 4, 32: 8, 64: 8}  # of the decoder's first map
RESNET_ENCODERS: dict[int, tuple[Layer, ...]] = {
    28: ((64, 4, 2, 1, 0), (128, 4, 2, 1, 0), (128, 3, 2, 1, 0), RESIDUAL, RESIDUAL),
    32: ((64, 4, 2, 1, 0), (128, 4, 2, 1, 0), (128, 3, 1, 1, 0), RESIDUAL, RESIDUAL),
    64: ((64, 4, 2, 1, 0), (128, 4, 2, 1, 0), (128, 3, 2, 1, 0), (128, 3, 2, 1, 0), RESIDUAL, RESIDUAL),
}
RESNET_DECODERS: dict[int, tuple[Layer, ...]] = {
    28: ((128, 3, 2, 1, 0), RESIDUAL, RESIDUAL, (64, 3, 2, 1, 1), (None, 3, 2, 1, 1)),
    32: (RESIDUAL, RESIDUAL, (64, 4, 2, 1, 0), (None, 4, 2, 1, 0)),
    64: ((128, 3, 2, 1, 0), RESIDUAL, RESIDUAL, (128, 5, 2, 1, 0), (64, 5, 2, 1, 1), (None, 4, 2, 1, 0)),
}
RESNET_FIRST_SIDE = {28: 4, 32: 8, 64: 4}
LATENTS = {28: 32, 32: 256, 64: 64}


class Residual(nn.Module):
    """Compute relu(x + branch(x)).

    The branch is 3x3 convolution, ReLU, 3x3 convolution ("author"), or ReLU, 3x3 convolution to a quarter of
    the width, ReLU, 1x1 convolution ("pythae").
    """

    def __init__(self, width: int, kind: ResidualBlock) -> None:
        super().__init__()
        if kind == "author":
            layers = [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]
        else:
            narrow = width // 4
            layers = [nn.ReLU(), nn.Conv2d(width, narrow, 3, padding=1), nn.ReLU(), nn.Conv2d(narrow, width, 1)]
        self.branch = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).relu()


def _stack(
    layers: Sequence[Layer], width: int, channels: int, up: bool, norm: bool, block: ResidualBlock = "author"
) -> list[nn.Module]:
    """Build a stack of layers on a map of `width` channels, with ReLU (and BatchNorm with `norm`) after all but
    the output layer."""
    built: list[nn.Module] = []
    for layer in layers:
        if not layer:
            built.append(Residual(width, block))
            continue
        outputs, kernel, stride, padding, output_padding = layer
        target = outputs or channels
        built.append(
            nn.ConvTranspose2d(width, target, kernel, stride, padding, output_padding)
            if up
            else nn.Conv2d(width, target, kernel, stride, padding)
        )
        if outputs is not None:
            built += [nn.BatchNorm2d(target), nn.ReLU()] if norm else [nn.ReLU()]
        width = target
    return built


def _check_size(family: str, size: int) -> None:
    """Raise ValueError if the publication of this family of models has no network for images of this side."""
    if size not in LATENTS:
        *others, last = LATENTS
        raise ValueError(
            f"--image_size {size} does not fit {family}: its networks are for sides of "
            f"{', '.join(map(str, others))} and {last}"
        )


def _join(
    model: GaussianVAE, encoder: list[nn.Module], decoder: list[nn.Module], top: int, sides: tuple[int, int]
) -> None:
    """Set the model's encoder, mu, logvar and decoder from two stacks of layers, with Linear layers between
    them.

    The encoder's stack ends, and the decoder's starts, with a map [top, s, s], s being the two `sides`. The
    order in which the layers are made determines how their weights are drawn.
    """
    latents = model.latent_dim
    model.encoder = nn.Sequential(*encoder, nn.Flatten())
    model.mu, model.logvar = (nn.Linear(top * sides[0] ** 2, latents) for _ in range(2))
    model.decoder = nn.Sequential(
        nn.Linear(latents, top * sides[1] ** 2), nn.Unflatten(1, (top, sides[1], sides[1])), *decoder
    )


class SizedCNNVAE(GaussianVAE):
    """Define `cnn_vae_28`, `_32`, `_64`: four 4x4 convolutions with BatchNorm, 128 to 1024 channels, and a
    mirrored decoder.

    The images' side selects one of three published networks, which differ in their decoders.
    """

    recons_reduction = "sum"
    default_activation = "sigmoid"

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "sigmoid",
        latent_dim: int | None = None,
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__(image_shape, activation, likelihood)
        channels, size, _ = image_shape
        _check_size("cnn_vae", size)
        self.latent_dim = latent_dim or LATENTS[size]
        encoder = _stack(CNN_ENCODER, channels, channels, up=False, norm=True)
        decoder = _stack(CNN_DECODERS[size], 1024, self.head_channels, up=True, norm=True)
        _join(self, encoder, decoder, 1024, (size // 16, CNN_FIRST_SIDE[size]))


class SizedResNetVAE(GaussianVAE):
    """Define `resnet_vae_28`, `_32`, `_64`: strided convolutions to 128 channels, two residual blocks, and a
    mirrored decoder.

    The images' side selects one of three published networks, which differ in their convolutions.
    """

    recons_reduction = "sum"
    default_activation = "sigmoid"

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "sigmoid",
        latent_dim: int | None = None,
        residual_block: ResidualBlock = "author",
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__(image_shape, activation, likelihood)
        channels, size, _ = image_shape
        _check_size("resnet_vae", size)
        self.latent_dim = latent_dim or LATENTS[size]
        encoder = _stack(RESNET_ENCODERS[size], channels, channels, up=False, norm=False, block=residual_block)
        decoder = _stack(
            RESNET_DECODERS[size], 128, self.head_channels, up=True, norm=False, block=residual_block
        )
        _join(self, encoder, decoder, 128, (8 if size == 32 else 4, RESNET_FIRST_SIDE[size]))
