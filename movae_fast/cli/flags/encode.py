"""Define and check the flags of `movae encode`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from movae_fast.cli import parsing
from movae_fast.training.limits import POSITIVE, check_values
from movae_fast.training.run_list import find_run

DESCRIPTION = (
    "Encode a split once, into one file that later commands map: movae encode RUN --split train; "
    "or a folder of images: movae encode RUN FOLDER"
)


@dataclass
class EncodeConfig:
    """Encoding.

    Args:
        weights: The run's folder or a checkpoint; may stand first without its flag.
        folder: Encode the images below this folder instead, each its central square; may stand second without
            its flag.
        out: File for a folder's latents or codes, .npz or .safetensors; the default is latents.npz beside the
            run's other files, numbered.
        on_bad_image: What an image of the folder that cannot be read does: stop the command, or stay out.
        split: The split of the run's dataset to encode, to codes or to means and log-variances.
        beta: Beta of a multi-rate model; the default is 1, or the end of its range that is nearest to it.
        batch_size: Images at a time.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        data_dir: Folder of the original files, if not where training had it.
    """

    weights: str
    folder: str | None = None
    out: str | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    split: Literal["train", "test"] = "train"
    beta: float | None = None
    batch_size: int = 500
    device: str = "auto"
    data_dir: str | None = None


def parse(argv: Sequence[str]) -> EncodeConfig:
    """Return the flags of `movae encode` with the run as a path. Raises ValueError for an invalid flag or
    unknown run."""
    words = parsing.first_word_as("weights", argv)
    words = [*words[:1], *parsing.first_word_as("folder", words[1:])] if words != list(argv) else words
    which = "which model? give the run's folder: movae encode RUN, or --weights FILE"
    config = parsing.read_flags(EncodeConfig, "encode", DESCRIPTION, words, "weights", which)
    check_values(config, beta=POSITIVE)
    if config.folder is None and config.out is not None:
        raise ValueError("--out names the file of a folder's latents: give the folder, movae encode RUN FOLDER")
    config.weights = str(find_run(config.weights))
    return config
