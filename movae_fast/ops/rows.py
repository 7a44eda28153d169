"""What the ops on a Jacobian's rows share: the checks, the library they register in, the CPU path's name."""

import importlib
from typing import Any, NoReturn

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Set by tests to force a path on a CPU; "" takes the widest that it has (see ops.nearest_code).
isa = ""

# Library rather than custom_op: a third of the cost of a call, which is what a small Jacobian pays.
library = torch.library.Library("movae", "FRAGMENT")


def check_rows(op: str, rows: Tensor) -> None:
    """One error that shows what is wrong with rows."""
    if rows.dim() != 2:
        raise ValueError(f"{op}: rows must be [m, P], got {list(rows.shape)}")
    if rows.dtype not in DTYPES:
        raise TypeError(f"{op}: rows must be float32, float64, bfloat16 or float16, got {str(rows.dtype)[6:]}")


def row_view(rows: Tensor) -> tuple[Tensor, int]:
    """The rows with contiguous columns, and the stride from one to the next."""
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def triton_kernels(stem: str) -> Any:
    """movae_fast.kernels.<stem>, imported when the first CUDA tensor comes in: Triton is not everywhere."""
    return importlib.import_module(f"movae_fast.kernels.{stem}")


def refuse_vmap(op: str, remedy: str) -> None:
    """Make vmap over `op` a clear error."""

    def refuse(*_: Any) -> NoReturn:
        raise NotImplementedError(f"movae::{op} has no vmap rule: {remedy}")

    torch.library.register_vmap(f"movae::{op}", refuse)
