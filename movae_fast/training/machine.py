"""Write down which machine and which versions a run was trained with."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from movae_fast import __version__

NAME = "machine.jsonl"  # in a run's folder: a line each time that it was started or resumed


def machine(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Return the machine and the versions that this process computes with."""
    on_gpu = device.type == "cuda"
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "cores": len(os.sched_getaffinity(0)),
        "processes": processes,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "movae_fast": __version__,
    }


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_machine(folder: Path, device: torch.device, step: int, processes: int) -> None:
    """Add a line on this machine to the run's folder; `step` is where it starts."""
    line = {"step": step} | machine(device, processes)
    with (folder / NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
