"""Draw images from a fitted prior: draw codes or latents, then decode them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from movae_fast.lazy import Later
from movae_fast.models import VAE
from movae_fast.names import ArgumentError
from movae_fast.priors.catalog import KINDS
from movae_fast.priors.choice import PLAIN, Choice
from movae_fast.priors.codes import images_of
from movae_fast.priors.config import PriorConfig

# Of each kind over codes: from (prior, n, generator, label [n] or None, choice) to codes [n, T].
DRAW_CODES = {
    "transformer": Later("movae_fast.priors.draw_codes:draw_n"),
    "maskgit": Later("movae_fast.priors.maskgit:draw_n"),
    "pixelcnn": Later("movae_fast.priors.pixelcnn:draw_n"),
}


def check_choice(config: PriorConfig, classes: int, label: int | None, choice: Choice) -> None:
    """Raise ArgumentError for settings of drawing (`choice`, `label`) that this kind of prior does not have.

    classes: number of labels that the prior was fitted with.
    """
    over_codes, conditional = KINDS[config.kind].latents == "codebook", bool(config.labels)
    if label is not None and not conditional:
        raise ArgumentError(f"label {label}: {config.folder} was fitted without labels; fit one with --labels")
    if label is not None and not 0 <= label < classes:
        raise ArgumentError(f"label {label}: the labels are 0 to {classes - 1}")
    if choice.guidance != 1 and (not conditional or label is None):
        needs = "give a --label" if conditional else f"{config.folder} was fitted without labels"
        raise ArgumentError(f"guidance {choice.guidance:g} goes from no label towards one: {needs}")
    if choice.order != PLAIN.order and config.kind != "maskgit":
        raise ArgumentError(
            f"order {choice.order}: {config.folder} is no maskgit, which alone has two orders; leave it out"
        )
    if choice.order_noise != PLAIN.order_noise and choice.order != "confidence":
        raise ArgumentError(f"order_noise {choice.order_noise:g} is for order confidence; leave it out")
    if not over_codes and (choice.top_k or choice.top_p < 1):
        raise ArgumentError(f"decoding: {config.folder} is over latents and draws no codes; leave it out")


@torch.no_grad()
def draw_from_prior(
    prior: nn.Module,
    kind: str,
    n: int,
    generator: torch.Generator,
    choice: Choice = PLAIN,
    label: int | None = None,
) -> Tensor:
    """Return what a prior draws for n images: codes [n, T] int64, or latents [n, D] float32.

    The random numbers come from the CPU, so that a seed gives the same codes on every device.
    """
    if KINDS[kind].latents == "codebook":
        known = None if label is None else torch.full((n,), label)
        codes: Tensor = DRAW_CODES[kind](prior, n, generator, known, choice)
        return codes
    z: Tensor = prior.sample(n, generator, choice.temperature)  # type: ignore[operator]
    return z.float()


@torch.no_grad()
def prior_images(
    model: VAE,
    prior: nn.Module,
    kind: str,
    n: int,
    batch_size: int,
    generator: torch.Generator,
    choice: Choice,
    label: int | None = None,
) -> Iterator[Tensor]:
    """Yield batches [B, C, S, S], in the model's range, of n images drawn from the prior."""
    for first in range(0, n, batch_size):
        drawn = draw_from_prior(prior, kind, min(batch_size, n - first), generator, choice, label)
        over_codes = KINDS[kind].latents == "codebook"
        yield images_of(model, drawn) if over_codes else model.to_image(model.decode(drawn))
