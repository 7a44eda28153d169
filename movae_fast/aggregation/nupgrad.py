"""Provide NUPGrad, MO-VAE's UPGrad of rows of equal length, on the Gramian."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torchjd.linalg import DualConeProjector

from movae_fast import ops
from movae_fast.aggregation.upgrad import ProjectionAggregator, ProjectionWeighting
from movae_fast.choices import Regularizer

RowLengths = Literal["own", "shortest"]


class CosineWeighting(ProjectionWeighting):
    """Compute the weights [m] of NUPGrad from a Gramian [m, m], in the Gramian's dtype."""

    row_lengths: RowLengths = "own"

    @torch.no_grad()
    def forward(self, gramian: Tensor, /) -> Tensor:
        wide = gramian.detach().double()
        lengths = wide.diagonal().sqrt()
        known = lengths > 0  # a row of zeros has no direction: its cosines are 0
        inverse = torch.where(known, 1 / lengths, 0)
        # A NaN or an infinity, times 0, is NaN in every weight, as UPGrad has it.
        weights = super().forward(wide * inverse[:, None] * inverse)
        if self.row_lengths == "shortest":
            shortest = torch.where(known, lengths, torch.inf).amin()
            weights = weights * torch.where(known, shortest * inverse, 1)
        return weights.to(gramian.dtype)

    @torch.no_grad()
    def of_rows(self, matrix: Tensor) -> Tensor:
        return self(ops.gramian(matrix))


class NUPGrad(ProjectionAggregator):
    """Aggregate by UPGrad's weights for the rows' directions: those of the Gramian of cosines (MO-VAE).

    The weights do not depend on the rows' lengths. With `row_lengths="own"`, MO-VAE's, they are the weights of
    the rows as they are, so the update may oppose a short row. With "shortest" they are the weights of the rows
    scaled to the length of the shortest one that is not zero: the update is then UPGrad's of rows of equal
    length, and opposes none.

    The other arguments are UPGrad's; norm_eps and reg_eps are relative to cosines, whose trace is m. Raises
    ValueError or TypeError for unsuitable values, at construction and when they are set.
    """

    mode = "upgrad"
    weighting_class = CosineWeighting
    gramian_weighting: CosineWeighting

    def __init__(
        self,
        pref_vector: Tensor | None = None,
        norm_eps: float | DualConeProjector | None = 1e-4,
        reg_eps: float = 1e-4,
        regularizer: Regularizer = "trace",
        *,
        row_lengths: RowLengths = "own",
        projector: DualConeProjector | None = None,
    ) -> None:
        super().__init__(pref_vector, norm_eps, reg_eps, regularizer, projector=projector)
        self.row_lengths = row_lengths

    @property
    def row_lengths(self) -> RowLengths:
        return self.gramian_weighting.row_lengths

    @row_lengths.setter
    def row_lengths(self, value: RowLengths) -> None:
        if value not in get_args(RowLengths):
            raise ValueError(f"row_lengths must be one of {', '.join(get_args(RowLengths))}; got {value!r}")
        self.gramian_weighting.row_lengths = value

    def __repr__(self) -> str:
        return f"{super().__repr__().removesuffix(')')}, row_lengths={self.row_lengths!r})"
