"""Measure the memory that is available for a dataset."""

from __future__ import annotations

import os
from pathlib import Path

import torch

RESIDENT_FRACTION = 0.4  # The part of the free memory that a set may take unless the user says otherwise.


def free_memory(device: torch.device) -> int:
    """Return the free bytes of the device; on a CPU the free memory divided by the number of local
    processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    lines = dict(line.split(":", 1) for line in text.splitlines())
    free = int(lines.get("MemAvailable", "0 kB").split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup", f"memory.{name}") for name in ("max", "current"))
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def all_memory(device: torch.device) -> int:
    """Return the total bytes of memory, used or free: of the GPU, or of this machine or its container."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return min(here, int(text)) if text.isdigit() else here
