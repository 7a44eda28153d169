"""The command line: `movae train|sweep|evaluate|curve|sample|reconstruct|generate|data|doctor`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from movae_fast import __version__
from movae_fast.names import nearest, shown

COMMANDS = {
    "train": "train a model; every flag has a default, recipes are --config NAME",
    "sweep": "search over flags of train with Optuna; --config NAME or a YAML file",
    "evaluate": "objectives, bounds, image quality and disentanglement of a trained model",
    "curve": "rate and distortion over beta: multi-rate runs as curves, plain runs as points",
    "sample": "pictures from a trained model: samples, interpolation, traversal, reconstruction, latents, beta",
    "reconstruct": "original beside reconstruction, one file an image",
    "generate": "samples from the prior, one file an image and a grid",
    "data": "list, verify, prepare datasets: decode once, map afterwards",
    "doctor": "versions, devices, which path each op takes, what is missing and how to get it",
}


def usage() -> str:
    lines = [
        f"movae {__version__}: multi-objective variational autoencoders",
        "",
        "usage: movae COMMAND [flags]",
        "",
    ]
    lines += [f"  {name:<12} {text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "movae COMMAND --help lists a command's flags."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(__version__)
        return 0
    command = args[0]
    if command not in COMMANDS:
        text = f"movae: unknown command {command}{nearest(command, COMMANDS)}; valid: {', '.join(COMMANDS)}"
        print(one_line(text), file=sys.stderr)
        return 2
    # Imported on demand: torch takes a second, and help should not.
    run: Callable[[list[str]], int] = import_module(f"movae_fast.cli.{command}").run
    from movae_fast.training.checkpoint import CheckpointError

    try:
        return run(args[1:])
    except (ValueError, FileNotFoundError, CheckpointError) as error:
        # What the user can mend is one line; anything else is a defect and keeps its traceback.
        if type(error) not in (ValueError, FileNotFoundError, CheckpointError):
            raise
        print(one_line(f"movae {command}: {error}"), file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1


def one_line(message: str, most: int = 590) -> str:
    """Return a message as one line of at most `most` characters: others than printable ones escaped, cut."""
    text = shown(message)
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[-(most // 3 - 3) :]}"
