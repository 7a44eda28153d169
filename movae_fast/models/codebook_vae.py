"""Define the base class of models whose latents are codes of a codebook or another quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from movae_fast.models.base import VAE, Noise, VQOutput
from movae_fast.models.bottleneck import Coded
from movae_fast.models.likelihoods import at_least_float32
from movae_fast.models.quantizers import QuantizerSettings, quantizer_objectives


class CodebookVAE(VAE):
    """Model images by discrete codes: the encoder's output is quantized, and the decoder reads the codewords.

    Subclasses set `settings` and `code_shape`, and define `encode` (which returns one feature z [B, D, ...]),
    `code`, `lookup`, `codebook_parameters` and `decode`. Their constructors call `count_codes`. The
    `objectives` depend on the quantizer.
    """

    objectives: tuple[str, ...] = ("reconstruction", "embedding", "commitment")
    beta_objective = "commitment"
    settings: QuantizerSettings
    code_shape: tuple[
        int, ...
    ]  # of an image's codes: the map, and behind it the codebooks where there are several
    code_usage: Tensor

    @classmethod
    def weighted_objectives(
        cls, options: Mapping[str, Any], image_shape: tuple[int, int, int]
    ) -> dict[str, float]:
        return quantizer_objectives(options)

    @classmethod
    def default_weights(cls, image_shape: tuple[int, int, int]) -> tuple[float, ...]:
        return tuple(cls.weighted_objectives({}, image_shape).values())

    def count_codes(self, code_sizes: tuple[int, ...]) -> None:
        """Register the buffer with a moving average of how often each code is chosen, from which `sample_codes`
        draws."""
        self.code_sizes = code_sizes
        self.num_embeddings = max(code_sizes)
        self.register_buffer("code_usage", torch.zeros(sum(code_sizes)))

    def code(self, z: Tensor, depth: Tensor | None = None) -> Coded:
        """Quantize z [B, D, ...]; if `depth` [B] is given, each image uses only its first `depth` codebooks."""
        raise NotImplementedError

    def lookup(self, index: Tensor) -> Tensor:
        """Return the codewords, shaped as z, of codes [B, *code_shape]."""
        raise NotImplementedError

    def codebook_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the embedding objective trains."""
        raise NotImplementedError

    @property
    def map_sides(self) -> tuple[int, ...]:
        """Return the side lengths of the feature maps that are quantized, one for each map of an image."""
        raise NotImplementedError

    @property
    def code_maps(self) -> tuple[tuple[int, int], ...]:
        """Return (side, number of codes) of each map of codes, in the order of `to_sequence`.

        A map of vectors has one map of codes for each codebook.
        """
        each = len(self.settings.code_sizes)
        return tuple((side, k) for side in self.map_sides for k in self.code_sizes[:each])

    def to_sequence(self, codes: Tensor) -> Tensor:  # [B, T] int64
        """Return codes [B, *code_shape] as one sequence per image: map after map, each map row by row."""
        spans = [side * side for side in self.map_sides]
        parts = codes.reshape(len(codes), sum(spans), -1).split(spans, 1)
        return torch.cat([part.transpose(1, 2).flatten(1) for part in parts], 1)

    def from_sequence(self, sequence: Tensor) -> Tensor:  # [B, *code_shape]
        """Return the codes [B, *code_shape] of sequences [B, T] that `to_sequence` made."""
        each = len(self.settings.code_sizes)
        parts = sequence.split([side * side * each for side in self.map_sides], 1)
        vectors = torch.cat([part.unflatten(1, (each, -1)).transpose(1, 2) for part in parts], 1)
        return vectors.reshape(len(sequence), *self.code_shape)

    def quantize(self, z: Tensor) -> Coded:
        """Quantize the encoder's output z with all codebooks; the result begins with the codewords and the
        codes."""
        return self.code(z)

    def draw_noise(self, n: int) -> Noise:
        if not self.settings.quantize_dropout:
            return super().draw_noise(n)
        depth = torch.randint(1, self.settings.num_quantizers + 1, (n,), device=self.device)
        return Noise(self.standard_normal(n, 0), dropout=depth)

    def forward_features(self, features: tuple[Tensor, ...], noise: Noise | None = None) -> VQOutput:
        (z,) = features
        depth = None
        if self.training and self.settings.quantize_dropout:
            depth = (self.draw_noise(len(z)) if noise is None else noise).dropout
        coded = self.code(z, depth)
        if self.training:
            self.code_usage.lerp_(coded.usage.to(self.code_usage), 0.01)
        return VQOutput(
            preactivation=at_least_float32(self.decode(coded.codewords)),
            embedding=coded.embedding,
            commitment=coded.commitment,
            codes=coded.codes,
            usage=coded.usage,
            entropy=coded.entropy,
        )

    def task_parameters(self) -> dict[str, list[nn.Parameter]]:
        task = {"reconstruction": [p for part in self.decoder_parts() for p in part.parameters()]}
        trained = self.codebook_parameters()
        return task | ({"embedding": trained} if trained else {})

    def reconstruct(self, x: Tensor, depth: int | None = None) -> Tensor:
        """Reconstruct images [B, C, S, S] from their codes; with `depth`, from those of the first `depth`
        codebooks only."""
        (z,) = self.encode(x)
        levels = None if depth is None else torch.full((len(x),), depth, device=z.device)
        return self.to_image(self.decode(self.code(z, levels).codewords))

    def sample_codes(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw codes [n, *code_shape] independently, each with the frequency with which training chose it
        lately.

        These frequencies are no prior over whole images, so images decoded from such codes have texture but no
        shape.
        """
        per_image = self.settings.num_quantizers * self.settings.num_groups
        places = torch.Size(self.code_shape).numel() // per_image
        drawn = []
        for usage, count in zip(self.usage_by_codebook(), self.places_by_codebook(places), strict=True):
            usage = usage.float().cpu()
            usage = torch.where(usage.sum() > 0, usage, torch.ones_like(usage))
            drawn.append(
                torch.multinomial(usage, n * count, replacement=True, generator=generator).view(n, count)
            )
        return self.arranged(drawn).view(n, *self.code_shape).to(self.device)

    def usage_by_codebook(self) -> tuple[Tensor, ...]:
        """Return the moving average of how often each code was chosen, [K] for each codebook."""
        return self.code_usage.split(list(self.code_sizes))

    def places_by_codebook(self, places: int) -> list[int]:
        """Return how many codes of an image come from each codebook, if the image has `places` feature
        vectors."""
        return [places] * len(self.code_sizes)

    def arranged(self, drawn: list[Tensor]) -> Tensor:
        """Combine codes that were drawn per codebook, [n, places] each, into the layout of an image's codes."""
        return torch.stack(drawn, -1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.to_image(self.decode(self.lookup(self.sample_codes(n, generator))))
