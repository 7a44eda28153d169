"""Define and check the flags of `movae init`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from movae_fast.cli import parsing
from movae_fast.training.config import SECTIONS

DESCRIPTION = "Write every setting of movae train, with what it does, to a YAML file: movae init my.yaml"


@dataclass
class InitConfig:
    """Settings file.

    Args:
        file: File to write; may stand first without its flag. An existing one is never overwritten.
        recipe: Recipe, or YAML file, whose settings take the place of the defaults.
    """

    file: str = "movae.yaml"
    recipe: str | None = None


def parse(argv: Sequence[str]) -> tuple[InitConfig, dict[str, Any]]:
    """Return the flags, and the recipe's settings. Raises ValueError."""
    config = parsing.read_flags(InitConfig, "init", DESCRIPTION, parsing.first_word_as("file", argv))
    if Path(config.file).suffix not in (".yaml", ".yml"):
        raise ValueError(f"--file {config.file}: give a name that ends in .yaml")
    if Path(config.file).exists():
        raise ValueError(f"--file {config.file} exists and is not overwritten; name another file")
    kinds = parsing.flag_types(list(SECTIONS.values()))
    if config.recipe is None:
        return config, {}
    try:
        return config, parsing.read_config(config.recipe, kinds)
    except ValueError as error:  # it names the flag by which `movae train` takes a recipe
        raise ValueError(str(error).replace("--config", "--recipe", 1)) from None
