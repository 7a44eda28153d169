"""Choose a kernel's tile sizes: time a few candidates once per GPU model and shape, and keep the fastest on
disk.

MOVAE_AUTOTUNE=0 turns timing off (the first candidate is taken); MOVAE_AUTOTUNE_CACHE names the file, by
default ~/.cache/movae_fast/autotune.json. While a CUDA graph is being captured nothing is timed.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

Config = dict[str, Any]
_chosen: dict[str, Config] = {}


def cache_file() -> Path:
    default = Path.home() / ".cache" / "movae_fast" / "autotune.json"
    return Path(os.environ.get("MOVAE_AUTOTUNE_CACHE", default))


def _read() -> dict[str, Config]:
    try:
        stored = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _write(key: str, config: Config) -> None:
    """Add one entry to the cache file, which is replaced by a rename so that readers never see half a file.

    A folder that cannot be written is not an error.
    """
    path = cache_file()
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**_read(), key: config}, indent=1))
        temporary.replace(path)
    except OSError:
        pass


def milliseconds(run: Callable[[], Any]) -> float:
    return float(triton.testing.do_bench(run, warmup=5, rep=20))


def best(
    name: str,
    shape: tuple[Any, ...],
    candidates: list[Config],
    run: Callable[[Config], Any],
    tensor: torch.Tensor,
) -> Config:
    """Return the candidate configuration that is fastest for `shape` on the device of `tensor`, from the cache
    or by timing `run(candidate)`.

    Returns the first candidate on a CPU, while a CUDA graph is captured, and where timing is turned off.
    """
    if tensor.device.type != "cuda" or len(candidates) == 1:
        return candidates[0]
    key = "/".join(map(str, (name, torch.cuda.get_device_name(tensor.device), triton.__version__, *shape)))
    if key in _chosen:
        return _chosen[key]
    stored = _read().get(key)
    if stored in candidates:
        _chosen[key] = stored
        return stored
    if os.environ.get("MOVAE_AUTOTUNE") == "0" or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    times = []
    for config in candidates:
        try:
            times.append(milliseconds(lambda config=config: run(config)))
        except triton.runtime.errors.OutOfResources:
            times.append(float("inf"))
    _chosen[key] = candidates[times.index(min(times))]
    _write(key, _chosen[key])
    return _chosen[key]
