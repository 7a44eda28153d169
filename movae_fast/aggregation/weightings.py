"""Provide AlignedMTL, CAGrad, IMTLG, MGDA and PCGrad with TorchJD's interface, computed by the fused ops.

TorchJD computes the Gramian in the rows' dtype and makes its decisions (for CAGrad, solves a convex program) on
the host. Here the Gramian is float64, `ops.gramian_weights` runs on the rows' device, and nothing is read on
the host; so they work under torch.compile and in CUDA graphs too.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torchjd.aggregation import CAGradWeighting

from movae_fast import ops
from movae_fast.aggregation.fused import FusedAggregator, GramianWeighting, preference, preference_suffix
from movae_fast.ops import extension
from movae_fast.ops.gramian_weights import Method, check_parameters


class MethodWeighting(GramianWeighting):
    """Compute the weights [m] of a method of `ops.gramian_weights` from a Gramian [m, m], in the Gramian's
    dtype."""

    def __init__(self, method: Method, pref_vector: Tensor | None = None, **parameters: float) -> None:
        super().__init__(pref_vector)
        check_parameters(method, **parameters)  # type: ignore[arg-type]
        self.method, self.options = method, parameters

    def forward(self, gramian: Tensor, /) -> Tensor:
        return self.weigh(gramian.detach()).to(gramian.dtype)

    def of_rows(self, matrix: Tensor) -> Tensor:
        return self.weigh(ops.gramian(matrix.detach()))

    def weigh(self, gramian: Tensor) -> Tensor:  # [m] float64
        return ops.gramian_weights(gramian, self.method, self.pref_vector, **self.options)  # type: ignore


class MethodAggregator(FusedAggregator):
    """Aggregate by a method of `ops.gramian_weights`: the base class of AlignedMTL, CAGrad, IMTLG, MGDA and
    PCGrad."""

    gramian_weighting: MethodWeighting

    def __repr__(self) -> str:
        options = self.gramian_weighting.options
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in options.items())})"


class SumWeighting(GramianWeighting):
    """Give each row a weight of 1."""

    def __init__(self) -> None:
        super().__init__(None)

    def forward(self, gramian: Tensor, /) -> Tensor:
        return torch.ones_like(gramian[0])

    def of_rows(self, matrix: Tensor) -> Tensor:
        return torch.ones(len(matrix), dtype=torch.float64, device=matrix.device)


class Sum(FusedAggregator):
    """Aggregate a Jacobian to the sum of its rows.

    Used where the step is projected (`--conflict_free step`), which needs the rows although they are only
    added.
    """

    def __init__(self) -> None:
        super().__init__(SumWeighting())


def _option(name: str) -> Any:
    """Return a property of the aggregator that reads and sets the weighting's option `name`."""

    def read(self: MethodAggregator) -> float:
        return self.gramian_weighting.options[name]

    def write(self: MethodAggregator, value: float) -> None:
        check_parameters(self.gramian_weighting.method, **{name: value})  # type: ignore[arg-type]
        self.gramian_weighting.options[name] = value

    return property(read, write)


class AlignedMTL(MethodAggregator):
    """Make the singular values of the rows equal, then sum the rows (Senushkin et al. 2023).

    pref_vector: the preference [m], on the rows' device; None is 1/m each. scale_mode: what all singular values
    become: their "min", "median" or "rmse" (root mean square).
    """

    pref_vector = preference()

    def __init__(
        self, pref_vector: Tensor | None = None, scale_mode: Literal["min", "median", "rmse"] = "min"
    ) -> None:
        super().__init__(MethodWeighting(_aligned(scale_mode), pref_vector))

    @property
    def scale_mode(self) -> str:
        return self.gramian_weighting.method.removeprefix("aligned_mtl_")

    @scale_mode.setter
    def scale_mode(self, value: str) -> None:
        self.gramian_weighting.method = _aligned(value)

    def __repr__(self) -> str:
        return f"AlignedMTL(pref_vector={self.pref_vector!r}, scale_mode={self.scale_mode!r})"

    def __str__(self) -> str:
        return f"AlignedMTL{preference_suffix(self.pref_vector)}"


def _aligned(scale_mode: str) -> Method:
    if scale_mode not in ("min", "median", "rmse"):
        raise ValueError(f"scale_mode must be min, median or rmse; got {scale_mode!r}")
    return f"aligned_mtl_{scale_mode}"  # type: ignore[return-value]


class CAGrad(MethodAggregator):
    """Find the update within a distance of c |mean| from the rows' mean whose smallest inner product with a row
    is largest (Liu et al. 2021).

    c: the radius, relative to the mean's length. norm_eps: see `ops.gramian_weights`. The problem is solved
    exactly. TorchJD's interior-point solver stops some 1e-8 of the squared gradients short of the optimum, so
    its update differs from this one by about 1e-5 of its length (median 8e-6, at most 3e-4 over 400 Jacobians
    of three rows).
    """

    c = _option("c")
    norm_eps = _option("norm_eps")

    def __init__(self, c: float, norm_eps: float = 1e-4) -> None:
        if extension.csrc is None:
            CAGradWeighting(c)  # the fallback; it raises now if its solver is missing
        super().__init__(MethodWeighting("cagrad", c=c, norm_eps=norm_eps))

    def __str__(self) -> str:
        return f"CAGrad{str(self.c).removesuffix('.0')}"


class IMTLG(MethodAggregator):
    """Find the update whose projections onto the directions of all rows are equal (Liu et al. 2021, "Towards
    Impartial Multi-task Learning")."""

    def __init__(self) -> None:
        super().__init__(MethodWeighting("imtl_g"))


class MGDA(MethodAggregator):
    """Find the shortest vector in the convex hull of the rows, by Frank-Wolfe steps (Sener & Koltun 2018).

    epsilon: the step size below which the iteration stops; max_iters: the largest number of iterations.
    """

    epsilon = _option("epsilon")
    max_iters = _option("max_iters")

    def __init__(self, epsilon: float = 0.001, max_iters: int = 100) -> None:
        super().__init__(MethodWeighting("mgda", epsilon=epsilon, max_iters=max_iters))


class PCGrad(MethodAggregator):
    """Remove from each row its components against the other rows, in random order, and sum the results (Yu et
    al. 2020).

    The orders are drawn on the rows' device from torch's generator. They have the distribution of TorchJD's,
    not the same values, since TorchJD draws them one by one on the CPU.
    """

    def __init__(self) -> None:
        super().__init__(MethodWeighting("pcgrad"))
