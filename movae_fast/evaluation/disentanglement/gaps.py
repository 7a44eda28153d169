"""Compute metrics from the table of mutual information I(z_j; v_k) [D, F] between latents and factors."""

from __future__ import annotations

import numpy as np

from movae_fast.evaluation.disentanglement.information import (
    BINS,
    Information,
    discretise,
    entropy,
    joint_counts,
)

ACTIVE_STD = 0.05  # a latent whose means vary less than this over the data is not active


def active_latents(latents: np.ndarray, threshold: float = ACTIVE_STD) -> np.ndarray:
    """Return which latents [N, D] vary over the data, with a standard deviation of at least `threshold`, as
    bool [D]."""
    return np.asarray(latents, np.float64).std(0) >= threshold


def mig(information: Information) -> float:
    """Return the mutual information gap (Chen et al. 2018): (I_first - I_second) / H(v), averaged over factors
    v.

    I_first and I_second are the largest and second largest mutual information of a latent with v. A factor with
    only one value is left out; with a single latent the second is zero.
    """
    gaps = _gaps(information.mutual.T) / _positive(information.factor_entropy)
    there = information.factor_entropy > 0
    return float(gaps[there].mean()) if there.any() else 0.0


def mig_sup(information: Information, active: np.ndarray | None = None) -> float:
    """Return MIG-sup (Li et al. 2020): for each active latent the gap between its two largest I / H(v),
    averaged.

    MIG requires that a factor be in one latent; MIG-sup that a latent hold one factor. `active` [D] bool; None
    means all latents.
    """
    there = information.factor_entropy > 0
    fractions = information.mutual[:, there] / information.factor_entropy[there]
    gaps = _gaps(fractions) if there.any() else np.zeros(len(fractions))
    active = np.ones(len(gaps), bool) if active is None else active
    return float(gaps[active].mean()) if active.any() else 0.0


def modularity(information: Information) -> float:
    """Return the modularity (Ridgeway and Mozer 2018): 1 - sum_{k != best} I^2 / (I_best^2 (F - 1)), averaged
    over latents.

    A latent without information on any factor counts as 0.
    """
    squares = np.maximum(information.mutual, 0) ** 2
    best = squares.max(1)
    spread = (squares.sum(1) - best) / _positive(best * max(squares.shape[1] - 1, 1))
    return float(np.where(best > 0, 1 - spread, 0).mean())


def jemmig(latents: np.ndarray, factors: np.ndarray, information: Information, bins: int = BINS) -> float:
    """Return JEMMIG (Do and Tran 2020) computed from histograms, normalised to [0, 1] so that higher is better.

    It is 1 - [H(z*, v) - I(z*; v) + I(second; v)] / [H(v) + log bins], averaged over factors v, where z* is the
    latent with the most information on v and `second` the next one.
    """
    binned = discretise(latents, bins)
    scores = []
    for k, v in enumerate(factors.T):
        column = information.mutual[:, k]
        order = np.argsort(column)[::-1]
        second = column[order[1]] if len(order) > 1 else 0.0
        joint = entropy(joint_counts(binned[:, order[0]], v))
        worst = information.factor_entropy[k] + np.log(bins)
        scores.append(1 - (joint - column[order[0]] + second) / worst)
    return float(np.mean(scores))


def _gaps(table: np.ndarray) -> np.ndarray:
    """Return the largest minus the second largest value of each row [R, C]; with one column the second is
    zero."""
    ordered = np.sort(table, axis=1)
    return ordered[:, -1] - (ordered[:, -2] if table.shape[1] > 1 else 0.0)


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, 1.0)
