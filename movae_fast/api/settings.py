"""Turn the settings that a Python program gives (a recipe, a file, a dictionary, arguments) into one
dictionary."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from movae_fast.names import ArgumentError, nearest
from movae_fast.training.config import SECTIONS, TrainConfig
from movae_fast.training.config_files import flag_types, read_config, typed

Config = str | os.PathLike[str] | Mapping[str, Any] | TrainConfig


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Turn a ValueError of the block that names flags (`--lr`) into an ArgumentError that names them as
    arguments (`lr`)."""
    try:
        yield
    except ValueError as error:
        text = _without_dashes(str(error))
        if type(error) is not ValueError or text == str(error):
            raise
        raise ArgumentError(text) from None


def _without_dashes(text: str) -> str:
    """Return a text in which settings, and an argument that it begins with, are named without dashes.

    Other words keep their dashes, such as the flags of another command.
    """
    names = flag_types(list(SECTIONS.values()))
    text = text.removeprefix("--")
    return re.sub(r"--(\w+)", lambda word: word[1] if word[1] in names else word[0], text)


def settings(config: Config | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given settings by name; a setting in `overrides` replaces the one in `config`.

    config: a recipe's name, the path of a YAML file, settings by name, a whole configuration, or None. Raises
    ArgumentError for an unknown setting and for a value of the wrong type.
    """
    kinds = flag_types(list(SECTIONS.values()))
    if config is None:
        given: Mapping[str, Any] = {}
    elif isinstance(config, TrainConfig):
        given = config.flat()
    elif isinstance(config, Mapping):
        given = config
    elif isinstance(config, str | os.PathLike):
        given = read_config(os.fspath(config), kinds)
    else:
        raise ArgumentError(
            f"config {config!r:.80}: give a recipe's name, a YAML file, settings by name or a TrainConfig"
        )
    values = {**given, **overrides}
    for name in values:
        if name not in kinds:
            raise ArgumentError(f"{name}: no such setting{nearest(str(name), kinds)}")
    return {name: typed(name, plain(value), kinds[name]) for name, value in values.items()}


def plain(value: Any) -> Any:
    """Return a value as YAML holds it: a path as text, a tuple as a list."""
    if isinstance(value, Path):
        return str(value)
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value
