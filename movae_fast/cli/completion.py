"""Run `movae completion`: print a script that completes commands, flags and names in a shell."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from importlib import import_module

import shtab

from movae_fast.aggregation.catalog import AGGREGATORS
from movae_fast.choices import TEXT_SETS
from movae_fast.cli import COMMANDS
from movae_fast.cli.flags.completion import SHELLS
from movae_fast.cli.flags.data import COMMANDS as DATA_COMMANDS
from movae_fast.cli.parsing import flag_types
from movae_fast.data.datasets import DATASETS
from movae_fast.models import MODELS, TEXT_MODELS
from movae_fast.training.config import SECTIONS
from movae_fast.training.config_files import recipe_names


def run(shell: str) -> int:
    """Print the script by which a shell completes commands and flags, and return the exit status."""
    print(shtab.complete(parser_of_all(), shell))
    return 0


def parser_of_all() -> argparse.ArgumentParser:
    """Return a parser of every command's flags, which only shtab reads."""
    names = {
        "dataset": [*DATASETS, *TEXT_SETS],
        "arch": [*MODELS, *TEXT_MODELS],
        "agg": ["sum", *AGGREGATORS],
    }
    top = argparse.ArgumentParser(prog="movae")
    commands = top.add_subparsers(dest="command")
    for command, text in COMMANDS.items():
        parser = commands.add_parser(command, help=text.replace("%", "%%"))
        if command == "completion":
            parser.add_argument("shell", choices=SHELLS)
        elif command == "data":
            parser.add_argument("what", choices=list(DATA_COMMANDS))
        for flag, kind in flags_of(command).items():
            literals = [a for part in (kind, *typing.get_args(kind)) for a in literal(part)]
            choices = names.get(flag) or literals or None
            parser.add_argument(f"--{flag}", choices=choices)
        if command == "train":
            parser.add_argument("--config", choices=recipe_names())
    return top


def literal(kind: object) -> list[str]:
    """Return the words that a type allows, where it lists them."""
    return [str(a) for a in typing.get_args(kind)] if typing.get_origin(kind) is typing.Literal else []


def flags_of(command: str) -> dict[str, object]:
    """Return the types of a command's flags by name."""
    if command == "train":
        return flag_types(list(SECTIONS.values()))
    module = import_module(f"movae_fast.cli.flags.{command}")
    # What has texts for its fields is what the command line is read into.
    sections = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type)
        and dataclasses.is_dataclass(kind)
        and kind.__module__ == module.__name__
        and "Args:" in (kind.__doc__ or "")
    ]
    return flag_types(sections[:1])
