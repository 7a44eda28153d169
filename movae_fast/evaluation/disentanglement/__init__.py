"""Measure disentanglement, by pure functions of latents [N, D] and factors [N, F].

The constants are those of the published study (Locatello et al. 2019): 20 bins, 10,000 codes to fit and 5,000
to test on, votes of 64 images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from movae_fast.evaluation.disentanglement.gaps import (
    ACTIVE_STD,
    active_latents,
    jemmig,
    mig,
    mig_sup,
    modularity,
)
from movae_fast.evaluation.disentanglement.information import (
    BINS,
    Information,
    discretise,
    entropy,
    histogram_information,
    joint_counts,
    mutual_information,
    sampled_information,
)
from movae_fast.evaluation.disentanglement.predictors import (
    DCI,
    completeness,
    dci,
    disentanglement,
    sap,
    sap_table,
)
from movae_fast.evaluation.disentanglement.votes import factor_vae_score

__all__ = [
    "ACTIVE_STD",
    "BINS",
    "DCI",
    "METRICS",
    "Codes",
    "Information",
    "active_latents",
    "completeness",
    "dci",
    "discretise",
    "disentanglement",
    "entropy",
    "factor_vae_score",
    "histogram_information",
    "jemmig",
    "joint_counts",
    "mig",
    "mig_sup",
    "modularity",
    "mutual_information",
    "sampled_information",
    "sap",
    "sap_table",
]


@dataclass
class Codes:
    """Hold posteriors of images whose factors are known; the first `n_train` are for fitting, the rest for
    testing."""

    mu: Tensor  # [N, D]
    logvar: Tensor  # [N, D]
    factors: Tensor  # [N, F] int64
    n_train: int
    seed: int = 0

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return means and factors for fitting, then means and factors for testing."""
        mu, factors = self.mu.double().cpu().numpy(), self.factors.cpu().numpy()
        return mu[: self.n_train], factors[: self.n_train], mu[self.n_train :], factors[self.n_train :]

    @cached_property
    def histogram(self) -> Information:
        return histogram_information(*self.arrays[:2])

    @cached_property
    def sampled(self) -> Information:
        n = self.n_train
        return sampled_information(self.mu[:n], self.logvar[:n], self.factors[:n], seed=self.seed)

    @property
    def active(self) -> np.ndarray:
        return active_latents(self.arrays[0])


def _dci(codes: Codes) -> dict[str, float]:
    scores = dci(*codes.arrays, seed=codes.seed)
    return {f"dci_{name}": value for name, value in list(scores._asdict().items())[:3]}


# Name on the command line -> the metrics by name.
METRICS: dict[str, Callable[[Codes], dict[str, float]]] = {
    "mig": lambda c: {"mig": mig(c.histogram)},
    "mig_sup": lambda c: {"mig_sup": mig_sup(c.histogram, c.active)},
    "mig_sampled": lambda c: {"mig_sampled": mig(c.sampled)},
    "mig_sup_sampled": lambda c: {"mig_sup_sampled": mig_sup(c.sampled, c.active)},
    "modularity": lambda c: {"modularity": modularity(c.histogram)},
    "jemmig": lambda c: {"jemmig": jemmig(*c.arrays[:2], c.histogram)},
    "factor_vae": lambda c: {"factor_vae": factor_vae_score(*c.arrays[:2], seed=c.seed)},
    "sap": lambda c: {"sap": sap(*c.arrays, seed=c.seed)},
    "dci": _dci,
}
NEED_TEST_CODES = ("sap", "dci")
