"""Read and write checkpoints: one file with all that a bit-exact resume needs, written atomically and durably.

A file holds plain containers and tensors only, so it loads with `weights_only=True`. Each section carries a
digest of its contents, and a file whose contents do not match is refused with the sections' names.
"""

from __future__ import annotations

import errno
import hashlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from movae_fast.files import naming, replacing
from movae_fast.names import first_line
from movae_fast.training.run_list import listed

FORMAT = "movae-fast checkpoint 1"
NOT_READABLE = (None, errno.EINVAL)  # OSErrors of torch's reader at a place that a truncated file does not have


class CheckpointError(ValueError):
    """Say why a checkpoint cannot be used, and what differs."""


def digest(value: Any) -> str:
    """Return the SHA-256 over nested containers, numbers, strings and the bytes, shapes and dtypes of
    tensors."""
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
    """Wrap a file and remember its OSError, which torch's writer would replace by an error of its own."""

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
    """Write the sections to `path`: to a temporary file, synced, then renamed over, then the folder synced.

    Whatever moment the machine dies at, `path` is either the old file or the new one, whole. Raises the OSError
    of a disk that is full, with `path`.
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
    """Return the sections of a checkpoint.

    Raises CheckpointError for one that is missing, truncated or altered, OSError for one that may not be read
    and MemoryError for one that is larger than the memory.
    """
    with naming(path):
        if not path.is_file():
            raise CheckpointError(f"no checkpoint at {path}")
        try:
            content = torch.load(path, map_location=device, weights_only=True)
        except MemoryError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno not in NOT_READABLE:
                raise
            raise CheckpointError(
                f"{path} is truncated, damaged or not a checkpoint ({first_line(error)[:160]})"
            ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
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
    """Return the checkpoint that `path` means (see `find`) and its sections.

    Of one that is damaged, the CheckpointError names those beside it that are whole.
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
    """Return the checkpoints of `folder` from which a run can go on, and their steps: the latest first, and
    `last` before others of the same step."""
    checkpoints = []
    for path in sorted(folder.glob("*.pt"), key=lambda p: (p.name != "last.pt", p.name)):
        try:
            checkpoints.append((path, int(load(path)["position"]["step"])))
        except (CheckpointError, KeyError):
            continue
    return sorted(checkpoints, key=lambda entry: -entry[1])


def load_model(model: torch.nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load weights into the model; a CheckpointError says which tensors differ if they do not fit."""
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
    """Return the weights that a checkpoint's model is used with: averages, where the run kept them."""
    return {**content["model"], **content.get("average", {})}


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def rng_state(device: torch.device | None = None) -> dict[str, Any]:
    """Return the state of every random generator that training on `device` draws from.

    device: the run's; None is the current one of CUDA, where there is CUDA.
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
    """Put back what `rng_state` took, on whatever `device` this process has now.

    Every process of a run draws the noise of the global batch and takes its slice of it, so all of them go on
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
    """Return the number of the GPU that `device` names, the current one where it names none; None for a CPU
    or without CUDA."""
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    if device is None or device.index is None:
        return torch.cuda.current_device()
    return device.index


def _drawn_from(states: list[Tensor]) -> Tensor:
    """Return the state of the generator that the run drew from.

    Older checkpoints hold one for each GPU that process 0 saw. They began alike, and only the run's own moved:
    a state is a seed and, in its last eight bytes, how far it has been drawn from.
    """
    return max(states, key=lambda s: int.from_bytes(bytes(s[-8:].tolist()), "little"))


def find(path: Path) -> Path:
    """Return the checkpoint that `path` means: itself, or a run folder's `last`, or its `best`."""
    if path.is_dir():
        for name in ("last.pt", "best.pt"):
            candidate = path / "checkpoints" / name
            if candidate.is_file():
                return candidate
        inside = listed(path)
        raise CheckpointError(
            f"{path} is no run: no checkpoints/last.pt in it" + (f"; {inside}" if inside else "")
        )
    if not path.exists():
        raise CheckpointError(f"no checkpoint or run at {path}")
    return path
