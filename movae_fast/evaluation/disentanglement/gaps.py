"""Compute metrics of the table of mutual information I(z_j; v_k) [D, F]: pure functions of `Information`."""

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
    """Return which latents [N, D] vary: standard deviation over the data at least `threshold`; bool [D]."""
    return np.asarray(latents, np.float64).std(0) >= threshold


def mig(information: Information) -> float:
    """Compute the mutual information gap (Chen et al. 2018): mean over factors of (I_first - I_second) /
    H(v).

    A factor that has one value only says nothing and is left out; a single latent has a second of zero.
    """
    gaps = _gaps(information.mutual.T) / _positive(information.factor_entropy)
    there = information.factor_entropy > 0
    return float(gaps[there].mean()) if there.any() else 0.0


def mig_sup(information: Information, active: np.ndarray | None = None) -> float:
    """Compute MIG-sup (Li et al. 2020): for each active latent the gap along factors of I / H(v), averaged.

    MIG asks that a factor be in one latent; this, that a latent hold one factor. `active` [D] bool; None is
    all of them.
    """
    there = information.factor_entropy > 0
    fractions = information.mutual[:, there] / information.factor_entropy[there]
    gaps = _gaps(fractions) if there.any() else np.zeros(len(fractions))
    active = np.ones(len(gaps), bool) if active is None else active
    return float(gaps[active].mean()) if active.any() else 0.0


def modularity(information: Information) -> float:
    """Compute the modularity (Ridgeway and Mozer 2018): 1 - sum_{k != best} I^2 / (I_best^2 (F - 1)), mean
    over latents.

    A latent that knows nothing counts 0.
    """
    squares = np.maximum(information.mutual, 0) ** 2
    best = squares.max(1)
    spread = (squares.sum(1) - best) / _positive(best * max(squares.shape[1] - 1, 1))
    return float(np.where(best > 0, 1 - spread, 0).mean())


def jemmig(latents: np.ndarray, factors: np.ndarray, information: Information, bins: int = BINS) -> float:
    """Compute JEMMIG (Do and Tran 2020) by histograms, in [0, 1] and better when higher.

    1 - [H(z*, v) - I(z*; v) + I(second; v)] / [H(v) + log bins], mean over factors, z* the best latent of v.
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
    """Return the largest minus the second largest of each row [R, C]; the second of a single column is
    zero."""
    ordered = np.sort(table, axis=1)
    return ordered[:, -1] - (ordered[:, -2] if table.shape[1] > 1 else 0.0)


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, 1.0)
