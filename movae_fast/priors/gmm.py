"""Define a mixture of Gaussians over latents, fitted by expectation maximisation in float64."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from movae_fast.names import ArgumentError
from movae_fast.priors.config import PriorConfig

WIDEST = 128  # latents up to which `auto` has full covariances
ITERATIONS, TOLERANCE, REGULARIZER = 200, 1e-3, 1e-6


class MixturePrior(nn.Module):
    """Hold a mixture of K Gaussians with full or diagonal covariances.

    It is fitted to draws from the posteriors, whose distribution the decoder has seen: posterior means alone
    are narrower.
    """

    classes, exact = 0, True

    def __init__(self, dim: int, components: int, full: bool) -> None:
        super().__init__()
        self.dim, self.components, self.full = dim, components, full
        eye = torch.eye(dim, dtype=torch.float64).repeat(components, 1, 1)
        self.register_buffer("log_weights", torch.full((components,), -math.log(components)).double())
        self.register_buffer("means", torch.zeros(components, dim, dtype=torch.float64))
        self.register_buffer("factors", eye)
        self.log_weights: Tensor  # [K] float64
        self.means: Tensor  # [K, D] float64
        self.factors: Tensor  # [K, D, D] float64, lower triangular: covariance = L L^T

    def fit(self, values: Tensor, seed: int) -> None:
        """Fit to one draw from each posterior of values [N, 2, D] (means and log-variances).

        scikit-learn's EM starts from k-means. Raises ArgumentError for fewer rows than components.
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        if len(values) < self.components:
            raise ArgumentError(f"components {self.components}: there are {len(values)} rows to fit them to")
        mean, logvar = values.double().unbind(1)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(mean.shape, dtype=torch.float64, generator=generator)
        mixture = GaussianMixture(
            self.components,
            covariance_type="full" if self.full else "diag",
            tol=TOLERANCE,
            reg_covar=REGULARIZER,
            max_iter=ITERATIONS,
            random_state=seed,
        )
        with warnings.catch_warnings():  # a mixture short of its optimum is a distribution all the same
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit((mean + torch.exp(0.5 * logvar) * noise).numpy())
        self.log_weights.copy_(torch.from_numpy(mixture.weights_).log())
        self.means.copy_(torch.from_numpy(mixture.means_))
        covariances = torch.from_numpy(mixture.covariances_)
        self.factors.copy_(torch.linalg.cholesky(covariances) if self.full else covariances.sqrt().diag_embed())

    def log_prob(self, z: Tensor) -> Tensor:  # [N] float64
        """Return the log density at latents z [N, D], in nats."""
        off = (z.double()[:, None] - self.means)[..., None]  # [N, K, D, 1]
        u = torch.linalg.solve_triangular(self.factors, off, upper=False)[..., 0]
        log_det = self.factors.diagonal(dim1=1, dim2=2).log().sum(1)
        each = -0.5 * u.square().sum(2) - log_det - 0.5 * self.dim * math.log(2 * math.pi)
        return torch.logsumexp(each + self.log_weights, 1)

    def sample(self, n: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:  # [n, D] float64
        """Draw n latents, with the deviations of each Gaussian times `temperature`."""
        chosen = torch.multinomial(self.log_weights.exp().cpu(), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dim, 1, dtype=torch.float64, generator=generator)
        chosen, noise = chosen.to(self.means.device), noise.to(self.means)
        return self.means[chosen] + temperature * (self.factors[chosen] @ noise)[..., 0]


def build(config: PriorConfig, dim: int) -> MixturePrior:
    """Build the mixture that the configuration describes, over `dim` latents."""
    covariance = config.option("covariance")
    full = covariance == "full" or (covariance == "auto" and dim <= WIDEST)
    return MixturePrior(dim, config.option("components"), full)
