"""Define the entries of the loss vector: their terms, their names (`OBJECTIVES`) and their weights."""

from typing import TYPE_CHECKING

from movae_fast import lazy
from movae_fast.choices import ReconsReduction
from movae_fast.objectives.weights import resolve_weights

if TYPE_CHECKING:
    from movae_fast.objectives.terms import (
        LogDensities,
        balance_factors,
        batch_mean,
        dimension_wise_kl,
        distance_to_capacity,
        kl_of_latents,
        kl_standard_normal,
        log_densities,
        mmd,
        mutual_information,
        rate,
        reconstruction,
        rung_kl,
        total_correlation,
    )
    from movae_fast.objectives.vector import OBJECTIVES, LossVector, Outcome

__getattr__, __dir__ = lazy.exports(
    __name__,
    {
        "terms": (
            *(
                "LogDensities",
                "balance_factors",
                "batch_mean",
                "dimension_wise_kl",
                "distance_to_capacity",
                "kl_of_latents",
            ),
            *("kl_standard_normal", "log_densities", "mmd", "mutual_information", "rate"),
            *("reconstruction", "rung_kl", "total_correlation"),
        ),
        "vector": ("OBJECTIVES", "LossVector", "Outcome"),
    },
)

__all__ = [
    "OBJECTIVES",
    "LogDensities",
    "LossVector",
    "Outcome",
    "ReconsReduction",
    "balance_factors",
    "batch_mean",
    "dimension_wise_kl",
    "distance_to_capacity",
    "kl_of_latents",
    "kl_standard_normal",
    "log_densities",
    "mmd",
    "mutual_information",
    "rate",
    "reconstruction",
    "resolve_weights",
    "rung_kl",
    "total_correlation",
]
