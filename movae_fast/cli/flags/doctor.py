"""The flags of `movae doctor`."""

from __future__ import annotations

from collections.abc import Sequence

HELP = """`movae doctor`: versions, devices, which path each op takes, what is missing and how to get it.

`movae doctor --gpu` tries every GPU: each op against the CPU, in a CUDA graph, in training, DALI, nccl. It
takes up to three minutes and prints a row a check; the exit status is 1 if one failed or there is no GPU."""


def parse(argv: Sequence[str]) -> bool:
    """Return whether --gpu is asked for. Raises ValueError for any other flag."""
    if list(argv) == ["--gpu"]:
        return True
    if argv and argv[0] not in ("-h", "--help"):
        raise ValueError(f"doctor takes no flag but --gpu, got {' '.join(argv)}")
    if argv:
        print(HELP)
        raise SystemExit(0)
    return False
