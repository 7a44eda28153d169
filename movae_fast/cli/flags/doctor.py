"""Define and check the flags of `movae doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HELP = """`movae doctor`: versions, devices, which path each op takes, what is missing and how to get it.

`movae doctor --gpu` tries every GPU: each op against the CPU, in a CUDA graph, in training, DALI, nccl. It
takes up to three minutes and prints a row a check; the exit status is 1 if one failed or there is no GPU."""


@dataclass
class DoctorFlags:
    """Hold the flags of `movae doctor`: whether to check the GPUs instead of printing the report."""

    gpu: bool = False


def parse(argv: Sequence[str]) -> DoctorFlags | int:
    """Return the flags of `movae doctor`, or the exit status 0 after printing the help. Raises ValueError for
    any other flag."""
    if list(argv) == ["--gpu"]:
        return DoctorFlags(gpu=True)
    if argv and argv[0] not in ("-h", "--help"):
        raise ValueError(f"doctor takes no flag but --gpu, got {' '.join(argv)}")
    if argv:
        print(HELP)
        return 0
    return DoctorFlags()
