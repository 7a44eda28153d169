"""Commands and functions in processes of their own that begin with torch imported: hundreds are affordable.

A process can be made to kill itself at its n-th operation on a file of a folder, or to find from there on that
the disk is full; its limits can be lowered; or it is killed from outside.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

OPERATIONS = {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["movae_fast.cli.train", "tests.warm"])


class Fate:
    """An audit hook that counts the operations on files of `folder` and acts from number `at` on.

    error: the errno that every later operation that makes something raises; 0 kills the process instead.
    """

    def __init__(self, folder, at, error):
        self.folder, self.at, self.error, self.count = folder, at, error, 0

    def __call__(self, event, args):
        if event not in OPERATIONS or not f"{args[0]}/".startswith(f"{self.folder}/"):
            return
        self.count += 1
        if self.at is None or self.count < self.at:
            return
        if not self.error:
            os.kill(os.getpid(), signal.SIGKILL)
        if event in ("os.link", "os.rename", "os.mkdir") or (event == "open" and args[2] & WRITING):
            raise OSError(self.error, os.strerror(self.error), str(args[0]))


def undrawn():
    """Have runs of this process end without figures, which most tests do not look at."""
    from movae_fast.cli import train

    train.draw_run = lambda run, tag: None


def live(words, log, environment, fate, limits, before):
    """The process: `movae WORDS` with its output in `log`, after `before()`."""
    os.setsid()  # its own processes end with it, in `end`
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    from movae_fast.cli import main

    torch.set_num_threads(1)
    if fate is not None:
        sys.addaudithook(fate)
    for name, value in limits.items():
        if name == resource.RLIMIT_AS:  # beyond what the process has
            value += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(name, (value, value))
    try:
        if before is not None:
            before()
        status = main(words)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 99
    sys.stdout.flush()
    if fate is not None:
        with open(f"{log}.count", "w") as file:
            file.write(str(fate.count))
    os._exit(status)


def start(words, log, environment=None, fate=None, limits=None, before=None):
    """Start `movae WORDS`; `before`, a function of a module, is called in the process first."""
    given = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **(environment or {})}
    words = [*map(str, words)]
    process = _context.Process(target=live, args=(words, str(log), given, fate, limits or {}, before))
    process.start()
    return process


def ranks(function, *args, processes=2):
    """Run `function(rank, *args)`, of a module, in each process; the first error ends them and is raised."""
    torch.multiprocessing.start_processes(function, args, processes, start_method="forkserver")


def ready():
    """Wait until processes begin with everything imported."""
    start(["--version"], os.devnull).join()


def wait(processes, seconds=120.0):
    """Their statuses; whoever still lives after that long is killed, and None."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    end(processes)
    return statuses


def end(processes):
    for process in processes:
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
