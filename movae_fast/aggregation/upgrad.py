"""Provide UPGrad and DualProj with TorchJD's interface, computed by the fused ops; usable wherever TorchJD
accepts an aggregator.

Quinton & Rey 2024, "Jacobian Descent for Multi-Objective Optimization" (https://arxiv.org/abs/2406.16232): the
update is a weighted sum of the Jacobian's rows that conflicts with none of them. TorchJD computes the Gramian
in the rows' dtype and solves m quadratic programs one by one on the host. Here the Gramian is float64, the
projection runs on the rows' device, and nothing is read on the host.

The defaults are TorchJD's, whose regularizer is relative to the Gramian's trace: a row much shorter than the
longest is hardly protected. `UPGrad.strict()` and `DualProj.strict()` regularize each row by its own norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchjd.linalg import DualConeProjector, QuadprogProjector
from typing_extensions import Self

from movae_fast import ops
from movae_fast.aggregation.fused import FusedAggregator, GramianWeighting, preference, preference_suffix
from movae_fast.choices import STRICT_REG_EPS, Regularizer
from movae_fast.ops.project_weights import Mode, check_options


@dataclass(frozen=True, kw_only=True)
class FusedProjector(DualConeProjector):
    """Project weights onto the dual cone for TorchJD's own aggregators:
    `torchjd.aggregation.UPGrad(projector=FusedProjector())`.

    norm_eps, reg_eps: as in `torchjd.linalg.QuadprogProjector`. regularizer: what they are relative to, "trace"
    or "diagonal"; see `ops.project_weights`.
    """

    norm_eps: float = 1e-4
    reg_eps: float = 1e-4
    regularizer: Regularizer = "trace"

    def __post_init__(self) -> None:
        check_options(self.norm_eps, self.reg_eps, "dualproj", self.regularizer)

    def __repr__(self) -> str:
        return f"FusedProjector({_shown(self.norm_eps, self.reg_eps, self.regularizer)})"

    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        """Return, for each vector u [m] of U [..., m], the v that minimises v' A v subject to v >= u, in the
        dtype of G."""
        projected, _ = ops.project_rows(
            U, G, norm_eps=self.norm_eps, reg_eps=self.reg_eps, regularizer=self.regularizer
        )
        return projected.to(G.dtype)


def _shown(norm_eps: float, reg_eps: float, regularizer: Regularizer = "trace") -> str:
    """Return the options as text for `repr`; the regularizer is left out if it is "trace", TorchJD's only
    one."""
    text = f"norm_eps={norm_eps}, reg_eps={reg_eps}"
    return text if regularizer == "trace" else f"{text}, regularizer={regularizer!r}"


def _options(projector: DualConeProjector) -> dict[str, Any] | None:
    """Return the keyword arguments of `ops.project_weights` that reproduce a TorchJD projector; None for a
    projector class that the ops cannot reproduce."""
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
    """Compute the weights [m] of UPGrad or DualProj from a Gramian [m, m], in the Gramian's dtype."""

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
        """Return the weights [m] float64 for a Jacobian `matrix` [m, P]: Gramian and projection in one op."""
        options = _options(self.projector)
        if options is None:
            return self._by_projector(ops.gramian(matrix))
        weights, _, _ = ops.upgrad_weights(matrix, self.pref_vector, mode=self.mode, **options)
        return weights

    def _by_projector(self, gramian: Tensor) -> Tensor:  # [m]
        """Compute the weights by calling a TorchJD projector that the fused ops cannot reproduce."""
        u = gramian.new_full((len(gramian),), 1 / len(gramian))
        u = u if self.pref_vector is None else self.pref_vector.to(gramian)
        if self.mode == "dualproj":
            return self.projector(u, gramian)
        return self.projector(u.diag(), gramian).sum(0)


def _epsilon(name: str) -> Any:
    """Return a property of the aggregator that reads and sets the projector's option `name`."""

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
    """Aggregate a Jacobian [m, P] by projection onto the dual cone: the base class of UPGrad, DualProj
    and NUPGrad.

    Calling the aggregator with a Jacobian [m, P] returns the update [P] in the Jacobian's dtype; NaN if the
    Gramian is not finite.

    pref_vector: the preference [m], on the rows' device; None is 1/m each. A preference of zero or less adds
        nothing.
    norm_eps, reg_eps, regularizer: of the regularized Gramian (`ops.project_weights`); the defaults are
        TorchJD's.
    projector: the same options in TorchJD's form, instead: a `torchjd.linalg.QuadprogProjector` (whose problem
        is then solved by the fused op), a `FusedProjector`, or another `DualConeProjector`, which is called. As
        in TorchJD it may be the second argument.

    All of these are attributes that can be read and set. Raises ValueError or TypeError for unsuitable values,
    at construction and when they are set.
    """

    mode: Mode
    weighting_class: ClassVar[type[ProjectionWeighting]] = ProjectionWeighting
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
        super().__init__(self.weighting_class(self.mode, pref_vector, projector))

    @classmethod
    def strict(cls, pref_vector: Tensor | None = None, reg_eps: float = STRICT_REG_EPS) -> Self:
        """Make an aggregator whose update conflicts with no row, however short: it regularizes each row by its
        own norm."""
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
    """Project each row, times its preference, onto the dual cone of all rows, and sum the projections."""

    mode = "upgrad"


class DualProj(ProjectionAggregator):
    """Sum the rows, times their preferences, and project the sum onto the dual cone of all rows."""

    mode = "dualproj"
