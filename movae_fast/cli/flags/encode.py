"""Define and check the flags of `movae encode`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from movae_fast.cli import parsing
from movae_fast.training.limits import POSITIVE, check_values
from movae_fast.training.run_list import find_run

DESCRIPTION = "Encode a split once, into one file that later commands map: movae encode RUN --split train"


@dataclass
class EncodeConfig:
    """Encoding.

    Args:
        weights: The run's folder or a checkpoint; may stand first without its flag.
        split: The split of the run's dataset to encode, to codes or to means and log-variances.
        beta: Beta of a multi-rate model; the default is 1, or the end of its range that is nearest to it.
        batch_size: Images at a time.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        data_dir: Folder of the original files, if not where training had it.
    """

    weights: str
    split: Literal["train", "test"] = "train"
    beta: float | None = None
    batch_size: int = 500
    device: str = "auto"
    data_dir: str | None = None


def parse(argv: Sequence[str]) -> EncodeConfig:
    """Return the flags, checked by themselves. Raises ValueError."""
    words = parsing.first_word_as("weights", argv)
    which = "which model? give the run's folder: movae encode RUN, or --weights FILE"
    config = parsing.read_flags(EncodeConfig, "encode", DESCRIPTION, words, "weights", which)
    check_values(config, beta=POSITIVE)
    config.weights = str(find_run(config.weights))
    return config
