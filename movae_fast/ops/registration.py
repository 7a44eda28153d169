"""Register the ops with torch: the library, the Triton files, and the refusal of vmap."""

import importlib
from typing import Any, NoReturn

import torch

# Library rather than custom_op: a third of the cost of a call, which is what a small Jacobian pays.
library = torch.library.Library("movae", "FRAGMENT")


def triton_kernels(stem: str) -> Any:
    """Return movae_fast.kernels.<stem>, imported at the first CUDA tensor: Triton is not everywhere."""
    return importlib.import_module(f"movae_fast.kernels.{stem}")


def refuse_vmap(op: str, remedy: str) -> None:
    """Make vmap over `op` a clear error."""

    def refuse(*_: Any) -> NoReturn:
        raise NotImplementedError(f"movae::{op} has no vmap rule: {remedy}")

    torch.library.register_vmap(f"movae::{op}", refuse)
