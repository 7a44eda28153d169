"""Use a trained model of sentences: `movae_fast.load` returns a `SentenceModel`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from movae_fast.api.trained_model import BATCH, LoadedModel
from movae_fast.choices import BEGIN, END, PAD
from movae_fast.data.text import Vocabulary
from movae_fast.evaluation.text_decoding import Decoding, decode
from movae_fast.models import LSTMVAE
from movae_fast.names import ArgumentError, shown
from movae_fast.training.config import TrainConfig


def vocabulary_beside(folder: Path, config: TrainConfig) -> Vocabulary:
    """Return the vocabulary in a run's folder (vocab.txt). Raises ValueError if it is missing or its size is
    not the model's."""
    path = folder / "vocab.txt"
    if not path.is_file():
        raise ValueError(f"{shown(path)}, the words of the model's ids, is missing: put the run's file there")
    vocabulary = Vocabulary.read(path)
    if len(vocabulary) != config.corpus.vocabulary_size:
        raise ValueError(
            f"{shown(path)} has {len(vocabulary):,} words, the model {config.corpus.vocabulary_size:,}: it is "
            "another run's"
        )
    return vocabulary


@dataclass(repr=False)
class SentenceModel(LoadedModel):
    """Encode, decode and sample sentences with a trained model, in evaluation mode and without gradients.

    A sentence is a text of words with blanks between them; a word that is not in the vocabulary is read as
    `<unk>`. Latents [N, D] are the means of the sentences' posteriors.
    """

    vocabulary: Vocabulary

    @property
    def latent_shape(self) -> tuple[int]:
        """Return [D], the shape of one sentence's latents."""
        return (self._lstm.latent_dim,)

    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Return the posteriors' means [N, D] of sentences, float32, on the model's device."""
        return self.posterior(sentences)[0]

    @torch.no_grad()
    def posterior(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the mean and the log-variance [N, D] of each sentence's posterior."""
        if isinstance(sentences, str) or not sentences:
            raise ArgumentError("sentences: give a list of texts with one at least")
        parts = [sentences[i : i + BATCH] for i in range(0, len(sentences), BATCH)]
        pairs = [self._lstm.encode(self._tokens(part)) for part in parts]
        mu, logvar = (torch.cat([pair[k] for pair in pairs]) for k in (0, 1))
        return mu, logvar

    def decode(self, latents: Tensor, how: Decoding | None = None, seed: int | None = None) -> list[str]:
        """Return one sentence for each of the latents [N, D].

        how: the method of decoding, with its settings; None takes the most probable word at each place. seed:
        makes a method that draws words repeatable; with None each call draws other words. Raises ArgumentError
        for latents of another shape.
        """
        z = torch.as_tensor(latents).to(self.device)
        if z.dim() != 2 or tuple(z.shape[1:]) != self.latent_shape or not len(z):
            raise ArgumentError(f"latents {list(z.shape)}: expected [N, {self.latent_shape[0]}]")
        z, generator = z.to(next(self.network.parameters()).dtype), self._generator(seed)
        decoded = [decode(self._lstm, part, how or Decoding(), generator) for part in z.split(BATCH)]
        return [self.vocabulary.decode(one.words) for part in decoded for one in part]

    def reconstruct(self, sentences: Sequence[str], how: Decoding | None = None) -> list[str]:
        """Return for each sentence the one that is decoded from its posterior's mean, by the method `how`."""
        return self.decode(self.encode(sentences), how)

    def sample(self, n: int, seed: int | None = None, how: Decoding | None = None) -> list[str]:
        """Return n sentences decoded from latents that are drawn from the prior.

        seed: gives the same sentences again; with None each call draws others. how: as in `decode`.
        """
        if n < 1:
            raise ArgumentError(f"n {n} must be at least 1")
        return self.decode(self._lstm.sample_latents(n, self._generator(seed)), how, seed)

    @property
    def _lstm(self) -> LSTMVAE:
        assert isinstance(self.network, LSTMVAE)
        return self.network

    def _tokens(self, sentences: Sequence[str]) -> Tensor:  # [N, T] int64
        rows = [[BEGIN, *self.vocabulary.encode(text.split()), END] for text in sentences]
        longest = max(map(len, rows))
        return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows], device=self.device)

    @staticmethod
    def _generator(seed: int | None) -> torch.Generator:
        generator = torch.Generator()
        if seed is None:
            generator.seed()
            return generator
        return generator.manual_seed(seed)
