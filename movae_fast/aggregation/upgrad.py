"""Provide UPGrad and DualProj with TorchJD's interface, on the fused ops: usable wherever TorchJD accepts an
aggregator.

Quinton & Rey 2024, "Jacobian Descent for Multi-Objective Optimization" (https://arxiv.org/abs/2406.16232): the
update is the weighted sum of the Jacobian's rows that conflicts with none of them. TorchJD computes the
Gramian in the rows' dtype and solves m quadratic programs one by one on the host. Here the Gramian is float64,
the projection runs where the rows are, and nothing is read on the host.

The defaults are TorchJD's, whose regularizer is relative to the Gramian's trace: a row much shorter than the
longest is hardly protected. `UPGrad.strict()` and `DualProj.strict()` regularize each row by its own norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchjd.linalg import DualConeProjector, QuadprogProjector
from typing_extensions import Self

from movae_fast import ops
from movae_fast.aggregation.fused import FusedAggregator, GramianWeighting, preference, preference_suffix
from movae_fast.ops.project_weights import Mode, check_options
from movae_fast.reference import Regularizer

# Of the strict projection: small enough that no cosine falls below -1e-3, large enough for float64.
STRICT_REG_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class FusedProjector(DualConeProjector):
    """Project for TorchJD's own classes: `torchjd.aggregation.UPGrad(projector=FusedProjector())`.

    norm_eps, reg_eps: as `torchjd.linalg.QuadprogProjector` has them; regularizer: what they are relative to;
        see `ops.project_weights`.
    """

    norm_eps: float = 1e-4
    reg_eps: float = 1e-4
    regularizer: Regularizer = "trace"

    def __post_init__(self) -> None:
        check_options(self.norm_eps, self.reg_eps, "dualproj", self.regularizer)

    def __repr__(self) -> str:
        return f"FusedProjector({_shown(self.norm_eps, self.reg_eps, self.regularizer)})"

    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        """Return, for each vector u [m] of U [..., m], the v >= u of least v' A v, in the dtype of G."""
        projected, _ = ops.project_rows(
            U, G, norm_eps=self.norm_eps, reg_eps=self.reg_eps, regularizer=self.regularizer
        )
        return projected.to(G.dtype)


def _shown(norm_eps: float, reg_eps: float, regularizer: Regularizer = "trace") -> str:
    """Return the options as a call would show them. TorchJD has no regularizer but the trace, so that one
    is not named."""
    text = f"norm_eps={norm_eps}, reg_eps={reg_eps}"
    return text if regularizer == "trace" else f"{text}, regularizer={regularizer!r}"


def _options(projector: DualConeProjector) -> dict[str, Any] | None:
    """Return the arguments with which `ops.project_weights` projects as the projector does; None for a
    class that is not known here."""
    if isinstance(projector, FusedProjector):
        return {
            "norm_eps": projector.norm_eps,
            "reg_eps": projector.reg_eps,
            "regularizer": projector.regularizer,
        }
    if type(projector) is QuadprogProjector:
        return {"norm_eps": projector.norm_eps, "reg_eps": projector.reg_eps}
    return None


class ProjectionWeighting(GramianWeighting):
    """Compute the weights of UPGrad or DualProj from a Gramian [m, m], in its dtype."""

    def __init__(self, mode: Mode, pref_vector: Tensor | None, projector: DualConeProjector | None) -> None:
        super().__init__(pref_vector)
        self.mode = mode
        self.projector = projector

    @property
    def projector(self) -> DualConeProjector:
        return self._projector

    @projector.setter
    def projector(self, value: DualConeProjector | None) -> None:
        value = FusedProjector() if value is None else value
        if not isinstance(value, DualConeProjector):
            raise TypeError(
                f"projector must be one of torchjd.linalg.DualConeProjector, got {type(value).__name__}"
            )
        self._projector = value

    @torch.no_grad()
    def forward(self, gramian: Tensor, /) -> Tensor:
        options = _options(self.projector)
        if options is None:
            return self._by_projector(gramian)
        weights, _ = ops.project_weights(gramian, self.pref_vector, mode=self.mode, **options)
        return weights.to(gramian.dtype)

    @torch.no_grad()
    def of_rows(self, matrix: Tensor) -> Tensor:
        """Return the weights, float64, of a Jacobian [m, P]: Gramian and projection in one call."""
        options = _options(self.projector)
        if options is None:
            return self._by_projector(ops.gramian(matrix))
        weights, _, _ = ops.upgrad_weights(matrix, self.pref_vector, mode=self.mode, **options)
        return weights

    def _by_projector(self, gramian: Tensor) -> Tensor:  # [m]
        """Call a projector that these ops do not know, as TorchJD does."""
        u = gramian.new_full((len(gramian),), 1 / len(gramian))
        u = u if self.pref_vector is None else self.pref_vector.to(gramian)
        if self.mode == "dualproj":
            return self.projector(u, gramian)
        return self.projector(u.diag(), gramian).sum(0)


