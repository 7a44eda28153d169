"""Compare sets of images by their features: precision and recall, density and coverage.

Distances are computed a block of rows at a time; nothing of size N x M is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS_OF_RECALL, NEIGHBOURS_OF_COVERAGE = 3, 5  # as published
BLOCK = 1024


def radii(
    features: Tensor,  # [N, F]
    k: int,
) -> Tensor:  # [N]
    """Return the distance of each row from its k-th nearest other row."""
    parts = [torch.cdist(part, features).kthvalue(k + 1, dim=1).values for part in features.split(BLOCK)]
    return torch.cat(parts)


def precision_recall(
    real: Tensor,  # [N, F]
    fake: Tensor,  # [M, F]
    k: int = NEIGHBOURS_OF_RECALL,
) -> tuple[float, float]:
    """Return the fraction of fakes within the ball of a real image, and of reals within that of a fake.

    A ball reaches to the image's k-th nearest neighbour of its own set (Kynkäänniemi et al. 2019).
    """
    real, fake = real.double(), fake.double()
    return covered(fake, real, radii(real, k)), covered(real, fake, radii(fake, k))


def covered(points: Tensor, centres: Tensor, reach: Tensor) -> float:
    """Return the fraction of points that lie within a centre's reach."""
    inside = [(torch.cdist(part, centres) <= reach).any(1) for part in points.split(BLOCK)]
    return float(torch.cat(inside).double().mean())


def density_coverage(
    real: Tensor,  # [N, F]
    fake: Tensor,  # [M, F]
    k: int = NEIGHBOURS_OF_COVERAGE,
) -> tuple[float, float]:
    """Return density, how many balls of reals a fake lies in, divided by k, and coverage, the fraction of reals
    with a fake in their ball (Naeem et al. 2020). Density may exceed 1."""
    real, fake = real.double(), fake.double()
    reach = radii(real, k)
    counts, has = 0.0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part in fake.split(BLOCK):
        inside = torch.cdist(part, real) <= reach
        counts += float(inside.sum())
        has |= inside.any(0)
    return counts / (k * len(fake)), float(has.double().mean())
