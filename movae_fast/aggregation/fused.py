"""What the aggregators of this package share: float64 Gramians, weights where the rows are, no host reads."""

import torch
from torch import Tensor
from torchjd.aggregation import GramianWeightedAggregator, WeightedAggregator, Weighting

from movae_fast import ops


class GramianWeighting(Weighting):
    """Weights from a Gramian [m, m], in its dtype, by a preference [m] or none."""

    pref_vector: Tensor | None

    def __init__(self, pref_vector: Tensor | None) -> None:
        super().__init__()
        if pref_vector is not None and pref_vector.dim() != 1:
            raise ValueError(f"pref_vector must be [m], got {list(pref_vector.shape)}")
        # A buffer, so that it follows the module to another device; not a part of its state.
        self.register_buffer("pref_vector", pref_vector, persistent=False)

    def of_rows(self, matrix: Tensor) -> Tensor:
        """The weights, float64, from a Jacobian [m, P]."""
        raise NotImplementedError


class RowsWeighting(Weighting):
    """`GramianWeighting.of_rows` as TorchJD's aggregators take it."""

    def __init__(self, weighting: GramianWeighting) -> None:
        super().__init__()
        self.weighting = weighting

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        inner = self.weighting
        if hooked(inner):  # somebody wants to see the Gramian's weighting called
            return inner(ops.gramian(matrix))
        return inner.of_rows(matrix)


def hooked(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class FusedAggregator(GramianWeightedAggregator):
    """The update [P] of a Jacobian [m, P], in its dtype; NaN weights where the Gramian is not finite."""

    gramian_weighting: GramianWeighting

    def __init__(self, weighting: GramianWeighting) -> None:
        # Past GramianWeightedAggregator's own, which computes the Gramian in the rows' dtype.
        WeightedAggregator.__init__(self, RowsWeighting(weighting))
        self.gramian_weighting = weighting

    def forward(self, matrix: Tensor, /) -> Tensor:
        inner = self.gramian_weighting
        if hooked(self.weighting) or hooked(inner):
            return super().forward(matrix)
        # Straight to the ops: the modules' calls would take a quarter of the time of a small Jacobian.
        matrix = matrix.detach()
        return ops.combine(matrix, inner.of_rows(matrix))

    @staticmethod
    def _combine(matrix: Tensor, weights: Tensor) -> Tensor:
        return ops.combine(matrix.detach(), weights)
