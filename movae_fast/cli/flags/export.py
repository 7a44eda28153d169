"""Define and check the flags of `movae export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from movae_fast.cli import parsing
from movae_fast.training.run_list import find_run

DESCRIPTION = "A trained model for other programs: movae export RUN --format onnx"


@dataclass
class ExportConfig:
    """Export.

    Args:
        weights: The run's folder or a checkpoint; may stand first without its flag.
        format: `safetensors`, which every command and movae_fast.load take for a RUN; or, beside those weights,
            a program for each part of the model, with a batch of any size: `torch_export` (.pt2) or `onnx`
            (extra `onnx`).
        outdir: New folder for the files; the default is export_FORMAT/ in the run's folder, numbered.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
    """

    weights: str
    format: Literal["safetensors", "torch_export", "onnx"] = "safetensors"
    outdir: str | None = None
    device: str = "cpu"


def parse(argv: Sequence[str]) -> ExportConfig:
    """Return the flags, checked by themselves. Raises ValueError."""
    which = "which model? give the run's folder: movae export RUN, or --weights FILE"
    words = parsing.first_word_as("weights", argv)
    config = parsing.read_flags(ExportConfig, "export", DESCRIPTION, words, "weights", which)
    config.weights = str(find_run(config.weights))
    return config
