"""Use a trained model of images: `movae_fast.load` returns a `TrainedModel`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from movae_fast.api.weights_folder import export_weights, upload
from movae_fast.data import to_unit
from movae_fast.evaluation.sample_source import SampleSource, find_source
from movae_fast.evaluation.trained import rates_of
from movae_fast.models import LATENT_WORDS, NVAE, VAE, CodebookVAE, GaussianVAE
from movae_fast.names import ArgumentError
from movae_fast.training.config import TrainConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

Model = TypeVar("Model", bound="LoadedModel")
BATCH = 256  # images at a time; a call takes any number
TOLERANCE = 1e-3  # by which values may lie outside [0, 1], as resampling can leave them


class Quantized(NamedTuple):
    """Hold the codebook's choice for an encoder's output: vectors of the codebook, and their indices."""

    codewords: Tensor  # [N, *latent_shape], which the decoder reads
    indices: Tensor  # [N, *code_shape] int64, their numbers in the codebook


@dataclass
class LoadedModel:
    """Hold a trained network in evaluation mode, its configuration and the folder that it came from."""

    network: VAE
    config: TrainConfig
    folder: Path  # of the run, or of the exported files

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters; the methods move their inputs to it."""
        return self.network.device

    def to(self: Model, device: str | torch.device) -> Model:
        """Move the parameters to a device, and return the model."""
        self.network.to(device)
        return self

    @property
    def beta(self) -> float | None:
        """Return the beta that a multi-rate model is set to; None for a model that is not multi-rate."""
        rates = self.network.rates
        return None if rates is None else float(rates.evaluated.exp().mean())

    def set_beta(self: Model, beta: float) -> Model:
        """Set a multi-rate model to a beta, at which it computes from then on, and return the model.

        A beta outside the range of training is allowed, and extrapolates. Raises ArgumentError for a model that
        is not multi-rate, and for a beta that is not positive and finite.
        """
        rates_of(self.config, self.network, "beta")
        if not 0 < beta < float("inf"):
            raise ArgumentError(f"beta {beta:g} must be above 0 and finite")
        self.network.set_beta(beta)
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write model.safetensors, config.json and a model card README.md into a folder, and return it.

        `movae_fast.load` and every command that takes a RUN take the folder. Raises ArgumentError for a folder
        that is not empty.
        """
        return export_weights(self, Path(folder))

    def push_to_hub(self, repository: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to huggingface.co/<repository>, and return its address.

        repository: "owner/name"; it is made if it does not exist. private: whether a new one is private. token:
        an access token of huggingface.co; None takes the one that `hf auth login` stored. Raises ArgumentError
        if the extra `hub` is not installed.
        """
        return upload(self, repository, private, token)

    def __repr__(self) -> str:
        arch, dataset = self.config.model.arch, self.config.data.dataset
        size = sum(p.numel() for p in self.network.parameters())
        return f"{type(self).__name__}({arch} on {dataset}, {size:,} parameters, {self.folder})"


