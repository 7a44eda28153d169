"""Find the device that a flag names."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`. Asking for CUDA where there is none is an error, never a silent CPU
    run.

    A GPU that is named by its number becomes the current one: streams and kernels are its own then.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = parsed_device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device; use --device cpu, or see `movae doctor`")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA device(s)")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def check_device(name: str) -> None:
    """Raise ValueError for a device that no machine has; whether this one has it, `resolve_device` says."""
    if name != "auto":
        parsed_device(name)


def parsed_device(name: str) -> torch.device:
    """Return the device called `name`, whether this machine has it or not. Raises ValueError for a name
    that is not a device's."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: unknown; valid: auto, cpu, cuda, cuda:0, …") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: only cpu and cuda devices are supported")
    if device.type == "cpu" and device.index:
        raise ValueError(f"--device {name}: there is one CPU device, whatever its processors: cpu")
    return torch.device("cpu") if device.type == "cpu" else device
