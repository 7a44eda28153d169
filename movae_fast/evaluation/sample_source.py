"""Decide what a trained model's samples are drawn from, a fitted prior or the model's own, and draw them.

Every command, page and Python call that draws samples does it by `find_source`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from movae_fast.evaluation.sampling import check_temperature, draw_images
from movae_fast.models import VAE, CodebookVAE
from movae_fast.names import ArgumentError, shown
from movae_fast.priors.base import find_prior, load_prior
from movae_fast.priors.choice import PLAIN, Choice
from movae_fast.priors.config import PriorConfig
from movae_fast.priors.sampling import check_choice, draw_from_prior, prior_images
from movae_fast.training.config import TrainConfig


@dataclass(frozen=True)
class FittedPrior:
    """Hold a prior that was fitted to a trained model: its file, its settings and itself."""

    path: Path
    config: PriorConfig
    module: nn.Module


@dataclass(frozen=True)
class SampleSource:
    """Hold what a model's samples are drawn from: a fitted prior, or without one the model's own."""

    model: VAE
    fitted: FittedPrior | None = None

    @property
    def is_prior(self) -> bool:
        """Return whether samples come from a distribution of whole images; codes without a fitted prior are
        drawn independently of each other."""
        return self.fitted is not None or self.model.latents != "codebook"

    @property
    def name(self) -> str:
        """Return what samples are drawn from, in the words of a caption."""
        if self.fitted is not None:
            return f"the {self.fitted.config.kind} prior"
        return "the prior" if self.is_prior else "codes drawn without a prior"

    @property
    def sentence(self) -> str:
        """Return what samples are drawn from, with the prior's file, in one line for a user."""
        if self.fitted is not None:
            return f"drawn from the prior {shown(self.fitted.path)}"
        if not self.is_prior:
            how = "movae prior RUN --kind transformer fits one"
            return f"codes are drawn without a prior, each by its usage ({how})"
        return f"drawn from {self.model.prior_words}"

    def check(self, choice: Choice = PLAIN, label: int | None = None) -> None:
        """Raise ArgumentError for a choice or a label that the source does not have."""
        if self.fitted is not None:
            classes = self.fitted.module.classes
            assert isinstance(classes, int)
            check_choice(self.fitted.config, classes, label, choice)
            return
        if label is not None:
            raise ArgumentError(f"label {label} is for a fitted prior; leave it out")
        if choice.guidance != 1:
            raise ArgumentError(f"guidance {choice.guidance:g} is for a fitted prior; leave it out")
        if choice.order != PLAIN.order or choice.order_noise != PLAIN.order_noise:
            raise ArgumentError(f"order {choice.order} is for a fitted prior of kind maskgit; leave it out")
        check_temperature(self.model, choice.temperature)

    def images(
        self,
        n: int,
        batch_size: int,
        generator: torch.Generator,
        choice: Choice = PLAIN,
        label: int | None = None,
    ) -> Iterator[Tensor]:
        """Yield batches [B, C, S, S], in the model's range, of n images, drawn batch_size at a time.

        choice: temperature, and of a prior over codes truncation, guidance and order. Raises ArgumentError as
        `check` does.
        """
        self.check(choice, label)
        if self.fitted is not None:
            prior, kind = self.fitted.module, self.fitted.config.kind
            yield from prior_images(self.model, prior, kind, n, batch_size, generator, choice, label)
            return
        for first in range(0, n, batch_size):
            yield draw_images(self.model, min(batch_size, n - first), generator, choice.temperature)

    def images_at(
        self, temperature: float, n: int, batch_size: int, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """Yield images as `images` does, with a temperature and no other choice."""
        return self.images(n, batch_size, generator, Choice(temperature))

    def latents(self, n: int, generator: torch.Generator) -> Tensor:  # [n, D]
        """Return n draws of the latents of a model that has a vector or a hierarchy of them."""
        if self.fitted is not None:
            drawn = draw_from_prior(self.fitted.module, self.fitted.config.kind, n, generator)
            return drawn.to(self.model.device)
        return self.model.sample_latents(n, generator)

    def codes(self, n: int, generator: torch.Generator) -> Tensor:  # [n, *code_shape] int64
        """Return the codes of n images of a model with codes."""
        assert isinstance(self.model, CodebookVAE)
        if self.fitted is not None:
            drawn = draw_from_prior(self.fitted.module, self.fitted.config.kind, n, generator)
            return self.model.from_sequence(drawn)
        return self.model.sample_codes(n, generator)


def find_source(run: Path, trained: TrainConfig, model: VAE, prior: str = "auto") -> SampleSource:
    """Return what samples of a model of images are drawn from.

    run: the folder that a prior was fitted in; prior: the name of a fitted prior, "auto" for the one that was
    fitted last (the model's own where there is none), or "none" for the model's own. Raises ArgumentError for
    an unknown name, and for a prior that was fitted to other weights or codes of another grid.
    """
    if model.latents == "hierarchy":
        if prior not in ("auto", "none"):
            raise ArgumentError(f"prior {prior}: a hierarchy of latents has priors of its own; leave it out")
        return SampleSource(model)
    path = find_prior(run, prior)
    if path is None:
        return SampleSource(model)
    return SampleSource(model, FittedPrior(path, *load_prior(path, trained, model)))
