"""Print what a text model makes (samples, interpolations, reconstructions), and write it to a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from movae_fast.api.sentence_model import vocabulary_beside
from movae_fast.data.text import limited_text
from movae_fast.evaluation.text_decoding import (
    Decoded,
    Decoding,
    decode,
    reconstructions,
    sample_sentences,
    side_by_side,
)
from movae_fast.files import free_path
from movae_fast.models import LSTMVAE
from movae_fast.names import shown
from movae_fast.plots import latent_scatter
from movae_fast.training.build import make_text_loader
from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import validate
from movae_fast.training.device import resolve_device
from movae_fast.training.run_folder import folder_of


class Sentences:
    """Hold one call of `movae sample` on a text model: the model, its vocabulary, how words are chosen, and how
    many."""

    def __init__(
        self,
        model: LSTMVAE,
        trained: TrainConfig,
        weights: Path,
        how: Decoding,
        generator: torch.Generator,
        n: int,
        steps: int,
    ) -> None:
        self.model, self.trained, self.how, self.generator = model, trained, how, generator
        self.n, self.steps = n, steps
        self.vocabulary = vocabulary_beside(folder_of(weights), trained)

    def text(self, decoded: Decoded) -> str:
        """Return a decoded sentence as text."""
        return self.vocabulary.decode(decoded.words)

    def test_sentences(self) -> tuple[Tensor, Tensor]:
        """Return n evenly spaced test sentences as token ids [n, T], and their labels."""
        validate(self.trained)  # which sees that the corpus is still the run's
        loader = make_text_loader(self.trained, resolve_device(self.trained.run.device), "test")
        source = limited_text(loader.source, self.n)
        tokens, labels = source.gather(torch.arange(min(self.n, len(source))))
        return tokens.to(self.model.device), labels


def sample(job: Sentences) -> list[str]:
    """Return n sentences decoded from draws of the prior."""
    return [job.text(one) for one in sample_sentences(job.model, job.n, job.how, job.generator)]


def interpolate(job: Sentences) -> list[str]:
    """Return the sentences decoded on the way between two draws of the prior, for n pairs with a blank line in
    between."""
    first, second = job.model.sample_latents(2 * job.n, job.generator).chunk(2)
    lines = []
    for one, other in zip(first, second, strict=True):
        at = torch.linspace(0, 1, job.steps, device=one.device)[:, None]
        decoded = decode(job.model, one + at * (other - one), job.how, job.generator)
        lines += [*(job.text(d) for d in decoded), ""]
    return lines[:-1]


def reconstruct(job: Sentences) -> list[str]:
    """Return lines with a test sentence and, beside it, the sentence decoded from its posterior mean."""
    tokens, _ = job.test_sentences()
    decoded = reconstructions(job.model, tokens, job.how, job.generator)
    originals = [job.vocabulary.decode(row) for row in tokens.tolist()]
    return side_by_side([(a, job.text(b)) for a, b in zip(originals, decoded, strict=True)])


MODES: dict[str, Callable[[Sentences], list[str]]] = {
    "sample": sample,
    "interpolate": interpolate,
    "reconstruct": reconstruct,
}


def write(job: Sentences, mode: str, folder: Path) -> list[Path]:
    """Print the sentences of a mode and write them to a new file in `folder`; return the paths of the files.

    The mode visualize_latent writes a scatter plot instead. Raises ValueError for a mode that text does not
    have.
    """
    if mode == "visualize_latent":
        if job.model.latent_dim != 2:
            raise ValueError(
                f"--mode visualize_latent draws models with two latents (--latent_dim 2); this has "
                f"{job.model.latent_dim}"
            )
        tokens, labels = job.test_sentences()
        return [latent_scatter(free_path(folder / "latent", ".png"), job.model.encode(tokens)[0], labels)]
    if mode not in MODES:
        raise ValueError(f"--mode {mode} is for images; on text there are {', '.join(MODES)}, visualize_latent")
    lines = [shown(line) for line in MODES[mode](job)]
    print("\n".join(lines))
    path = free_path(folder / mode, ".txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [path]
