"""Run the command line: `movae COMMAND`, where COMMAND is one of `COMMANDS`."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from movae_fast import __version__
from movae_fast.cli.errors import explained, shortened
from movae_fast.names import ArgumentError, nearest

COMMANDS = {
    "train": "train a model; every flag has a default, recipes are --config NAME",
    "sweep": "search over flags of train with Optuna; --config NAME or a YAML file",
    "evaluate": "objectives, bounds, image quality and disentanglement of a trained model",
    "curve": "rate and distortion over beta: multi-rate runs as curves, plain runs as points",
    "encode": "codes or posteriors of a split, once, into one file that later commands map",
    "prior": "fit a prior to what a model encodes; sample then draws from it",
    "sample": "pictures from a trained model: samples, interpolation, traversal, reconstruction, latents, beta",
    "reconstruct": "original beside reconstruction, one file an image",
    "generate": "samples from the prior, one file an image and a grid",
    "export": "a trained model for other programs: safetensors with a model card, torch.export, ONNX",
    "runs": "list the runs below a folder, with their scores",
    "compare": "runs beside each other: flags that differ, scores, curves in one plot",
    "report": "one page on one or several runs, for any browser: curves, pictures, answers",
    "serve": "a page to look into a model: sliders for latents and beta, a map of codes (extra web)",
    "data": "list, verify, prepare datasets: decode once, map afterwards",
    "init": "write every setting of train, with what it does, to a YAML file",
    "completion": "a script that completes commands, flags and names in bash, zsh or tcsh",
    "doctor": "versions, devices, which path each op takes, what is missing and how to get it",
}

TASKS = {
    "Train": ("train", "sweep", "init"),
    "Look at runs": ("runs", "compare", "report", "evaluate", "curve"),
    "Use a trained model": ("sample", "reconstruct", "generate", "serve", "encode", "prior", "export"),
    "Data and machine": ("data", "doctor", "completion"),
}


def usage() -> str:
    lines = [
        f"movae {__version__}: multi-objective variational autoencoders",
        "",
        "usage: movae COMMAND [flags]",
        "",
    ]
    others = tuple(name for name in COMMANDS if not any(name in names for names in TASKS.values()))
    tasks = TASKS | ({"More": others} if others else {})
    for task, names in tasks.items():
        lines += [task, *(f"  {name:<12} {COMMANDS[name]}" for name in names), ""]
    return "\n".join([*lines, "movae COMMAND --help lists a command's flags."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` holds (default: the process's arguments) and return the exit status."""
    try:
        return guarded(list(sys.argv[1:] if argv is None else argv))
    finally:
        if argv is None:  # the process ends, and a Ctrl-C that comes now would interrupt only its end
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            gc.freeze()  # the process's memory goes with it: Python need not search it for garbage first


@contextmanager
def uncollected() -> Iterator[None]:
    """Disable garbage collection inside a `with` block: importing torch makes 160,000 objects, all of which
    stay.

    Together with the freezing in `main` this saves a quarter of the CPU time of a process that imports torch
    and ends at once, as one that refuses its flags does.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def guarded(args: list[str]) -> int:
    """Run one command and return its exit status; print errors that the user can correct as one line on stderr.

    Any other exception is a defect of the program and is raised on, so that its traceback is shown.
    """
    name = f"movae {args[0]}" if args and args[0] in COMMANDS else "movae"
    try:
        return dispatch(args)
    except KeyboardInterrupt:
        say(f"{name}: interrupted")
        return 130
    except BrokenPipeError:
        silence(sys.stdout)
        return 1
    except Exception as error:
        text = shortened(in_flags(error)) if mendable(error) else explained(error)
        if text is None:
            raise
        say(f"{name}: {text}")
        return 2


def dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(__version__)
        return 0
    command = args[0]
    if command not in COMMANDS:
        raise ValueError(f"unknown command {command}{nearest(command, COMMANDS)}; valid: {', '.join(COMMANDS)}")
    # Torch and what trains is imported after the flags were found right: it takes seconds.
    flags = import_module(f"movae_fast.cli.flags.{command}").parse(args[1:])
    if isinstance(flags, int):  # the status: what was asked is printed
        return flags
    with uncollected():
        run: Callable[[Any], int] = import_module(f"movae_fast.cli.{command}").run
    check_outputs(command, flags)
    return run(flags)


def check_outputs(command: str, flags: object) -> None:
    """Raise ValueError, before any work, where what a command writes cannot be written at the place that its
    flags name."""
    for name in ("outdir", "save_dir", "out"):
        given = getattr(flags, name, None)
        if isinstance(given, str) and given:
            from movae_fast.training.run_folder import check_place

            folder = name != "out" or command in ("compare", "curve")
            check_place(name, Path(os.path.expanduser(given)), folder)


def mendable(error: Exception) -> bool:
    """Return whether this package itself raised the error, so that its message can be shown to the user as it
    is."""
    checkpoint = sys.modules.get("movae_fast.training.checkpoint")
    return type(error) in (ValueError, ArgumentError) or (
        checkpoint is not None and type(error) is checkpoint.CheckpointError
    )


def in_flags(error: Exception) -> str:
    """Return an error's message for a user of the command line: an argument's name is written as a flag,
    `--name`."""
    return f"--{error}" if isinstance(error, ArgumentError) else str(error)


def say(text: str) -> None:
    """Flush stdout and write a line to stderr.

    If stdout cannot be flushed, for example because the disk is full, its buffer is discarded: it would raise
    the same error again when the process ends.
    """
    try:
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)
    print(text, file=sys.stderr, flush=True)


def silence(stream: TextIO) -> None:
    """Redirect a stream to the null device, so that its buffered text raises no error when the process ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
