"""Define MO-VAE's VQ-VAE (van den Oord et al. 2017)."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from movae_fast import ops
from movae_fast.models.base import (
    VAE,
    Activation,
    Noise,
    Norm,
    VQOutput,
    at_least_float32,
    check_image_size,
    norm_layer,
)


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


class VQVAE(VAE):
    """Define MO-VAE's `vq_vae`: 4x4 convolutions, residual blocks, a codebook of `num_embeddings` codes.

    Objectives: reconstruction, embedding (the codebook moves to the encoder's output), commitment (the
    encoder's output moves to the codebook); weights 1, 1, 0.25. The straight-through estimator carries the
    reconstruction's gradient past the lookup. The codebook starts at U(-1/K, 1/K); there is no moving average.
    """

    objectives = ("reconstruction", "embedding", "commitment")
    beta_objective = "commitment"

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        activation: Activation = "tanh",
        hidden_dims: Sequence[int] = (128, 256),
        embedding_dim: int = 64,
        num_embeddings: int = 512,
        num_residual_layers: int = 2,
        layer_norm: Norm = "none",
    ) -> None:
        super().__init__(image_shape, activation)
        channels, size, _ = image_shape
        check_image_size("vq_vae", size, 2 ** len(hidden_dims))
        self.side = size // 2 ** len(hidden_dims)
        self.embedding_dim, self.num_embeddings = embedding_dim, num_embeddings
        width = hidden_dims[-1]
        layers: list[nn.Module] = []
        for a, b in zip([channels, *hidden_dims], hidden_dims, strict=False):
            layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), norm_layer(layer_norm, b), nn.LeakyReLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU()]
        layers += [ResidualBlock(width) for _ in range(num_residual_layers)]
        self.encoder = nn.Sequential(
            *layers, nn.LeakyReLU(), nn.Conv2d(width, embedding_dim, 1), nn.LeakyReLU()
        )

        self.codebook = nn.Parameter(torch.empty(num_embeddings, embedding_dim))
        nn.init.uniform_(self.codebook, -1 / num_embeddings, 1 / num_embeddings)
        # How often each code was chosen lately, for drawing codes without a learned prior.
        self.register_buffer("code_usage", torch.zeros(num_embeddings))
        self.code_usage: Tensor

        layers = [nn.Conv2d(embedding_dim, width, 3, padding=1), nn.LeakyReLU()]
        layers += [ResidualBlock(width) for _ in range(num_residual_layers)]
        layers.append(nn.LeakyReLU())
        widths = list(reversed(hidden_dims))
        for a, b in itertools.pairwise(widths):
            layers += [
                nn.ConvTranspose2d(a, b, 4, stride=2, padding=1),
                norm_layer(layer_norm, b),
                nn.LeakyReLU(),
            ]
        self.decoder = nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], channels, 4, stride=2, padding=1))

    @classmethod
    def default_weights(cls, image_shape: tuple[int, int, int]) -> tuple[float, ...]:
        return 1.0, 1.0, 0.25

    def encode(self, x: Tensor) -> tuple[Tensor]:
        return (at_least_float32(self.encoder(x)),)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Quantize the encoder's output [B, D, h, w].

        Returns codewords in the shape of z, index and squared error [B, h, w], counts [K] and sums [K, D].
        Gradients go to z alone: straight through, and those of the error.
        """
        return ops.quantize(z, self.codebook.detach())

    def lookup(self, index: Tensor) -> Tensor:
        """Return the codewords [B, D, h, w] of codes [B, h, w], differentiable in the codebook."""
        return nn.functional.embedding(index, self.codebook).permute(0, 3, 1, 2)

    def forward_features(self, features: tuple[Tensor, ...], noise: Noise | None = None) -> VQOutput:
        (z,) = features
        codewords, index, error, count, _ = self.quantize(z)
        if self.training:
            self.code_usage.lerp_(count.to(self.code_usage), 0.01)
        return VQOutput(
            preactivation=at_least_float32(self.decode(codewords)),
            embedding=ops.code_error(z.detach(), self.codebook, index).mean((1, 2)) / self.embedding_dim,
            commitment=error.mean((1, 2)) / self.embedding_dim,
            codes=index,
            usage=count,
        )

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def task_parameters(self) -> dict[str, list[nn.Parameter]]:
        return {"reconstruction": list(self.decoder.parameters()), "embedding": [self.codebook]}

    def reconstruct(self, x: Tensor) -> Tensor:
        (z,) = self.encode(x)
        return self.to_image(self.decode(self.quantize(z)[0]))

    def sample_codes(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n code maps [n, h, w], each code independently by how often training chose it.

        There is no learned prior over code maps here, so pictures drawn from these have texture, not shape.
        """
        usage = self.code_usage.float().cpu()
        usage = torch.where(usage.sum() > 0, usage, torch.ones_like(usage))
        codes = torch.multinomial(usage, n * self.side**2, replacement=True, generator=generator)
        return codes.view(n, self.side, self.side).to(self.device)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.to_image(self.decode(self.lookup(self.sample_codes(n, generator))))
