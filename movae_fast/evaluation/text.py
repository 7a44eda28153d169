"""Measure a model of sentences: bounds on log p(x), perplexity, rate, mutual information, active units.

All in evaluation mode and in nats per sentence, counting </s> but not <s>; the perplexity is per token. The
functions take the model and tokens [B, T] as a loader gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from movae_fast.models.lstm_vae import LSTMVAE, PAD
from movae_fast.objectives import kl_of_latents
from movae_fast.reference import gaussian_log_density
from movae_fast.training.evaluate import ACTIVE_VARIANCE, mutual_information

LogPrior = Callable[[Tensor], Tensor]  # z [K, D] -> log p(z) [K] in nats


@dataclass(frozen=True)
class TextMetrics:
    """Hold the metrics of a split, in nats per sentence unless stated otherwise."""

    distortion: float  # E_q[-log p(x|z)], one z per sentence
    rate: float  # the KL from the posterior to the prior
    negative_elbo: float
    perplexity: float  # per token, of the bound
    mutual_information: float  # of x and z, estimated within each batch: at most log of `mi_batch`
    mi_batch: float  # the mean number of sentences per batch that the estimate has seen
    active_units: int
    sentences: int
    tokens: int  # predicted: words and </s>


@torch.no_grad()
def measure_text(model: LSTMVAE, batches: Iterable[tuple[Tensor, Tensor]], seed: int = 0) -> TextMetrics:
    """Return the metrics over the batches (tokens [B, T], labels [B])."""
    generator = torch.Generator().manual_seed(seed)
    distortion = rate = information = 0.0
    sentences = tokens = count = 0
    means = []
    for x, _ in batches:
        mu, logvar = (v.double() for v in model.encode(x))
        z = mu + torch.exp(0.5 * logvar) * normal(mu.shape, generator).to(mu)
        distortion += float(model.sentence_losses(z.to(dtype_of(model)), x).double().sum())
        rate += float(kl_of_latents(mu, logvar).sum())
        information += len(x) * float(mutual_information(mu, logvar, z))
        means.append(mu)
        sentences, tokens, count = sentences + len(x), tokens + predicted(x), count + 1
    if not sentences:
        raise ValueError("batches: there is no sentence to measure")
    bound = distortion + rate
    return TextMetrics(
        distortion=distortion / sentences,
        rate=rate / sentences,
        negative_elbo=bound / sentences,
        perplexity=math.exp(bound / tokens),
        mutual_information=information / sentences,
        mi_batch=sentences / count,
        active_units=active_units(torch.cat(means)),
        sentences=sentences,
        tokens=tokens,
    )


def active_units(means: Tensor) -> int:  # [N, D]
    """Return the number of latents whose posterior mean has a variance over the data of at least 0.01."""
    return int((means.double().var(0, unbiased=False) >= ACTIVE_VARIANCE).sum())


@torch.no_grad()
def importance_weighted_nll(
    model: LSTMVAE,
    batches: Iterable[tuple[Tensor, Tensor]],
    draws: int = 500,
    seed: int = 0,
    at_once: int = 100,
    log_prior: LogPrior | None = None,
) -> tuple[Tensor, int]:  # [N] float64, in nats
    """Return -log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x) of each sentence with K `draws`, and the number of
    predicted tokens.

    In expectation it is an upper bound on -log p(x), which falls with K (Burda et al. 2016). At most `at_once`
    latents of one sentence are decoded at a time. `log_prior` replaces the prior N(0, I). The perplexity is
    `perplexity(nll.sum(), tokens)`.
    """
    generator = torch.Generator().manual_seed(seed)
    log_prior = log_prior or model.log_prior()
    bounds, tokens = [], 0
    for batch, _ in batches:
        tokens += predicted(batch)
        for x in batch.split(1):
            x = x[:, : int((x != PAD).sum())]  # nothing of the batch's padding is decoded
            mu, logvar = (v.double() for v in model.encode(x))
            weights = []
            # Drawn at once: a draw in parts gives other numbers.
            for noise in normal((draws, mu.shape[1]), generator).to(mu).split(at_once):
                z = mu + torch.exp(0.5 * logvar) * noise
                posterior = gaussian_log_density(z, mu.expand_as(z), logvar.expand_as(z)).sum(1)
                losses = model.sentence_losses(z.to(dtype_of(model)), x.expand(len(z), -1)).double()
                weights.append(log_prior(z) - posterior - losses)
            bounds.append(math.log(draws) - torch.cat(weights).logsumexp(0))
    return torch.stack(bounds), tokens


def perplexity(nats: float | Tensor, tokens: int) -> float:
    """Return exp of the nats per predicted token, given a split's sum of nats and number of tokens."""
    return math.exp(float(nats) / tokens)


def predicted(tokens: Tensor) -> int:  # [B, T]
    """Return the number of tokens that a model predicts: all but <s> and padding."""
    return int((tokens[:, 1:] != PAD).sum())


def normal(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    """Draw standard normal numbers on the CPU in float64, so that a seed gives the same numbers on every
    machine."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def dtype_of(model: LSTMVAE) -> torch.dtype:
    """Return the dtype of the model's parameters."""
    return model.decoder.projection.weight.dtype
