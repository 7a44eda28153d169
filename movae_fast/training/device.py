"""Turn the name of a device into a torch.device, and check it."""

from __future__ import annotations

import torch

from movae_fast.training.limits import check_device


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`, "auto" being CUDA where there is a GPU.

    Raises ValueError for a device that this machine does not have; CUDA never silently becomes a CPU. A GPU
    that is named by number becomes torch's current device, so that streams and kernels are its own.
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
