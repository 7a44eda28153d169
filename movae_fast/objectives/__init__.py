"""Define the entries of the loss vector: their terms, their names (`OBJECTIVES`), and their weights."""

from movae_fast.objectives.terms import (
    LogDensities,
    ReconsDist,
    ReconsReduction,
    balance_factors,
    batch_mean,
    dimension_wise_kl,
    distance_to_capacity,
    kl_of_latents,
    kl_standard_normal,
    log_densities,
    mmd,
    mutual_information,
    pixel_errors,
    reconstruction,
    rung_kl,
    total_correlation,
)
from movae_fast.objectives.vector import OBJECTIVES, LossVector, Outcome
from movae_fast.objectives.weights import resolve_weights

__all__ = [
    "OBJECTIVES",
    "LogDensities",
    "LossVector",
    "Outcome",
    "ReconsDist",
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
    "pixel_errors",
    "reconstruction",
    "resolve_weights",
    "rung_kl",
    "total_correlation",
]
