"""Read and write checkpoints: a file with everything that a bit-exact resume needs, written atomically and
durably.

A file holds only plain containers and tensors, so it can be loaded with `weights_only=True`. It stores a digest
of each of its sections; a file whose sections do not match their digests is refused.
"""

from __future__ import annotations

import errno
import hashlib
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from movae_fast.files import naming, replacing
from movae_fast.names import first_line
from movae_fast.training.run_list import listed
from movae_fast.training.weights_file import NAME as WEIGHTS
from movae_fast.training.weights_file import load_weights

FORMAT = "movae-fast checkpoint 1"
# Errno of OSErrors that torch's reader raises beyond a truncated file's end.
NOT_READABLE = (None, errno.EINVAL)


class CheckpointError(ValueError):
    """Report that a checkpoint cannot be used, and why."""


def digest(value: Any) -> str:
    """Return the SHA-256 of a value: nested containers of numbers, strings and tensors (bytes, shape and
    dtype)."""
    sha = hashlib.sha256()

    def feed(v: Any) -> None:
        if isinstance(v, Tensor):
            data = v.detach().cpu().contiguous()
            sha.update(f"tensor {data.dtype} {tuple(data.shape)}".encode())
            if data.numel():
                sha.update(data.view(-1).view(torch.uint8).numpy().data)
        elif isinstance(v, Mapping):
            sha.update(f"map {len(v)}".encode())
            for key in v:
                feed(key)
                feed(v[key])
        elif isinstance(v, list | tuple):
            sha.update(f"list {len(v)}".encode())
            for item in v:
                feed(item)
        else:
            sha.update(f"{type(v).__name__} {v!r}".encode())

    feed(value)
    return sha.hexdigest()


class Failing:
    """Wrap a file that torch.save writes to, and keep the OSError of a failed write, which torch replaces by an
    error of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.error = file, OSError()

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save(path: Path, sections: Mapping[str, Any]) -> None:
    """Write the sections to `path` atomically and durably.

    Whenever the machine fails, `path` is either the whole old file or the whole new one. Raises OSError, which
    names `path`, for example for a full disk.
    """
    content = {"format": FORMAT, "digests": {k: digest(v) for k, v in sections.items()}, **sections}
    with replacing(path, durable=True) as file:
        failing = Failing(file)
        try:
            torch.save(content, failing)  # type: ignore[arg-type]
        except RuntimeError:
            if failing.error.errno is None:
                raise
            raise failing.error from None


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the sections of the checkpoint at `path`, with tensors on `device`; of a file of weights alone
    (safetensors) those that it has.

    Raises CheckpointError for a file that is missing, truncated or altered, OSError for one that may not be
    read, and MemoryError for one that does not fit the memory.
    """
    with naming(path):
        if not path.is_file():
            raise CheckpointError(f"no checkpoint at {path}")
        if path.suffix == ".safetensors":
            return load_weights(path)
        try:
            content = torch.load(path, map_location=device, weights_only=True)
        except MemoryError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno not in NOT_READABLE:
                raise
            reason = first_line(error)[:160]
            # Torch's advice for pickles that the user trusts says nothing about this file.
            why = "" if reason.startswith("Weights only load failed") else f" ({reason})"
            raise CheckpointError(f"{path} is truncated, damaged or not a checkpoint{why}") from None
    written = content.get("format") if isinstance(content, dict) else None
    if written != FORMAT:
        if isinstance(written, str) and re.fullmatch(r"movae-fast checkpoint \d{1,9}", written):
            raise CheckpointError(
                f"{path} is a checkpoint of a newer movae-fast ({written.split()[-1]}, this one reads "
                f"{FORMAT.split()[-1]}): install it (pip install -U movae-fast)"
            )
        raise CheckpointError(f"{path} is not a checkpoint of movae-fast")
    digests = content.pop("digests", {})
    if not isinstance(digests, dict):
        raise CheckpointError(f"{path} was altered after it was written: it has no digests")
    del content["format"]
    names = sorted({*map(str, digests), *map(str, content)})
    altered = [k for k in names if k not in content or digests.get(k) != digest(content[k])]
    if altered:
        raise CheckpointError(
            f"{path} was altered after it was written; these parts differ: {', '.join(altered)[:200]}"
        )
    return content