class TrainedModel(LoadedModel):
    """Encode, decode and sample images with a trained model, in evaluation mode and without gradients.

    Images [N, C, S, S] are returned as float32 in [0, 1]; those that are given may also be uint8, and may be
    NumPy arrays. N may be any number: the model computes a batch at a time. For gradients, or for training, use
    `model.network`.

    `encode` returns latents, and `decode(encode(x))` equals `reconstruct(x)` for every model. The latents are

    - of a model with a Gaussian posterior: the means [N, D];
    - of a model with a codebook: the encoder's output before quantization, [N, D, h, w], or [N, D, vectors] of
      a model with two maps of codes; `decode` quantizes it;
    - of a hierarchy: [N, D], each group's posterior mean as its distance from the prior's mean in the prior's
      standard deviations, so that draws from the prior are standard normal.
    """

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return [C, S, S], the shape of one image."""
        return self.network.image_shape

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of one image's latents: [D], or with a codebook [D, h, w] or [D, vectors]."""
        if not isinstance(self.network, CodebookVAE):
            return (self.network.latent_dim,)
        with torch.no_grad():
            (z,) = self.network.encode(torch.zeros(1, *self.image_shape, device=self.device))
        return tuple(z.shape[1:])

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Return the shape of one image's codes: [h, w]; [h, w, codebooks] if each place has several codes;
        [vectors] for a model with two maps of codes. Raises ArgumentError for a model without a codebook."""
        return self._codebook("code_shape").code_shape

    def encode(self, images: Tensor | NDArray[np.generic]) -> Tensor:
        """Return the latents of images [N, C, S, S]: [N, *latent_shape], float32, on the model's device."""
        return self._map(self._encoded, self._images(images))

    def posterior(self, images: Tensor | NDArray[np.generic]) -> tuple[Tensor, Tensor]:
        """Return the mean and the log-variance [N, D] of each image's posterior.

        Raises ArgumentError for a model whose posterior is no vector of Gaussians.
        """
        network = self.network
        if not isinstance(network, GaussianVAE):
            raise ArgumentError(f"posterior: {self._arch} has {LATENT_WORDS[network.latents]}; use encode")
        pairs = self._map(lambda x: torch.stack(network.encode(x), 1), self._images(images))
        return pairs[:, 0], pairs[:, 1]

    def decode(self, latents: Tensor | NDArray[np.generic]) -> Tensor:
        """Return the images [N, C, S, S] in [0, 1] decoded from latents [N, *latent_shape]; a model with a
        codebook quantizes the latents first."""
        return self._map(self._decoded, self._latents(latents))

    def reconstruct(self, images: Tensor | NDArray[np.generic]) -> Tensor:
        """Return the reconstructions [N, C, S, S] in [0, 1] of images, encoded and decoded without noise."""
        return self._map(lambda x: self._unit(self.network.reconstruct(x)), self._images(images))

    @torch.no_grad()
    def sample(self, n: int, seed: int | None = None, temperature: float = 1.0, prior: str = "auto") -> Tensor:
        """Return n images [n, C, S, S] in [0, 1] drawn from the prior that `sampled_from` names.

        seed: gives the same images again, on every device up to rounding; None draws others each time.
        temperature: what the prior's standard deviation (a hierarchy's: of each group's prior) is multiplied
            by, and the logits of a fitted prior over codes are divided by. A codebook without a fitted prior,
            whose codes are drawn by how often training chose them, has none.
        prior: "auto" is the prior that `movae prior` fitted to the run last, and the model's own where there is
            none; or a fitted prior's name, or "none" for the model's own.

        Raises ArgumentError for an unknown prior, and for one that was fitted to other weights.
        """
        if n < 1:
            raise ArgumentError(f"n {n} must be at least 1")
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        parts = self._source(prior).images_at(temperature, n, BATCH, generator)
        return torch.cat([self._unit(part) for part in parts])

    def sampled_from(self, prior: str = "auto") -> str:
        """Return in one sentence what `sample` draws from, with the file of a fitted prior."""
        return self._source(prior).sentence

    @torch.no_grad()
    def quantize(self, latents: Tensor | NDArray[np.generic]) -> Quantized:
        """Return the vectors of the codebook chosen for latents [N, *latent_shape], with their indices.

        Raises ArgumentError for a model without a codebook.
        """
        network = self._codebook("quantize")
        parts = [network.quantize(z) for z in self._latents(latents).split(BATCH)]
        return Quantized(torch.cat([p.codewords for p in parts]), torch.cat([p.codes for p in parts]))

    def indices_to_image(self, indices: Tensor | NDArray[np.generic]) -> Tensor:
        """Return the images [N, C, S, S] in [0, 1] decoded from indices of codes [N, *code_shape].

        Raises ArgumentError for a model without a codebook, and for an index beyond the codebook.
        """
        network = self._codebook("indices_to_image")
        index = torch.as_tensor(indices).to(self.device, torch.int64)
        codes = network.num_embeddings
        if index.dim() != 1 + len(network.code_shape) or tuple(index.shape[1:]) != network.code_shape:
            shape = ", ".join(map(str, network.code_shape))
            raise ArgumentError(f"indices {list(index.shape)}: expected [N, {shape}]")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < codes:
            raise ArgumentError(
                f"indices from {int(index.min())} to {int(index.max())}: the codebook has 0 to {codes - 1}"
            )
        return self._map(lambda i: self._unit(network.to_image(network.decode(network.lookup(i)))), index)

    @property
    def _arch(self) -> str:
        return self.config.model.arch

    def _source(self, prior: str) -> SampleSource:
        return find_source(self.folder, self.config, self.network, prior)

    def _codebook(self, name: str) -> CodebookVAE:
        if not isinstance(self.network, CodebookVAE):
            has = LATENT_WORDS[self.network.latents]
            raise ArgumentError(f"{name} needs a model with a codebook; {self._arch} has {has}")
        return self.network

    def _encoded(self, x: Tensor) -> Tensor:
        if isinstance(self.network, NVAE):
            return self.network.latents_of(self.network.encode(x))
        return self.network.encode(x)[0]

    def _decoded(self, z: Tensor) -> Tensor:
        if isinstance(self.network, CodebookVAE):
            z = self.network.quantize(z)[0]
        return self._unit(self.network.to_image(self.network.decode(z)))

    def _unit(self, x: Tensor) -> Tensor:
        return to_unit(x, self.config.data.normalize)

    @torch.no_grad()
    def _map(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([function(part) for part in x.split(BATCH)]).contiguous()

    def _images(self, images: Tensor | NDArray[np.generic]) -> Tensor:
        """Return images in the network's dtype, range and bit depth, on its device. Raises ArgumentError for a
        wrong shape, dtype or range."""
        x = torch.as_tensor(images).to(self.device)
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_shape or not len(x):
            shape = ", ".join(map(str, self.image_shape))
            one = " (of one image, give image[None])" if tuple(x.shape) == self.image_shape else ""
            raise ArgumentError(f"images {list(x.shape)}: expected [N, {shape}]{one}")
        if x.dtype == torch.uint8:
            x = x.float() / 255
        elif not x.is_floating_point():
            raise ArgumentError(f"images of {str(x.dtype)[6:]}: give uint8, or floats in [0, 1]")
        low, high = float(x.min()), float(x.max())
        if not -TOLERANCE <= low <= high <= 1 + TOLERANCE:  # not NaN either
            raise ArgumentError(f"images from {low:g} to {high:g}: give values in [0, 1], or uint8 of 0 to 255")
        x = x.float()
        if (bits := self.config.data.bits) < 8:  # as training made them
            levels = 2**bits - 1
            x = (x * 255).round().div(2 ** (8 - bits), rounding_mode="floor") / levels
        return 2 * x - 1 if self.config.data.normalize else x

    def _latents(self, latents: Tensor | NDArray[np.generic]) -> Tensor:
        z = torch.as_tensor(latents).to(self.device)
        if z.dim() != 1 + len(self.latent_shape) or tuple(z.shape[1:]) != self.latent_shape or not len(z):
            shape = ", ".join(map(str, self.latent_shape))
            raise ArgumentError(f"latents {list(z.shape)}: expected [N, {shape}]")
        return z.to(next(self.network.parameters()).dtype)
