"""Aggregate the rows of a Jacobian to one update."""

from movae_fast.aggregation.upgrad import DualProj, FusedProjector, UPGrad
from movae_fast.aggregation.weightings import IMTLG, MGDA, AlignedMTL, CAGrad, PCGrad

__all__ = ["IMTLG", "MGDA", "AlignedMTL", "CAGrad", "DualProj", "FusedProjector", "PCGrad", "UPGrad"]