def read(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the path of the checkpoint that `path` means (see `find`), and its sections.

    If it is damaged, the CheckpointError also names the undamaged checkpoints in the same folder.
    """
    path = find(path)
    try:
        return path, load(path)
    except CheckpointError as error:
        checkpoints = whole(path.parent)
        if not checkpoints:
            raise
        shown = ", ".join(f"{other} (step {step:,})" for other, step in checkpoints[:3])
        more = f" and {len(checkpoints) - 3} more" if len(checkpoints) > 3 else ""
        raise CheckpointError(f"{str(error)[:300]}; whole beside it: {shown}{more}") from None


def whole(folder: Path) -> list[tuple[Path, int]]:
    """Return the undamaged checkpoints in `folder` from which a run can be resumed, each with its step.

    The latest comes first; of the same step, `last` comes before others.
    """
    checkpoints = []
    for path in sorted(folder.glob("*.pt"), key=lambda p: (p.name != "last.pt", p.name)):
        try:
            checkpoints.append((path, int(load(path)["position"]["step"])))
        except (CheckpointError, KeyError):
            continue
    return sorted(checkpoints, key=lambda entry: -entry[1])


def load_model(model: torch.nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load weights into the model; raise CheckpointError, which names the tensors that differ, if they do not
    fit."""
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    foreign = [k for k in state if k not in own]
    shapes = [
        f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    problems = []
    if missing:
        problems.append(f"lacks {_few(missing)}")
    if foreign:
        problems.append(f"has {_few(foreign)} besides")
    if shapes:
        problems.append(_few(shapes))
    if problems:
        raise CheckpointError(f"{path} is of another model: it {'; '.join(problems)}")
    model.load_state_dict(state)


def evaluated_weights(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights with which a checkpoint's model is evaluated: the averages if the run kept them, else
    the parameters."""
    return {**content["model"], **content.get("average", {})}


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def rng_state(device: torch.device | None = None) -> dict[str, Any]:
    """Return the states of all random generators (torch, CUDA, NumPy, Python) that training on `device` draws
    from.

    device: the run's device; None is the current GPU, if there is CUDA.
    """
    numpy_state = np.random.get_state(legacy=True)
    assert isinstance(numpy_state, tuple)
    kind, words, position, has_gauss, gauss = numpy_state
    version, numbers, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(index)] if (index := _cuda_index(device)) is not None else [],
        "numpy": [
            str(kind),
            torch.as_tensor(np.asarray(words, np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(numbers), gauss_next],
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Restore the random states that `rng_state` returned; `device` is the one this process uses now.

    Every process of a run draws the noise of the global batch and takes its slice of it, so all of them resume
    from the one state that process 0 saved, each on its own GPU.
    """
    torch.set_rng_state(state["torch"].cpu())
    index = _cuda_index(device)
    if state["cuda"] and index is not None:
        torch.cuda.set_rng_state(_drawn_from([s.cpu() for s in state["cuda"]]), index)
    kind, words, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, words.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))


def _cuda_index(device: torch.device | None) -> int | None:
    """Return the number of the GPU that `device` names, of the current GPU if it names none, and None for a CPU
    or without CUDA."""
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    if device is None or device.index is None:
        return torch.cuda.current_device()
    return device.index


def _drawn_from(states: list[Tensor]) -> Tensor:
    """Return, from the saved states of several GPUs' generators, the one that the run drew from.

    Older checkpoints hold one state for each GPU that process 0 saw. They started equal and only the run's own
    advanced: the last eight bytes of a state count how far.
    """
    return max(states, key=lambda s: int.from_bytes(bytes(s[-8:].tolist()), "little"))


def find(path: Path) -> Path:
    """Return the checkpoint that `path` means: `path` itself if it is a file, else the run folder's last.pt or
    best.pt, or the weights in a folder of exported ones.

    Raises CheckpointError if there is none.
    """
    if path.is_dir():
        for name in ("last.pt", "best.pt"):
            candidate = path / "checkpoints" / name
            if candidate.is_file():
                return candidate
        if (path / WEIGHTS).is_file():
            return path / WEIGHTS
        if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
            raise CheckpointError(
                f"{path} is a run without a checkpoint: it has not come to its first one, or ended before it"
            )
        inside = listed(path)
        raise CheckpointError(
            f"{path} is no run: no checkpoints/last.pt in it" + (f"; {inside}" if inside else "")
        )
    if not path.exists():
        raise CheckpointError(f"no checkpoint or run at {path}")
    return path
