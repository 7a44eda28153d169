"""Commands in processes of their own that begin with torch imported, so that hundreds of them are affordable.

A process can be made to kill itself at its n-th operation on a file of a folder, or be killed from outside.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["movae_fast.cli.train", "tests.warm"])


def live(words, log, environment, folder, at):
    """The process: `movae WORDS` with its output in `log`, until the operation number `at` on `folder`."""
    os.setsid()  # its own processes end with it, in `end`
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    count = 0

    def hook(event, args):
        nonlocal count
        if event in OPERATIONS and str(args[0]).startswith(folder):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    if folder:
        sys.addaudithook(hook)
    import torch

    from movae_fast.cli import main

    torch.set_num_threads(1)
    try:
        status = main(words)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 99
    sys.stdout.flush()
    if folder:
        with open(f"{log}.count", "w") as file:
            file.write(str(count))
    os._exit(status)


def start(words, log, environment=None, folder="", at=None):
    given = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **(environment or {})}
    process = _context.Process(target=live, args=([*map(str, words)], str(log), given, str(folder), at))
    process.start()
    return process


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
