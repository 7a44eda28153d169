"""The convolutional networks that multi-rate VAEs are compared on, each for images of one size.

`cnn_vae_28/32/64` are pythae's, `resnet_vae_28/32/64` those of Bae et al. (2023), whose residual blocks are
two 3x3 convolutions; pythae's, a narrow bottleneck, are a setting. Objectives of all: reconstruction (summed
over an image) and kl, weight 1 each; sigmoid output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from movae_fast.models.base import Activation, GaussianVAE

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
    """relu(x + branch(x)): 3x3, ReLU, 3x3 ("author"), or ReLU, 3x3 to a quarter of the width, ReLU, 1x1."""

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
    """The layers on a map of `width` channels, a BatchNorm on request and ReLU behind all but the image's."""
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


class _SizedVAE(GaussianVAE):
    """What the networks share: an encoder of convolutions, Linear heads, a Linear, transposed convolutions."""

    size: ClassVar[int]
    recons_reduction = "sum"
    default_activation = "sigmoid"

    def check(self, family: str) -> None:
        size = self.image_shape[1]
        if size != self.size:
            others = f"; for {size}x{size} there is {family}_{size}" if size in LATENTS else ""
            raise ValueError(
                f"--image_size {size} does not fit {family}_{self.size}: give --image_size {self.size}{others}"
            )

    def assemble(
        self, encoder: list[nn.Module], decoder: list[nn.Module], top: int, sides: tuple[int, int], latents: int
    ) -> None:
        """From [top, s, s] at both ends of the latents, s of `sides` (encoder's, decoder's)."""
        self.latent_dim = latents
        self.encoder = nn.Sequential(*encoder, nn.Flatten())
        self.mu, self.logvar = (nn.Linear(top * sides[0] ** 2, latents) for _ in range(2))
        self.decoder = nn.Sequential(
            nn.Linear(latents, top * sides[1] ** 2), nn.Unflatten(1, (top, sides[1], sides[1])), *decoder
        )


class CNNVAE28(_SizedVAE):
    """`cnn_vae_28`: four 4x4 convolutions with BatchNorm, 128 to 1024 channels; the decoder goes back."""

    size = 28

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "sigmoid",
        latent_dim: int | None = None,
    ) -> None:
        super().__init__(image_shape, activation)
        self.check("cnn_vae")
        channels, size, _ = image_shape
        encoder = _stack(CNN_ENCODER, channels, channels, up=False, norm=True)
        decoder = _stack(CNN_DECODERS[size], 1024, channels, up=True, norm=True)
        sides = size // 16, CNN_FIRST_SIDE[size]
        self.assemble(encoder, decoder, 1024, sides, latent_dim or LATENTS[size])


class CNNVAE32(CNNVAE28):
    """`cnn_vae_32`: the same for 32x32."""

    size = 32


class CNNVAE64(CNNVAE28):
    """`cnn_vae_64`: the same for 64x64."""

    size = 64


class ResNetVAE28(_SizedVAE):
    """`resnet_vae_28`: strided convolutions to 128 channels, two residual blocks, and the same backwards."""

    size = 28

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "sigmoid",
        latent_dim: int | None = None,
        residual_block: ResidualBlock = "author",
    ) -> None:
        super().__init__(image_shape, activation)
        self.check("resnet_vae")
        channels, size, _ = image_shape
        encoder = _stack(RESNET_ENCODERS[size], channels, channels, up=False, norm=False, block=residual_block)
        decoder = _stack(RESNET_DECODERS[size], 128, channels, up=True, norm=False, block=residual_block)
        sides = 8 if size == 32 else 4, RESNET_FIRST_SIDE[size]
        self.assemble(encoder, decoder, 128, sides, latent_dim or LATENTS[size])


class ResNetVAE32(ResNetVAE28):
    """`resnet_vae_32`: the same for 32x32."""

    size = 32


class ResNetVAE64(ResNetVAE28):
    """`resnet_vae_64`: the same for 64x64."""

    size = 64
