"""Define the base classes of this package's aggregators: float64 Gramians and weights, computed on the rows'
device without host reads."""

from typing import Any

import torch
from torch import Tensor
from torchjd.aggregation import GramianWeightedAggregator, WeightedAggregator, Weighting

from movae_fast import ops


class GramianWeighting(Weighting):
    """Compute an aggregator's weights [m] from a Gramian [m, m], in the Gramian's dtype.

    pref_vector: the preference [m], or None for methods without one and for equal preferences.
    """

    _preference: Tensor | None

    def __init__(self, pref_vector: Tensor | None) -> None:
        super().__init__()
        # A buffer, so that it moves with the module to another device, but not a part of its state.
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
        """Return the weights [m] float64 for a Jacobian `matrix` [m, P]: the Gramian is computed first, or in
        the same op."""
        raise NotImplementedError


class RowsWeighting(Weighting):
    """Adapt `GramianWeighting.of_rows` to TorchJD, whose aggregators expect a module that returns the weights
    [m] of a Jacobian in the rows' dtype."""

    def __init__(self, weighting: GramianWeighting) -> None:
        super().__init__()
        self.weighting = weighting

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        inner = self.weighting
        if hooked(inner):  # a hook on the inner weighting has to see it called
            return inner(ops.gramian(matrix)).to(matrix.dtype)
        return inner.of_rows(matrix).to(matrix.dtype)


def hooked(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class FusedAggregator(GramianWeightedAggregator):
    """Aggregate a Jacobian [m, P] to the update [P], in the Jacobian's dtype, with the weights of a
    `GramianWeighting`.

    The weights, and so the update, are NaN if the Gramian is not finite.
    """

    gramian_weighting: GramianWeighting

    def __init__(self, weighting: GramianWeighting) -> None:
        # Skip GramianWeightedAggregator.__init__, whose weighting computes the Gramian in the rows' dtype.
        WeightedAggregator.__init__(self, RowsWeighting(weighting))
        self.gramian_weighting = weighting

    def forward(self, matrix: Tensor, /) -> Tensor:
        inner = self.gramian_weighting
        if hooked(self.weighting) or hooked(inner):
            return super().forward(matrix)
        # Call the ops directly: calls of the modules would take a quarter of the time of a small Jacobian.
        matrix = matrix.detach()
        return ops.combine(matrix, inner.of_rows(matrix))

    @staticmethod
    def _combine(matrix: Tensor, weights: Tensor) -> Tensor:
        return ops.combine(matrix.detach(), weights)


def preference() -> Any:
    """Return the property `pref_vector` of an aggregator, which reads and sets the preference of its
    weighting."""

    def read(self: FusedAggregator) -> Tensor | None:
        return self.gramian_weighting.pref_vector

    def write(self: FusedAggregator, value: Tensor | None) -> None:
        self.gramian_weighting.pref_vector = value

    return property(read, write)


def preference_suffix(pref_vector: Tensor | None) -> str:
    """Return a preference as text, as TorchJD shows it in `str(aggregator)`: "([0.5, 1.])", or "" for None."""
    if pref_vector is None:
        return ""
    return f"([{', '.join(f'{value:.2f}'.rstrip('0') for value in pref_vector.tolist())}])"
