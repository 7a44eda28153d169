"""Define MO-VAE's VQ-VAE (van den Oord et al. 2017)."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from movae_fast.choices import Quantizer
from movae_fast.models.base import Norm, check_image_size, norm_layer
from movae_fast.models.bottleneck import Bottleneck, Coded, code_residually, make_bottleneck
from movae_fast.models.codebook_vae import CodebookVAE
from movae_fast.models.likelihoods import Activation, Likelihood, at_least_float32
from movae_fast.models.quantizers import check_quantizer, settings_of


class ResidualBlock(nn.Module):
    """Compute x + Conv1x1(ReLU(Conv3x3(x))), without biases."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def image_decoder(
    dim: int, hidden_dims: Sequence[int], channels: int, num_residual_layers: int, layer_norm: Norm
) -> nn.Sequential:
    """Build the network from codewords with `dim` channels to an output with `channels` channels.

    hidden_dims: the channels of the encoder's convolutions; the decoder uses them in reverse order.
    """
    width, widths = hidden_dims[-1], list(reversed(hidden_dims))
    layers: list[nn.Module] = [nn.Conv2d(dim, width, 3, padding=1), nn.LeakyReLU()]
    layers += [ResidualBlock(width) for _ in range(num_residual_layers)]
    layers.append(nn.LeakyReLU())
    for a, b in itertools.pairwise(widths):
        layers += [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), norm_layer(layer_norm, b), nn.LeakyReLU()]
    head = nn.ConvTranspose2d(widths[-1], channels, 4, stride=2, padding=1)
    return nn.Sequential(*layers, head)


class VQVAE(CodebookVAE):
    """Define MO-VAE's `vq_vae`: 4x4 convolutions, residual blocks, and a codebook of `num_embeddings` codes.

    Its objectives are reconstruction, embedding (which moves the codes to the encoder's output) and commitment
    (which moves the encoder's output to the codes), with weights 1, 1, 0.25. The reconstruction's gradient
    passes the lookup by the straight-through estimator. The codebook starts at U(-1/K, 1/K) and has no moving
    average.

    Another `quantizer` replaces the codebook and changes the objectives (`quantizer_objectives`): ema, fsq
    (`fsq_levels`), rvq, grouped_rvq, lfq, bsq or simvq. The two rvq have `num_quantizers` codebooks in each of
    `num_groups` groups; with `quantize_dropout` each training image uses a random number of them.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "tanh",
        hidden_dims: Sequence[int] = (128, 256),
        embedding_dim: int | None = None,
        num_embeddings: int | None = None,
        num_residual_layers: int = 2,
        layer_norm: Norm = "none",
        quantizer: Quantizer = "vq",
        num_quantizers: int | None = None,
        num_groups: int | None = None,
        fsq_levels: Sequence[int] | None = None,
        quantize_dropout: bool | None = None,
        codebook_decay: float | None = None,
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__(image_shape, activation, likelihood)
        channels, size, _ = image_shape
        check_image_size("vq_vae", size, 2 ** len(hidden_dims))
        options = {
            "quantizer": quantizer,
            "embedding_dim": embedding_dim,
            "num_embeddings": num_embeddings,
            "num_quantizers": num_quantizers,
            "num_groups": num_groups,
            "fsq_levels": fsq_levels,
            "quantize_dropout": quantize_dropout,
            "codebook_decay": codebook_decay,
        }
        self.settings = settings = settings_of(options)
        self.objectives = tuple(self.weighted_objectives(options, image_shape))
        self.side = size // 2 ** len(hidden_dims)
        levels = len(settings.code_sizes)
        self.code_shape = (self.side, self.side, *((levels,) if levels > 1 else ()))
        self.embedding_dim = dim = settings.embedding_dim
        width = hidden_dims[-1]
        layers: list[nn.Module] = []
        for a, b in zip([channels, *hidden_dims], hidden_dims, strict=False):
            layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), norm_layer(layer_norm, b), nn.LeakyReLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU()]
        layers += [ResidualBlock(width) for _ in range(num_residual_layers)]
        layers += [nn.LeakyReLU(), nn.Conv2d(width, dim, 1)]
        # Levels and signs want both signs alike, which the published last layer does not give.
        layers += [nn.LeakyReLU()] if settings.name not in ("fsq", "lfq", "bsq") else []
        self.encoder = nn.Sequential(*layers)
        # The one codebook is the model's own, as in the runs of the first version.
        self.quantizer: Bottleneck | None = None
        if settings.name == "vq":
            self.codebook = nn.Parameter(torch.empty(settings.num_embeddings, dim))
            nn.init.uniform_(self.codebook, -1 / settings.num_embeddings, 1 / settings.num_embeddings)
        else:
            self.quantizer = make_bottleneck(settings)
        self.count_codes(settings.code_sizes)

        self.decoder = image_decoder(dim, hidden_dims, self.head_channels, num_residual_layers, layer_norm)

    @classmethod
    def check_options(cls, options: Mapping[str, Any], image_shape: tuple[int, int, int]) -> None:
        check_quantizer(options, image_shape)

    def encode(self, x: Tensor) -> tuple[Tensor]:
        return (at_least_float32(self.encoder(x)),)

    def code(self, z: Tensor, depth: Tensor | None = None) -> Coded:
        if self.quantizer is None:
            return code_residually(z, [self.codebook])
        return self.quantizer(z, depth)

    def lookup(self, index: Tensor) -> Tensor:
        """Return the codewords [B, D, h, w] of codes [B, *code_shape], differentiable in codebooks that are
        trained."""
        if self.quantizer is None:
            return nn.functional.embedding(index, self.codebook).permute(0, 3, 1, 2)
        return self.quantizer.lookup(index)

    @property
    def map_sides(self) -> tuple[int, ...]:
        return (self.side,)

    def codebook_parameters(self) -> list[nn.Parameter]:
        return [self.codebook] if self.quantizer is None else self.quantizer.codebook_parameters()

    def decoder_parts(self) -> tuple[nn.Module, ...]:
        return (self.decoder,)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)
