"""Measure how well factors can be predicted from latents, and from which ones, with scikit-learn's
estimators."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from movae_fast.evaluation.disentanglement.information import check_codes


class DCI(NamedTuple):
    """Hold disentanglement, completeness and informativeness (Eastwood and Williams 2018)."""

    disentanglement: float
    completeness: float
    informativeness: float  # mean test accuracy
    importance: np.ndarray  # [D, F]


def disentanglement(importance: np.ndarray) -> float:
    """Return DCI's disentanglement: 1 - entropy (base F) of a latent's importance over factors, averaged over
    latents.

    importance: [D, F]. The average is weighted by each latent's fraction of the total importance.
    """
    return _one_sidedness(np.asarray(importance, np.float64))


def completeness(importance: np.ndarray) -> float:
    """Return DCI's completeness: 1 - entropy (base D) of a factor's importance over latents, averaged over
    factors.

    importance: [D, F]. The average is weighted by each factor's fraction of the total importance.
    """
    return _one_sidedness(np.asarray(importance, np.float64).T)


def _one_sidedness(rows: np.ndarray) -> float:
    if rows.shape[1] == 1:
        return 1.0
    total = rows.sum(1, keepdims=True)
    p = np.where(total > 0, rows / np.where(total > 0, total, 1), 1 / rows.shape[1])
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(1) / np.log(rows.shape[1])
    weight = total[:, 0] / total.sum() if total.sum() > 0 else np.full(len(rows), 1 / len(rows))
    return float((weight * (1 - entropy)).sum())


def dci(
    latents: np.ndarray,  # [N, D]
    factors: np.ndarray,  # [N, F]
    test_latents: np.ndarray,  # [M, D]
    test_factors: np.ndarray,  # [M, F]
    seed: int = 0,
) -> DCI:
    """Compute DCI with scikit-learn's gradient boosted trees at their defaults, as in the published study.

    The trees are fitted on `latents` and `factors`; informativeness is their accuracy on the test codes.
    """
    from sklearn.ensemble import GradientBoostingClassifier

    check_codes(latents, factors)
    check_codes(test_latents, test_factors)
    importance = np.zeros((latents.shape[1], factors.shape[1]))
    accuracy = []
    for k in range(factors.shape[1]):
        if len(np.unique(factors[:, k])) < 2:
            accuracy.append(float((test_factors[:, k] == factors[0, k]).mean()))
            continue
        trees = GradientBoostingClassifier(random_state=seed).fit(latents, factors[:, k])
        importance[:, k] = np.abs(trees.feature_importances_)
        accuracy.append(float((trees.predict(test_latents) == test_factors[:, k]).mean()))
    return DCI(disentanglement(importance), completeness(importance), float(np.mean(accuracy)), importance)


def sap_table(
    latents: np.ndarray, factors: np.ndarray, test_latents: np.ndarray, test_factors: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Return the test accuracy [D, F] of a linear SVM (C 0.01, balanced classes) that predicts a factor from
    one latent."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    check_codes(latents, factors)
    check_codes(test_latents, test_factors)
    table = np.zeros((latents.shape[1], factors.shape[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol fixes the iterations too
        for j, k in np.ndindex(*table.shape):
            y, truth = factors[:, k], test_factors[:, k]
            if len(np.unique(y)) < 2:
                table[j, k] = (truth == y[0]).mean()
                continue
            svm = LinearSVC(C=0.01, class_weight="balanced", random_state=seed, dual="auto")
            table[j, k] = (svm.fit(latents[:, [j]], y).predict(test_latents[:, [j]]) == truth).mean()
    return table


def sap(
    latents: np.ndarray, factors: np.ndarray, test_latents: np.ndarray, test_factors: np.ndarray, seed: int = 0
) -> float:
    """Return the separated attribute predictability (Kumar et al. 2018) for discrete factors: the gap between
    the accuracies of the two best latents in `sap_table`, averaged over factors."""
    ordered = np.sort(sap_table(latents, factors, test_latents, test_factors, seed), axis=0)
    second = ordered[-2] if len(ordered) > 1 else 0.0
    return float((ordered[-1] - second).mean())
