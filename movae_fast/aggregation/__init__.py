"""Provide the aggregators that run on the fused ops: modules that turn a Jacobian [m, P] into an update [P]."""

from typing import TYPE_CHECKING

from movae_fast import lazy

if TYPE_CHECKING:
    from movae_fast.aggregation.comfort import COMFORT
    from movae_fast.aggregation.nupgrad import NUPGrad
    from movae_fast.aggregation.upgrad import DualProj, FusedProjector, UPGrad
    from movae_fast.aggregation.weightings import IMTLG, MGDA, AlignedMTL, CAGrad, PCGrad

__getattr__, __dir__ = lazy.exports(
    __name__,
    {
        "comfort": ("COMFORT",),
        "nupgrad": ("NUPGrad",),
        "upgrad": ("DualProj", "FusedProjector", "UPGrad"),
        "weightings": ("IMTLG", "MGDA", "AlignedMTL", "CAGrad", "PCGrad"),
    },
)

__all__ = [
    "COMFORT",
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "CAGrad",
    "DualProj",
    "FusedProjector",
    "NUPGrad",
    "PCGrad",
    "UPGrad",
]
