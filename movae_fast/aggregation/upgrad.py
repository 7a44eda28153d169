"""UPGrad and DualProj as TorchJD has them, on the fused ops: usable wherever TorchJD takes an aggregator.

Quinton & Rey 2024, "Jacobian Descent for Multi-Objective Optimization" (https://arxiv.org/abs/2406.16232): the
update is the weighted sum of the Jacobian's rows that conflicts with none of them. TorchJD computes the
Gramian in the rows' dtype and solves m quadratic programs one by one on the host. Here the Gramian is float64,
the projection runs where the rows are, and nothing is read on the host.

The defaults are TorchJD's, whose regularizer is relative to the Gramian's trace: a row much shorter than the
longest is hardly protected. `UPGrad.strict()` and `DualProj.strict()` regularize each row by its own norm.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchjd.linalg import DualConeProjector
from typing_extensions import Self

from movae_fast import ops
from movae_fast.aggregation.fused import FusedAggregator, GramianWeighting
from movae_fast.ops.project_weights import Mode, check_options
from movae_fast.reference import Regularizer

# Of the strict projection: small enough that no cosine falls below -1e-3, large enough for float64.
STRICT_REG_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class FusedProjector(DualConeProjector):
    """The projection for TorchJD's own classes: `torchjd.aggregation.UPGrad(projector=FusedProjector())`.

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


def _shown(norm_eps: float, reg_eps: float, regularizer: Regularizer) -> str:
    """The options as in a call; TorchJD has no regularizer but the trace, so that one is not named."""
    text = f"norm_eps={norm_eps}, reg_eps={reg_eps}"
    return text if regularizer == "trace" else f"{text}, regularizer={regularizer!r}"


class ProjectionWeighting(GramianWeighting):
    """The weights of UPGrad or DualProj from a Gramian [m, m], in its dtype."""

    def __init__(
        self,
        mode: Mode,
        pref_vector: Tensor | None,
        norm_eps: float,
        reg_eps: float,
        regularizer: Regularizer = "trace",
    ) -> None:
        super().__init__(pref_vector)
        check_options(norm_eps, reg_eps, mode, regularizer)
        self.mode, self.norm_eps, self.reg_eps, self.regularizer = mode, norm_eps, reg_eps, regularizer

    @torch.no_grad()
    def forward(self, gramian: Tensor, /) -> Tensor:
        weights, _ = ops.project_weights(
            gramian,
            self.pref_vector,
            norm_eps=self.norm_eps,
            reg_eps=self.reg_eps,
            mode=self.mode,
            regularizer=self.regularizer,
        )
        return weights.to(gramian.dtype)

    def of_rows(self, matrix: Tensor) -> Tensor:
        """Return the weights, float64, of a Jacobian [m, P]: Gramian and projection in one call."""
        weights, _, _ = ops.upgrad_weights(
            matrix,
            self.pref_vector,
            norm_eps=self.norm_eps,
            reg_eps=self.reg_eps,
            mode=self.mode,
            regularizer=self.regularizer,
        )
        return weights


class ProjectionAggregator(FusedAggregator):
    """What UPGrad and DualProj have in common: the update [P] of a Jacobian [m, P].

    pref_vector: [m], on the rows' device; None is 1/m each. A preference of zero or less adds nothing.
    norm_eps, reg_eps, regularizer: of the regularized Gramian (`ops.project_weights`); TorchJD's defaults.

    aggregator(jacobian [m, P]) is the update [P] in the Jacobian's dtype; NaN where the Gramian is not finite.
    """

    mode: Mode
    gramian_weighting: ProjectionWeighting

    def __init__(
        self,
        pref_vector: Tensor | None = None,
        norm_eps: float = 1e-4,
        reg_eps: float = 1e-4,
        regularizer: Regularizer = "trace",
    ) -> None:
        super().__init__(ProjectionWeighting(self.mode, pref_vector, norm_eps, reg_eps, regularizer))

    @classmethod
    def strict(cls, pref_vector: Tensor | None = None, reg_eps: float = STRICT_REG_EPS) -> Self:
        """Make an aggregator whose update conflicts with no row, whatever the rows' lengths."""
        return cls(pref_vector, norm_eps=0.0, reg_eps=reg_eps, regularizer="diagonal")

    @property
    def pref_vector(self) -> Tensor | None:
        return self.gramian_weighting.pref_vector

    def __repr__(self) -> str:
        inner = self.gramian_weighting
        options = _shown(inner.norm_eps, inner.reg_eps, inner.regularizer)
        return f"{type(self).__name__}(pref_vector={inner.pref_vector!r}, {options})"


class UPGrad(ProjectionAggregator):
    """Projects each row, weighted by the preference, onto the dual cone of all rows, and adds up."""

    mode = "upgrad"


class DualProj(ProjectionAggregator):
    """Projects the rows' weighted mean onto the dual cone of all rows."""

    mode = "dualproj"
