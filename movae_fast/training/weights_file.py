"""Write and read weights as safetensors: one file with the configuration in its header, and no code in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from movae_fast.files import naming, replacing
from movae_fast.names import first_line

NAME = "model.safetensors"  # in a folder of exported weights
FORMAT = "movae-fast weights"
VERSION = 1  # of the format; a file of a later one is refused


def save_weights(path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write the weights and their configuration to a file, whole or not at all."""
    from safetensors.torch import save

    # Every tensor with memory of its own, as the format asks for.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    header = {"format": FORMAT, "version": str(VERSION), "config": json.dumps(dict(config))}
    with replacing(path, durable=True) as file:
        file.write(save(tensors, metadata=header))


def load_weights(path: Path) -> dict[str, Any]:
    """Return `config` and `model`, as the sections of a checkpoint, of a file of weights.

    Raises ValueError for a file that is damaged, of another program or of a newer version.
    """
    from safetensors import SafetensorError, safe_open

    with naming(path):
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                config = read_header(path, header)
                return {"config": config, "model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{path} is truncated, damaged or no safetensors file ({first_line(error)[:160]})"
            ) from None


def read_header(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """Return the configuration of a file's header. Raises ValueError for one that is not ours."""
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} holds no weights of movae-fast: `movae export RUN` writes such files")
    version = header.get("version", "")
    if not version.isdecimal() or int(version) > VERSION:
        raise ValueError(
            f"{path} is of version {version[:20]} of its format, and this movae-fast reads up to {VERSION}: "
            "install a newer one (pip install -U movae-fast)"
        )
    try:
        config = json.loads(header["config"])
    except (KeyError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: its header has no configuration")
    return config
