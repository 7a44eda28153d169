"""Define and check the flags of `movae serve`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from movae_fast.cli import parsing
from movae_fast.training.limits import Bounds, check_values
from movae_fast.training.run_list import find_run

DESCRIPTION = "A page to look into a model, on this machine alone: movae serve RUN"


@dataclass
class ServeConfig:
    """Page to look into a model (extra `web`).

    Args:
        weights: The run's folder or a checkpoint; may stand first without its flag.
        host: Address to answer at. The default answers this machine alone; any other, such as 0.0.0.0, lets
            other machines in, without a password.
        port: Port.
        prior: What the page draws from: the prior that `movae prior` fitted last (auto), one by name, or none;
            a multi-rate model draws from its own.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        data_dir: Folder of the original files, for test images, if not where training had it.
    """

    weights: str
    host: str = "127.0.0.1"
    port: int = 7860
    prior: str = "auto"
    device: str = "auto"
    data_dir: str | None = None


def parse(argv: Sequence[str]) -> ServeConfig:
    """Return the flags, checked by themselves. Raises ValueError."""
    words = parsing.first_word_as("weights", argv)
    which = "which model? give the run's folder: movae serve RUN, or --weights FILE"
    config = parsing.read_flags(ServeConfig, "serve", DESCRIPTION, words, "weights", which)
    check_values(config, port=Bounds(1, 65_535))
    config.weights = str(find_run(config.weights))
    return config
