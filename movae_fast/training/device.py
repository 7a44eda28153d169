"""Find the device that a flag names."""

from __future__ import annotations

import torch

from movae_fast.training.limits import check_device


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`. Asking for CUDA where there is none is an error, never a silent CPU
    run.

    A GPU that is named by its number becomes the current one: streams and kernels are its own then.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(name)
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device; use --device cpu, or see `movae doctor`")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA device(s)")
    if device.type == "cpu":
        return torch.device("cpu")
    if device.index is not None:
        torch.cuda.set_device(device)
    return device
