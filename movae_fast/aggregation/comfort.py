"""Provide COMFORT, MO-VAE's mixture of MGDA and UPGrad that changes in the course of training, on the
Gramian."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from movae_fast import ops
from movae_fast.aggregation.fused import FusedAggregator, GramianWeighting
from movae_fast.aggregation.upgrad import FusedProjector, ProjectionWeighting
from movae_fast.aggregation.weightings import MethodWeighting
from movae_fast.choices import STRICT_REG_EPS, Regularizer

# Each option of the mixture -> the least value, and whether it is one itself.
LEAST = {"k": (0.0, True), "a": (0.0, False), "first": (0.0, True), "last": (0.0, True)}


class MixtureWeighting(GramianWeighting):
    """Compute the weights [m] of COMFORT from a Gramian [m, m], in the Gramian's dtype."""

    progress: Tensor  # [] float64

    def __init__(self, mgda: MethodWeighting, upgrad: ProjectionWeighting, **options: float) -> None:
        super().__init__(None)
        self.mgda, self.upgrad, self.options = mgda, upgrad, options
        # On the rows' device and changed in place, so that a recorded step reads the present value.
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64), persistent=False)

    def beta(self) -> Tensor:  # [] float64
        """Return the part of UPGrad in the mixture at the present progress."""
        k, a, first, last = (self.options[name] for name in LEAST)
        done = self.progress.double() ** a
        risen = torch.expm1(-k * done) / math.expm1(-k) if k else done
        return first + (last - first) * risen

    @torch.no_grad()
    def forward(self, gramian: Tensor, /) -> Tensor:
        wide, beta = gramian.detach().double(), self.beta()
        return ((1 - beta) * self.mgda(wide) + beta * self.upgrad(wide)).to(gramian.dtype)

    @torch.no_grad()
    def of_rows(self, matrix: Tensor) -> Tensor:
        return self(ops.gramian(matrix))


def _option(name: str) -> Any:
    """Return a property of the aggregator that reads and sets the mixture's option `name`."""

    def read(self: COMFORT) -> float:
        return self.gramian_weighting.options[name]

    def write(self: COMFORT, value: float) -> None:
        check_option(name, value)
        self.gramian_weighting.options[name] = value

    return property(read, write)


def check_option(name: str, value: float) -> None:
    """Raise ValueError for a value of COMFORT's k, a, first or last outside its range."""
    least, itself = LEAST[name]
    most = 1.0 if name in ("first", "last") else math.inf
    if not ((value >= least if itself else value > least) and value <= most and math.isfinite(value)):
        words = "from 0 to 1" if most == 1 else f"finite and {'>=' if itself else '>'} {least:g}"
        raise ValueError(f"{name} must be {words}; got {value}")


class COMFORT(FusedAggregator):
    """Mix the updates of MGDA and UPGrad, (1 - beta) MGDA + beta UPGrad, with a beta that rises in training
    (MO-VAE).

    At progress p, from 0 at the first step to 1 at the last, beta = first + (last - first) (1 - exp(-k p^a)) /
    (1 - exp(-k)); k = 0 stands for the limit p^a. `movae train` sets `progress` before each step; in a loop of
    your own, assign it.

    k, a, first, last: of that schedule, >= 0, > 0, and from 0 to 1. epsilon, max_iters: MGDA's. norm_eps,
    reg_eps, regularizer: UPGrad's. All are attributes that can be read; k, a, first, last and progress can be
    set. Raises ValueError for unsuitable values.
    """

    gramian_weighting: MixtureWeighting

    k, a, first, last = (_option(name) for name in LEAST)

    def __init__(
        self,
        k: float = 1.0,
        a: float = 1.0,
        first: float = 0.01,
        last: float = 1.0,
        epsilon: float = 1e-5,
        max_iters: int = 250,
        norm_eps: float = 1e-4,
        reg_eps: float = 1e-4,
        regularizer: Regularizer = "trace",
    ) -> None:
        options = {"k": k, "a": a, "first": first, "last": last}
        for name, value in options.items():
            check_option(name, value)
        projector = FusedProjector(norm_eps=norm_eps, reg_eps=reg_eps, regularizer=regularizer)
        mgda = MethodWeighting("mgda", epsilon=epsilon, max_iters=max_iters)
        super().__init__(MixtureWeighting(mgda, ProjectionWeighting("upgrad", None, projector), **options))

    @classmethod
    def strict(cls, **options: float) -> COMFORT:
        """Make a COMFORT whose UPGrad regularizes each row by its own norm, as `UPGrad.strict` does."""
        settings: dict[str, Any] = {"norm_eps": 0.0, "reg_eps": STRICT_REG_EPS, "regularizer": "diagonal"}
        return cls(**{**settings, **options})

    @property
    def progress(self) -> float:
        return float(self.gramian_weighting.progress)

    @progress.setter
    def progress(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"progress must be from 0 to 1; got {value}")
        self.gramian_weighting.progress.fill_(value)

    def __repr__(self) -> str:
        weighting = self.gramian_weighting
        options = {**weighting.options, **weighting.mgda.options}
        shown = ", ".join(f"{name}={value}" for name, value in options.items())
        return f"COMFORT({shown}, projector={weighting.upgrad.projector!r})"
