"""Generate `lstm_text`: sequences drawn, from a seed, from a random LSTM with a two-dimensional latent.

This is the synthetic corpus of He et al. 2019 (lagging inference networks): z from a mixture of four equally
likely N((±2, ±2), I), a uniformly drawn first word, then ancestral sampling. The generating network is known,
so the true likelihood of the words can be computed (`evaluation.text_oracle`). A sequence's label is the
mixture component of its z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from movae_fast.data.text.corpus import Corpus
from movae_fast.data.text.source import TextOptions, TextSource
from movae_fast.data.text.vocabulary import SPECIALS, Vocabulary
from movae_fast.names import ArgumentError

SIZES = {"train": 16_000, "valid": 2_000, "test": 2_000}
CENTRES = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]], dtype=torch.float64)
LENGTH = 10  # words of each sequence
AT_ONCE = 500  # sequences whose probabilities over all words exist at once


@dataclass(frozen=True)
class TextNetwork:
    """Hold the network that generates the corpus, in float64: an LSTM whose logits are linear in its output and
    in z.

    Its input is a word's embedding followed by z. Its first cell is linear in z, and its first output the tanh
    of that.
    """

    embedding: Tensor  # [V, E]
    of_input: Tensor  # [4 H, E + 2], gates in torch's order: input, forget, cell, output
    of_output: Tensor  # [4 H, H]
    bias: Tensor  # [4 H]
    first_cell: Tensor  # [H, 2]
    projection: Tensor  # [V, H]
    latent_projection: Tensor  # [V, 2]

    @property
    def words(self) -> int:
        return len(self.embedding)

    def start(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the initial output and cell [B, H] for latents z [B, 2], and the constant that z adds to the
        gates [B, 4 H] at every step."""
        cell = z @ self.first_cell.T
        return cell.tanh(), cell, z @ self.of_input[:, -2:].T + self.bias

    def step(self, words: Tensor, h: Tensor, c: Tensor, of_z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and the cell [B, H] after reading one more word of each sequence, [B], or the same
        one for all, [1]."""
        read = self.embedding[words] @ self.of_input[:, :-2].T
        i, f, g, o = (read + h @ self.of_output.T + of_z).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def log_likelihood(
        self,
        words: Tensor,  # [T] int64
        z: Tensor,  # [B, 2]
    ) -> Tensor:  # [B]
        """Return log p(words | z) of one sequence in nats, for each z."""
        h, c, of_z = self.start(z)
        of_latent = z @ self.latent_projection.T
        total = z.new_full((len(z),), -math.log(self.words))
        for at in range(len(words) - 1):
            h, c = self.step(words[at : at + 1], h, c, of_z)
            logits = torch.addmm(of_latent, h, self.projection.T)
            total = total + logits[:, words[at + 1]] - logits.logsumexp(1)
        return total

    def to(self, dtype: torch.dtype) -> TextNetwork:
        """Return a copy of the network with its parameters in another dtype."""
        return TextNetwork(**{name: value.to(dtype) for name, value in vars(self).items()})


def random_network(generator: torch.Generator, words: int = 1000, hidden: int = 100) -> TextNetwork:
    """Return a network with random parameters: from U(-1, 1), those from z to the logits from U(-5, 5)."""

    def uniform(*shape: int, bound: float = 1.0) -> Tensor:
        return (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1) * bound

    return TextNetwork(
        embedding=uniform(words, hidden),
        of_input=uniform(4 * hidden, hidden + 2),
        of_output=uniform(4 * hidden, hidden),
        bias=uniform(4 * hidden) + uniform(4 * hidden),
        first_cell=uniform(hidden, 2),
        projection=uniform(words, hidden),
        latent_projection=uniform(words, 2, bound=5.0),
    )


def generating_network(seed: int = 0) -> TextNetwork:
    """Return the network that the corpus of this seed is drawn from."""
    return random_network(torch.Generator().manual_seed(seed))


def log_prior(z: Tensor) -> Tensor:  # [B, 2] -> [B]
    """Return the log density of the mixture of four components at z, in nats."""
    distances = (z[:, None] - CENTRES.to(z)).square().sum(2)
    return torch.logsumexp(-0.5 * distances, 1) - math.log(2 * math.pi * len(CENTRES))


def draw(
    network: TextNetwork, n: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:  # [n, length] int64, [n] int64, [n, 2]
    """Draw n sequences of words; return them with the mixture components of their latents, and the latents.

    Words are drawn by comparing a uniform number with the cumulative probabilities in float64, so that other
    machines draw the same ones.
    """
    component = torch.randint(len(CENTRES), (n,), generator=generator)
    z = CENTRES[component] + torch.randn(n, 2, generator=generator, dtype=torch.float64)
    words = torch.empty(n, length, dtype=torch.int64)
    words[:, 0] = torch.randint(network.words, (n,), generator=generator)
    h, c, of_z = network.start(z)
    for at in range(1, length):
        h, c = network.step(words[:, at - 1], h, c, of_z)
        passed = torch.rand(n, 1, generator=generator, dtype=torch.float64)
        for some in torch.arange(n).split(AT_ONCE):
            logits = h[some] @ network.projection.T + z[some] @ network.latent_projection.T
            below = logits.softmax(1).cumsum(1) < passed[some]
            words[some, at] = below.sum(1).clamp_max(network.words - 1)
    return words, component, z


def read_lstm_text(options: TextOptions) -> Corpus:
    """Return the corpus: 16,000 + 2,000 + 2,000 generated sequences of 10 words, out of 1,000; labels are the
    components.

    Raises ArgumentError for options that do not apply.
    """
    if options.max_length and options.max_length < LENGTH:
        raise ArgumentError(
            f"max_length {options.max_length}: all sequences of lstm_text have {LENGTH} words; leave it out"
        )
    if options.label_column is not None:
        raise ArgumentError("label_column: lstm_text is generated and has labels of its own; leave it out")
    generator = torch.Generator().manual_seed(options.seed)
    network = random_network(generator)
    words, component, _ = draw(network, sum(SIZES.values()), LENGTH, generator)
    vocabulary = Vocabulary((*SPECIALS, *(f"w{i:03d}" for i in range(network.words))))
    names = [f"{x:+.0f},{y:+.0f}" for x, y in CENTRES.tolist()]
    sources, at = {}, 0
    for split, n in SIZES.items():
        tokens = (words[at : at + n] + len(SPECIALS)).int().reshape(-1)
        offsets = torch.arange(n + 1) * LENGTH
        sources[split] = TextSource(tokens, offsets, vocabulary, component[at : at + n], names)
        at += n
    return Corpus(**sources)