def _epsilon(name: str) -> Any:
    """Return a property that reads and writes an option of the projector through the aggregator."""

    def read(self: ProjectionAggregator) -> Any:
        options = _options(self.projector)
        if options is None:
            raise AttributeError(f"{name}: the projector is {self.projector!r}, whose options are its own")
        return options.get(name, "trace")

    def write(self: ProjectionAggregator, value: Any) -> None:
        read(self)
        self.projector = FusedProjector(**{**(_options(self.projector) or {}), name: value})

    return property(read, write)


class ProjectionAggregator(FusedAggregator):
    """Return the update [P] of a Jacobian [m, P]: the common base of UPGrad and DualProj.

    pref_vector: [m], on the rows' device; None is 1/m each. A preference of zero or less adds nothing.
    norm_eps, reg_eps, regularizer: of the regularized Gramian (`ops.project_weights`); TorchJD's defaults.
    projector: the same options as TorchJD gives them, instead: a `torchjd.linalg.QuadprogProjector` (whose
        problem is solved here) or a `FusedProjector`; another `DualConeProjector` is called. As in TorchJD it
        may come second.

    aggregator(jacobian [m, P]) is the update [P] in the Jacobian's dtype; NaN where the Gramian is not finite.
    All of them can be read and set. Raises ValueError or TypeError for what does not fit, then and at first.
    """

    mode: Mode
    gramian_weighting: ProjectionWeighting

    pref_vector = preference()
    norm_eps = _epsilon("norm_eps")
    reg_eps = _epsilon("reg_eps")
    regularizer = _epsilon("regularizer")

    def __init__(
        self,
        pref_vector: Tensor | None = None,
        norm_eps: float | DualConeProjector | None = 1e-4,
        reg_eps: float = 1e-4,
        regularizer: Regularizer = "trace",
        *,
        projector: DualConeProjector | None = None,
    ) -> None:
        if norm_eps is None or isinstance(norm_eps, DualConeProjector):
            projector, norm_eps = norm_eps or projector, 1e-4
        if projector is None:
            projector = FusedProjector(norm_eps=norm_eps, reg_eps=reg_eps, regularizer=regularizer)
        elif (norm_eps, reg_eps, regularizer) != (1e-4, 1e-4, "trace"):
            raise ValueError("give a projector or norm_eps, reg_eps and regularizer, not both")
        super().__init__(ProjectionWeighting(self.mode, pref_vector, projector))

    @classmethod
    def strict(cls, pref_vector: Tensor | None = None, reg_eps: float = STRICT_REG_EPS) -> Self:
        """Make an aggregator whose update conflicts with no row, whatever the rows' lengths."""
        return cls(pref_vector, norm_eps=0.0, reg_eps=reg_eps, regularizer="diagonal")

    @property
    def projector(self) -> DualConeProjector:
        return self.gramian_weighting.projector

    @projector.setter
    def projector(self, value: DualConeProjector | None) -> None:
        self.gramian_weighting.projector = value

    def __repr__(self) -> str:
        options = _options(self.projector)
        shown = f"projector={self.projector!r}" if options is None else _shown(**options)
        return f"{type(self).__name__}(pref_vector={self.pref_vector!r}, {shown})"

    def __str__(self) -> str:
        return f"{type(self).__name__}{preference_suffix(self.pref_vector)}"


class UPGrad(ProjectionAggregator):
    """Project each row, weighted by the preference, onto the dual cone of all rows, and return the sum."""

    mode = "upgrad"


class DualProj(ProjectionAggregator):
    """Project the rows' weighted mean onto the dual cone of all rows."""

    mode = "dualproj"
