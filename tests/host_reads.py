"""A guard for code that must not wait for a device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostRead(TorchDispatchMode):
    """Refuses what makes a CUDA stream wait for the host: values read, shapes that depend on values."""

    REFUSED = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "equal",
        "is_nonzero",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.REFUSED or any(m is not None and m.dtype == torch.bool for m in masks):
            raise AssertionError(f"{func} reads a device value on the host")
        return func(*args, **(kwargs or {}))
