"""Measure the rate, the distortion and bounds on log p(x) of a trained model.

All in nats per image, in evaluation mode. Up to a constant the reconstruction objective is -log p(x|z) of a
likelihood: Bernoulli; a Gaussian of variance 1/2 for the squared error; a Laplacian of scale 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from movae_fast.models import GaussianVAE
from movae_fast.objectives import ReconsDist, kl_of_latents, pixel_errors
from movae_fast.reference import gaussian_log_density

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016: a unit is active if the variance of its mean over data exceeds it


def log_likelihood(
    preactivation: Tensor,  # [B, C, H, W]
    x: Tensor,  # [B, C, H, W]
    activation: str,
    dist: ReconsDist,
) -> Tensor:  # [B] float64
    """Return log p(x|z) in nats per image, its constants included."""
    return -summed_error(preactivation, x, activation, dist) - likelihood_constant(dist, x[0].numel())


def summed_error(
    preactivation: Tensor,  # [B, C, H, W]
    x: Tensor,  # [B, C, H, W]
    activation: str,
    dist: ReconsDist,
) -> Tensor:  # [B] float64
    """Return each image's reconstruction objective, summed over its values: -log p(x|z) less the constant."""
    return pixel_errors(preactivation.double(), x.double(), activation, dist).flatten(1).sum(1)


def likelihood_constant(dist: ReconsDist, values: int) -> float:
    """Return what -log p(x|z) of an image of so many values has besides the summed error, in nats."""
    return values * {"bernoulli": 0.0, "gaussian": 0.5 * math.log(math.pi), "laplacian": math.log(2)}[dist]


@torch.no_grad()
def elbo(
    model: GaussianVAE, batches: Iterable[tuple[Tensor, Tensor]], dist: ReconsDist, seed: int
) -> tuple[dict[str, float], Tensor]:
    """Return rate, distortion, ELBO and active units over the batches, and the rate of each latent [D]."""
    generator = torch.Generator().manual_seed(seed)
    distortion, count = 0.0, 0
    rates: Tensor | None = None
    means: list[Tensor] = []
    for x, _ in batches:
        mu, logvar = (v.double() for v in model.encode(x))
        noise = torch.randn(mu.shape, generator=generator).to(mu)
        z = mu + torch.exp(0.5 * logvar) * noise
        distortion -= float(log_likelihood(model.decode(z.to(x)), x, model.activation, dist).sum())
        part = kl_of_latents(mu, logvar).sum(0)
        rates = part if rates is None else rates + part
        means.append(mu)
        count += len(x)
    assert rates is not None
    rates = (rates / count).cpu()
    rate, distortion = float(rates.sum()), distortion / count
    spread = torch.cat(means).var(0, unbiased=False)
    return {
        "rate": rate,
        "distortion": distortion,
        "elbo": -rate - distortion,
        "active_units": int((spread > ACTIVE_VARIANCE).sum()),
    }, rates


@torch.no_grad()
def importance_weighted_bound(
    model: GaussianVAE,
    batches: Iterable[tuple[Tensor, Tensor]],
    dist: ReconsDist,
    draws: int,
    seed: int,
    at_once: int = 1024,
) -> float:
    """Return the mean over images of log 1/K sum_k p(x, z_k) / q(z_k|x) with K `draws` (Burda et al. 2016),
    in nats.

    At most `at_once` latents are decoded at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    total, count = 0.0, 0
    for images, _ in batches:
        for x in images.split(1):
            mu, logvar = (v.double() for v in model.encode(x))
            weights = []
            for at in range(0, draws, at_once):
                k = min(at_once, draws - at)
                noise = torch.randn(k, mu.shape[1], generator=generator, dtype=torch.float64).to(mu)
                z = mu + torch.exp(0.5 * logvar) * noise
                prior = gaussian_log_density(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)
                posterior = gaussian_log_density(z, mu.expand_as(z), logvar.expand_as(z)).sum(1)
                decoded = model.decode(z.to(x))
                likelihood = log_likelihood(decoded, x.expand_as(decoded), model.activation, dist)
                weights.append(likelihood + prior - posterior)
            total += float(torch.cat(weights).logsumexp(0)) - math.log(draws)
            count += 1
    return total / count
