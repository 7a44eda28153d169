"""Give the aggregators of this package their common base: float64 Gramians, computed on the rows' device,
without host reads."""

from typing import Any

import torch
from torch import Tensor
from torchjd.aggregation import GramianWeightedAggregator, WeightedAggregator, Weighting

from movae_fast import ops


class GramianWeighting(Weighting):
    """Compute weights from a Gramian [m, m], in its dtype, with or without a preference [m]."""

    _preference: Tensor | None

    def __init__(self, pref_vector: Tensor | None) -> None:
        super().__init__()
        # A buffer, so that it follows the module to another device; not a part of its state.
        self.register_buffer("_preference", None, persistent=False)
        self.pref_vector = pref_vector

    @property
    def pref_vector(self) -> Tensor | None:
        return self._preference

    @pref_vector.setter
    def pref_vector(self, value: Tensor | None) -> None:
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"pref_vector must be a tensor [m] or None, got {type(value).__name__}")
        if value is not None and value.dim() != 1:
            raise ValueError(f"pref_vector must be [m], got {list(value.shape)}")
        if value is not None and value.is_cpu and not value.isfinite().all():
            raise ValueError(f"pref_vector must be finite, got {value.tolist()}")
        self._preference = value

    def of_rows(self, matrix: Tensor) -> Tensor:
        """Return the weights [m] float64 of a Jacobian [m, P]."""
        raise NotImplementedError


class RowsWeighting(Weighting):
    """Wrap `GramianWeighting.of_rows` as TorchJD's aggregators expect it: the weights [m] in the rows'
    dtype."""

    def __init__(self, weighting: GramianWeighting) -> None:
        super().__init__()
        self.weighting = weighting

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        inner = self.weighting
        if hooked(inner):  # somebody wants to see the Gramian's weighting called
            return inner(ops.gramian(matrix)).to(matrix.dtype)
        return inner.of_rows(matrix).to(matrix.dtype)


def hooked(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class FusedAggregator(GramianWeightedAggregator):
    """Return the update [P] of a Jacobian [m, P], in its dtype. Weights are NaN where the Gramian is not
    finite."""

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


def preference() -> Any:
    """Return a property that reads and writes the weighting's preference through the aggregator."""

    def read(self: FusedAggregator) -> Tensor | None:
        return self.gramian_weighting.pref_vector

    def write(self: FusedAggregator, value: Tensor | None) -> None:
        self.gramian_weighting.pref_vector = value

    return property(read, write)


def preference_suffix(pref_vector: Tensor | None) -> str:
    """Return a preference as TorchJD's `str` of an aggregator shows it: two digits, without trailing zeros."""
    if pref_vector is None:
        return ""
    return f"([{', '.join(f'{value:.2f}'.rstrip('0') for value in pref_vector.tolist())}])"
