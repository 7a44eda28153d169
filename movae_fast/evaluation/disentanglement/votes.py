"""Compute the FactorVAE score, from the latent that varies least while one factor is fixed."""

from __future__ import annotations

import numpy as np

from movae_fast.evaluation.disentanglement.gaps import ACTIVE_STD, active_latents
from movae_fast.evaluation.disentanglement.information import check_codes

TRAIN_VOTES, TEST_VOTES, VOTE_BATCH = 10_000, 5_000, 64  # of the published study


def factor_vae_score(
    latents: np.ndarray,  # [N, D]
    factors: np.ndarray,  # [N, F]
    seed: int = 0,
    train_votes: int = TRAIN_VOTES,
    test_votes: int = TEST_VOTES,
    batch: int = VOTE_BATCH,
    prune: float = ACTIVE_STD,
) -> float:
    """Return the FactorVAE score (Kim and Mnih 2018), the test accuracy of a majority-vote classifier.

    A vote: fix a random factor at the value of a random image, draw `batch` images with that value (with
    replacement), and name the active latent whose variance among them is smallest relative to its variance over
    all. The classifier predicts the factor from the latent named. The score is 0 if no latent is active
    (standard deviation of at least `prune`).
    """
    check_codes(latents, factors)
    latents = np.asarray(latents, np.float64)
    active = np.flatnonzero(active_latents(latents, prune))
    varying = [k for k in range(factors.shape[1]) if len(np.unique(factors[:, k])) > 1]
    if not len(active) or not varying:
        return 0.0
    latents = latents[:, active]
    scale = latents.var(0, ddof=1)
    random = np.random.default_rng(seed)
    votes = np.zeros((2, len(active), factors.shape[1]))
    groups = {k: _by_value(factors[:, k]) for k in varying}
    for split, n in enumerate((train_votes, test_votes)):
        for k in random.choice(varying, n):
            members = groups[k][factors[random.integers(len(factors)), k]]
            chosen = latents[members[random.integers(len(members), size=batch)]]
            votes[split, (chosen.var(0, ddof=1) / scale).argmin(), k] += 1
    majority = votes[0].argmax(1)
    return float(votes[1][np.arange(len(active)), majority].sum() / test_votes)


def _by_value(column: np.ndarray) -> dict[int, np.ndarray]:
    """Return value -> the numbers of the rows in which the column has it."""
    order = np.argsort(column, kind="stable")
    values, starts = np.unique(column[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True))
