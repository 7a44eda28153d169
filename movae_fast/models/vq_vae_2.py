"""Define the two-level VQ-VAE-2 (Razavi et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from movae_fast.choices import Quantizer
from movae_fast.models.base import check_image_size
from movae_fast.models.bottleneck import Coded, make_bottleneck
from movae_fast.models.codebook_vae import CodebookVAE
from movae_fast.models.likelihoods import Activation, Likelihood, at_least_float32
from movae_fast.models.quantizers import check_two_levels, settings_of, two_level_objectives

BLOCK = 32  # channels inside a residual block


class Block(nn.Module):
    """Compute x + Conv1x1(ReLU(Conv3x3(ReLU(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, BLOCK, 3, padding=1), nn.ReLU(), nn.Conv2d(BLOCK, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def blocks(channels: int, count: int) -> list[nn.Module]:
    """Return `count` residual blocks, followed by a ReLU."""
    return [*(Block(channels) for _ in range(count)), nn.ReLU()]


def image_encoder(channels: int, half: int, width: int, count: int) -> nn.Sequential:
    """Build the network from images to features with `width` channels at a quarter of the side."""
    return nn.Sequential(
        nn.Conv2d(channels, half, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(half, width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        *blocks(width, count),
    )


def image_decoder(features: int, width: int, half: int, channels: int, count: int) -> nn.Sequential:
    """Build the network from features at a quarter of the side to an output with `channels` channels at full
    size."""
    return nn.Sequential(
        nn.Conv2d(features, width, 3, padding=1),
        *blocks(width, count),
        nn.ConvTranspose2d(width, half, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(half, channels, 4, stride=2, padding=1),
    )


class VQVAE2(CodebookVAE):
    """Define MO-VAE's `vq_vae_2`, with two levels of codes: at a quarter and at an eighth of the image's side.

    The upper level (the eighth) is quantized first, the lower one depends on its codewords, and the decoder
    reads both. Features, codewords and codes of both levels are concatenated, the upper level first: z
    [B, D, N] with N = (S/8)^2 + (S/4)^2, and codes [B, N]. The objectives are reconstruction, commitment and
    embedding, with weight 1 each, the last two summed over the levels. Each level has its own codebooks, of any
    `quantizer`. Everything before the lower level's codes is shared by the objectives, so its gradients are
    aggregated.
    """

    objectives: tuple[str, ...] = ("reconstruction", "commitment", "embedding")

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "tanh",
        hidden_dim: int = 128,
        embedding_dim: int | None = None,
        num_embeddings: int | None = None,
        num_residual_layers: int = 2,
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
        check_image_size("vq_vae_2", size, 8)
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
        check_two_levels(options, image_shape)
        self.settings = settings = settings_of(options)
        self.objectives = tuple(self.weighted_objectives(options, image_shape))
        self.sides = (size // 8, size // 4)
        self.spans = tuple(side * side for side in self.sides)
        levels = len(settings.code_sizes)
        self.code_shape = (sum(self.spans), *((levels,) if levels > 1 else ()))
        self.embedding_dim = dim = settings.embedding_dim
        width, half, count = hidden_dim, max(hidden_dim // 2, 1), num_residual_layers
        self.encoder_bottom = image_encoder(channels, half, width, count)
        self.encoder_top = nn.Sequential(
            nn.Conv2d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            *blocks(width, count),
            nn.Conv2d(width, dim, 1),
        )
        self.decoder_top = nn.Sequential(
            nn.Conv2d(dim, width, 3, padding=1),
            *blocks(width, count),
            nn.ConvTranspose2d(width, dim, 4, stride=2, padding=1),
        )
        self.to_bottom = nn.Conv2d(dim + width, dim, 1)
        self.top, self.bottom = make_bottleneck(settings), make_bottleneck(settings)
        self.count_codes(settings.code_sizes * 2)
        self.upsample = nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1)
        self.decoder = image_decoder(2 * dim, width, half, self.head_channels, count)

    @classmethod
    def weighted_objectives(
        cls, options: Mapping[str, Any], image_shape: tuple[int, int, int]
    ) -> dict[str, float]:
        return two_level_objectives(options)

    @classmethod
    def check_options(cls, options: Mapping[str, Any], image_shape: tuple[int, int, int]) -> None:
        check_two_levels(options, image_shape)

    def encode(self, x: Tensor) -> tuple[Tensor]:
        lower = self.encoder_bottom(x)
        top = at_least_float32(self.encoder_top(lower))
        # The lookup alone: counts and averages follow once, in `code`.
        words = self.nearest(top)
        bottom = self.to_bottom(torch.cat([self.decoder_top(words), lower], 1))
        return (torch.cat([top.flatten(2), at_least_float32(bottom).flatten(2)], 2),)

    def nearest(self, top: Tensor) -> Tensor:
        """Return the codewords of the upper level's features with the straight-through gradient, without
        updating averages."""
        words = self.top.lookup(self.top.nearest(top))
        return top + (words - top).detach()

    def code(self, z: Tensor, depth: Tensor | None = None) -> Coded:
        parts = [
            level(part, depth)
            for level, part in zip((self.top, self.bottom), z.split(list(self.spans), 2), strict=True)
        ]
        codewords, codes, usage, *losses = zip(*parts, strict=True)
        return Coded(
            torch.cat(codewords, 2),
            torch.cat(codes, 1),
            torch.cat(usage),
            *(None if pair[0] is None else pair[0] + pair[1] for pair in losses),
        )

    def lookup(self, index: Tensor) -> Tensor:
        """Return the codewords [B, D, N] of codes [B, *code_shape]."""
        top, bottom = index.split(list(self.spans), 1)
        return torch.cat([self.top.lookup(top), self.bottom.lookup(bottom)], 2)

    @property
    def map_sides(self) -> tuple[int, ...]:
        return self.sides

    def decode(self, z: Tensor) -> Tensor:
        top, bottom = (
            part.unflatten(2, (side, side))
            for part, side in zip(z.split(list(self.spans), 2), self.sides, strict=True)
        )
        return self.decoder(torch.cat([self.upsample(top), bottom], 1))

    def decoder_parts(self) -> tuple[nn.Module, ...]:
        return self.upsample, self.decoder

    def codebook_parameters(self) -> list[nn.Parameter]:
        return [*self.top.codebook_parameters(), *self.bottom.codebook_parameters()]

    def places_by_codebook(self, places: int) -> list[int]:
        return [span for span in self.spans for _ in self.settings.code_sizes]

    def arranged(self, drawn: list[Tensor]) -> Tensor:
        half = len(drawn) // 2
        return torch.cat([torch.stack(drawn[:half], -1), torch.stack(drawn[half:], -1)], 1)
