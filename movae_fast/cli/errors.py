"""Turn errors that the user can correct into one line that names the file, the size or the flag, and what to
do."""

from __future__ import annotations

import errno
import os
import re

from movae_fast.names import first_line, shown

LIMIT = 590  # characters of a message
DISK, DESCRIPTORS = "free space there, or name another place", "raise the limit (ulimit -n)"
# What to do about an OSError.
REMEDIES = {
    errno.ENOSPC: DISK,
    errno.EDQUOT: DISK,
    errno.EFBIG: DISK,
    errno.EROFS: "name another place",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.EMFILE: DESCRIPTORS,
    errno.ENFILE: DESCRIPTORS,
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ENOMEM: "free memory, or lower --num_workers and --batch_size",
    errno.EAGAIN: "end other processes, or lower --num_workers",
    errno.EIO: "the disk, or the way to it, is failing",
}
MEMORY = "lower --batch_size or --image_size, or add --accumulate"
# A part of the message of a RuntimeError of torch's -> the remedy.
RESOURCES = {
    "can't allocate memory": MEMORY,
    "out of memory": MEMORY,
    "CUDNN_STATUS_ALLOC_FAILED": MEMORY,
    "CUBLAS_STATUS_ALLOC_FAILED": MEMORY,
    "Cannot allocate memory": MEMORY,
    "bad_alloc": MEMORY,
    # oneDNN's, where memory for its code or buffers is lacking.
    "could not create a primitive": f"memory is short: {MEMORY}",
    "could not execute a primitive": f"memory is short: {MEMORY}",
    "could not create a memory": f"memory is short: {MEMORY}",
    "failed to map segment from shared object": "raise the limit on memory (ulimit -v), or free some",
    "DataLoader worker": "see `ulimit -a` and the size of /dev/shm, or give --num_workers 0",
    "can't start new thread": "end other processes, or set OMP_NUM_THREADS=1",
    "No space left on device": DISK,
    "Too many open files": DESCRIPTORS,
}


def explained(error: BaseException) -> str | None:
    """Return one line for an error that comes from the machine: files, memory, or the limits on processes.

    Returns None for any other error, which is a defect of the program.
    """
    if isinstance(error, OSError):
        return shortened(of_system(error))
    if isinstance(error, MemoryError):
        return shortened(f"out of memory{': ' if str(error) else ''}{first_line(error, '')}; {MEMORY}")
    # torch's out-of-memory errors are RuntimeErrors; a library that cannot be loaded is an ImportError.
    if isinstance(error, RuntimeError | ImportError):
        for sign, remedy in RESOURCES.items():
            if sign in str(error):
                return shortened(f"{allocation(str(error)) or first_line(error)}; {remedy}")
    return None


def of_system(error: OSError) -> str:
    """Return the message of an OSError: the files concerned, the cause, and what to do about it where that is
    known."""
    if error.errno is None:  # one of ours, or of a library, with words of its own
        return str(error)
    reason = error.strerror or os.strerror(error.errno)
    files = [os.fsdecode(f) for f in (error.filename, error.filename2) if isinstance(f, str | bytes)]
    remedy = f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""
    return f"{' and '.join(files)}{': ' if files else ''}{reason}{remedy}"


def allocation(text: str) -> str | None:
    """Return "out of memory" with the size that torch tried to allocate, read from its message; None if it has
    none."""
    match = re.search(r"[Tt]ried to allocate ([\d.]+) ?([KMGT]iB|bytes)", text)
    if match is None:
        return None
    size = f"{int(match[1]) / 2**30:.3g} GiB" if match[2] == "bytes" else f"{match[1]} {match[2]}"
    return f"out of memory: tried to allocate {size}"


def shortened(text: str) -> str:
    """Return text as one line of at most LIMIT characters, with unprintable characters escaped."""
    line = shown(text)
    return line if len(line) <= LIMIT else f"{line[: LIMIT // 2]} … {line[-(LIMIT // 2 - 3) :]}"
