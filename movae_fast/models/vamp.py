"""Define the VampPrior (Tomczak and Welling 2018): the mean of the posteriors of learned pseudo-inputs.

p(z) = 1/K sum_k q(z|u_k), where the u_k are parameters with the shape of images. The prior is trained with the
model: it follows the aggregate posterior, instead of pulling it towards N(0, I).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from movae_fast.reference import gaussian_log_density

PSEUDO_INPUTS = 500  # as published
# Of the initial values, in images of [0, 1], as published.
MEAN, DEVIATION = 0.05, 0.01


class Components(NamedTuple):
    """Hold the posteriors of the pseudo-inputs, which are the Gaussians of the mixture."""

    mu: Tensor  # [K, D]
    logvar: Tensor  # [K, D]


class PseudoInputs(nn.Module):
    """Hold K learned images, which are kept in the range of the data."""

    def __init__(self, count: int, image_shape: tuple[int, int, int], normalize: bool) -> None:
        super().__init__()
        values = MEAN + DEVIATION * torch.randn(count, *image_shape)
        self.values = nn.Parameter(2 * values - 1 if normalize else values)
        self.least = -1.0 if normalize else 0.0

    def forward(self) -> Tensor:  # [K, C, S, S]
        """Return the images; a value at the end of the range has no gradient."""
        return self.values.clamp(self.least, 1.0)


def mixture_log_density(z: Tensor, components: Components) -> Tensor:  # [N]
    """Return log 1/K sum_k N(z; mu_k, diag exp(logvar_k)) at latents z [N, D], in nats and in the dtype of
    z."""
    mu, logvar = components.mu.to(z), components.logvar.to(z)
    each = gaussian_log_density(z[:, None], mu, logvar).sum(2)  # [N, K]
    return torch.logsumexp(each, 1) - math.log(len(mu))


def draw_from(
    components: Components, n: int, generator: torch.Generator | None, temperature: float = 1.0
) -> Tensor:  # [n, D]
    """Return n draws: a component at random, and a draw from it, whose deviations are multiplied by
    `temperature`.

    Random numbers are drawn on the CPU.
    """
    mu, logvar = components
    chosen = torch.randint(len(mu), (n,), generator=generator).to(mu.device)
    noise = torch.randn(n, mu.shape[1], generator=generator).to(mu)
    return mu[chosen] + temperature * torch.exp(0.5 * logvar[chosen]) * noise
