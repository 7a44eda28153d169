"""Check the arguments of the ops on a Jacobian's rows, and choose their implementation on CUDA."""

from torch import Tensor

from movae_fast.ops import extension
from movae_fast.ops.extension import DTYPES

# The projection's path on CUDA: "triton", "cuda" (C++, where it was built), or "" for the default. Set by
# tests, benchmarks and `movae doctor --gpu`, which compare the two: they share no code.
cuda_path = ""


def by_cuda_cpp() -> bool:
    """Return whether the projection on CUDA runs the C++ extension's kernel rather than the Triton one."""
    # Triton is the default: on an H200 it projects three times as fast (benchmarks/results/nvidia-h200.md).
    return cuda_path == "cuda" and not extension.cuda_missing()


def check_rows(op: str, rows: Tensor) -> None:
    """Raise ValueError or TypeError if `rows` is not a Jacobian [m, P] of a supported dtype; the message names
    `op`."""
    if rows.dim() != 2:
        raise ValueError(f"{op}: rows must be [m, P], got {list(rows.shape)}")
    if rows.dtype not in DTYPES:
        raise TypeError(f"{op}: rows must be float32, float64, bfloat16 or float16, got {str(rows.dtype)[6:]}")


def row_view(rows: Tensor) -> tuple[Tensor, int]:
    """Return the rows, copied if their columns are not contiguous, and the stride between rows."""
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)
