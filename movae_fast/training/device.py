"""Turn the name of a device into a torch.device, and check it."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`, "auto" being CUDA where there is a GPU.

    Raises ValueError for a device that this machine does not have; CUDA never silently becomes a CPU. A GPU
    that is named by number becomes torch's current device, so that streams and kernels are its own.
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
    """Raise ValueError if `name` is not the name of a device; `resolve_device` checks whether this machine has
    it."""
    if name != "auto":
        parsed_device(name)


def parsed_device(name: str) -> torch.device:
    """Return the device called `name`, whether or not this machine has it. Raises ValueError for any other
    text."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: unknown; valid: auto, cpu, cuda, cuda:0, …") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: only cpu and cuda devices are supported")
    if device.type == "cpu" and device.index:
        raise ValueError(f"--device {name}: there is one CPU device, whatever its processors: cpu")
    return torch.device("cpu") if device.type == "cpu" else device
