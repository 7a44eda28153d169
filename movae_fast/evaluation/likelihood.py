"""Measure rate, distortion and bounds on log p(x) of a trained model.

All in nats per image, in evaluation mode. The reconstruction objective is -log p(x|z) of a likelihood
(`models.likelihoods`) up to a constant: of a Gaussian of variance 1/2 for the squared error, a Laplacian of
scale 1, ... Bits per dimension are given only for proper likelihoods; those of densities would not be
comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from movae_fast.choices import ReconsDist
from movae_fast.models import GaussianVAE, Likelihood
from movae_fast.models.likelihoods import bits_per_dimension
from movae_fast.objectives import kl_of_latents
from movae_fast.objectives.terms import rate_of_draws
from movae_fast.reference import gaussian_log_density
from movae_fast.training.evaluate import ACTIVE_VARIANCE


def log_likelihood(
    preactivation: Tensor,  # [B, P, H, W]
    x: Tensor,  # [B, C, H, W]
    likelihood: Likelihood,
) -> Tensor:  # [B] float64
    """Return log p(x|z) in nats per image, including its constants."""
    return -summed_error(preactivation, x, likelihood) - likelihood.constant * x[0].numel()


def summed_error(
    preactivation: Tensor,  # [B, P, H, W]
    x: Tensor,  # [B, C, H, W]
    likelihood: Likelihood,
) -> Tensor:  # [B] float64
    """Return each image's reconstruction objective, summed over its values: -log p(x|z) without the
    constant."""
    return likelihood.errors(preactivation.double(), x.double()).flatten(1).sum(1)


def elbo_metrics(
    rate: float, distortion: float, active_units: int, likelihood: Likelihood, values: int
) -> dict[str, float]:
    """Return the metrics derived from rate and distortion, in nats per image of `values` values.

    For a proper likelihood also `nats` (the negative ELBO) and `bits_per_dim`.
    """
    nats = rate + distortion
    metrics = {"rate": rate, "distortion": distortion, "elbo": -rate - distortion, "active_units": active_units}
    if likelihood.proper:
        metrics |= {"nats": nats, "bits_per_dim": bits_per_dimension(nats, values)}
    return metrics


@torch.no_grad()
def elbo(
    model: GaussianVAE, batches: Iterable[tuple[Tensor, Tensor]], dist: ReconsDist, seed: int
) -> tuple[dict[str, float], Tensor | None]:
    """Return rate, distortion, ELBO and active units over the batches as metrics, and the rate of each latent
    [D].

    For a proper likelihood the metrics include `nats` (the negative ELBO) and `bits_per_dim`, from the same
    draws. Under a VampPrior the rate is that of these draws, and a latent alone has none: None.
    """
    likelihood = model.likelihood_as(dist)
    generator = torch.Generator().manual_seed(seed)
    distortion, count = 0.0, 0
    log_prior = None if model.pseudo_inputs is None else model.log_prior()
    rates = torch.zeros((), dtype=torch.float64, device=model.device)  # [D] in the end, or [] under a VampPrior
    means: list[Tensor] = []
    for x, _ in batches:
        mu, logvar = (v.double() for v in model.encode(x))
        noise = torch.randn(mu.shape, generator=generator).to(mu)
        z = mu + torch.exp(0.5 * logvar) * noise
        distortion -= float(log_likelihood(model.decode(z.to(x)), x, likelihood).sum())
        if log_prior is None:
            rates = rates + kl_of_latents(mu, logvar).sum(0)
        else:
            rates = rates + rate_of_draws(z, mu, logvar, log_prior).sum()
        means.append(mu)
        count += len(x)
    rates = (rates / count).cpu()
    rate, distortion = float(rates.sum()), distortion / count
    spread = torch.cat(means).var(0, unbiased=False)
    active = int((spread > ACTIVE_VARIANCE).sum())
    metrics = elbo_metrics(rate, distortion, active, likelihood, math.prod(model.image_shape))
    return metrics, rates if log_prior is None else None


@torch.no_grad()
def importance_weighted_bound(
    model: GaussianVAE,
    batches: Iterable[tuple[Tensor, Tensor]],
    dist: ReconsDist,
    draws: int,
    seed: int,
    at_once: int = 1024,
) -> float:
    """Return the importance-weighted bound on log p(x) (Burda et al. 2016), log 1/K sum_k p(x, z_k) / q(z_k|x)
    with K `draws`, in nats, averaged over images.

    At most `at_once` latents are decoded at a time. Raises ValueError for gaussian_optimal, whose variance is
    fitted to each image and each z, so that draws cannot be weighted by it.
    """
    if dist == "gaussian_optimal":
        raise ValueError("the importance-weighted bound is of a likelihood; gaussian_optimal fits its variance")
    likelihood = model.likelihood_as(dist)
    generator, log_prior = torch.Generator().manual_seed(seed), model.log_prior()

    def log_weights(x: Tensor) -> Callable[[int], Tensor]:
        mu, logvar = (v.double() for v in model.encode(x))

        def draw(k: int) -> Tensor:
            noise = torch.randn(k, mu.shape[1], generator=generator, dtype=torch.float64).to(mu)
            z = mu + torch.exp(0.5 * logvar) * noise
            posterior = gaussian_log_density(z, mu.expand_as(z), logvar.expand_as(z)).sum(1)
            log_p = log_likelihood(model.decode(z.to(x)), x.expand(k, -1, -1, -1), likelihood)
            return log_p + log_prior(z) - posterior

        return draw

    return mean_bound(batches, draws, at_once, log_weights)


def mean_bound(
    batches: Iterable[tuple[Tensor, Tensor]],
    draws: int,
    at_once: int,
    log_weights: Callable[[Tensor], Callable[[int], Tensor]],
) -> float:
    """Return log 1/K sum_k w_k with K `draws` of importance weights w_k, averaged over images.

    At most `at_once` weights are computed at a time.

    log_weights: takes an image x [1, C, S, S] and returns a function that draws k latents for it and returns
        their log p(x, z) - log q(z|x) [k].
    """
    total, count = 0.0, 0
    for images, _ in batches:
        for x in images.split(1):
            draw = log_weights(x)
            weights = [draw(min(at_once, draws - at)) for at in range(0, draws, at_once)]
            total += float(torch.cat(weights).logsumexp(0)) - math.log(draws)
            count += 1
    return total / count
