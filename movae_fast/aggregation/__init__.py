"""Aggregators: from a Jacobian's rows to one update."""

from movae_fast.aggregation.upgrad import DualProj, FusedProjector, UPGrad

__all__ = ["DualProj", "FusedProjector", "UPGrad"]
