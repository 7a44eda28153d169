"""Replace files atomically, lock them, compute their digests, and remove the leftovers of killed processes."""

import errno
import fcntl
import itertools
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

CHUNK = 1 << 20
TEMPORARY = re.compile(r"\.[^/]+\.(\d+)\.tmp$")  # of `replacing`


def file_digest(path: Path, digest: Any) -> str:
    """Return the digest of a file's content in hexadecimal; `digest` is a new hash object such as
    `hashlib.sha256()`."""
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[IO[bytes]]:
    """Write a file atomically: open a temporary file beside `path`, which is renamed to `path` when the block
    ends and removed if the block raises.

    If the process is killed at any moment, `path` is still either the whole old file or the whole new one; with
    `durable` this also holds if the machine fails. Missing folders are created. An OSError names `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                if durable:
                    sync(file)
            temporary.replace(path)
        finally:
            with suppress(OSError):  # the block's own error is the one to show
                temporary.unlink(missing_ok=True)
        if durable:
            sync_folder(path.parent)


def give_name(source: Path, path: Path) -> None:
    """Make `path` a second name of the file `source`: a hard link, or a copy where the file system has no
    links.

    `path` changes atomically from the old file to the new one and is on the disk when this returns. Writing to
    either name by `replacing` leaves the other name's file unchanged. An OSError names `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        if path.exists() and path.samefile(source):
            return  # a rename between two names of one file would do nothing, and leave both
        try:
            with suppress(FileNotFoundError):
                temporary.unlink()
            os.link(source, temporary)
        except OSError:  # it cannot be linked; copying raises any other error again
            with source.open("rb") as read, replacing(path, durable=True) as write:
                shutil.copyfileobj(read, write, CHUNK)
            return
        try:
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries (new, renamed and removed names) are on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an OSError that the block raises name `path`, if it names no file or the temporary file of
    `replacing`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or TEMPORARY.search(str(error.filename))):
            error.filename, error.filename2 = str(path), None
        raise


def sync(file: IO[Any]) -> None:
    """Flush a file and wait until its content is on the disk."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file `path` during the block; wait for it while another process holds it.

    `waiting` is called once if there is a wait. The operating system releases the lock when the process ends,
    however it ends; the file is removed at the end of the block. Missing folders are created. A file system
    without locks gives a warning, and then nothing is locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(lock, path, waiting)
            if _is_at(lock, path):  # otherwise the last holder has deleted this file: lock the new one
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(lock)


def _lock(lock: int, path: Path, waiting: Callable[[], None]) -> None:
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        warnings.warn(f"{path.parent} has no file locks: let one process write there at a time", stacklevel=3)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in `folder` that processes killed within `replacing` left behind."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if (name := TEMPORARY.fullmatch(path.name)) and abandoned(path, int(name[1])):
            path.unlink(missing_ok=True)


def abandoned(path: Path, pid: int) -> bool:
    """Return whether the process `pid` that wrote the temporary file `path` is gone.

    It is gone if no process has this number, or if the process that has it started after the file was written.
    """
    if not alive(pid):
        return True
    with suppress(OSError):
        return path.stat().st_mtime < Path(f"/proc/{pid}").stat().st_mtime
    return False


def alive(pid: int) -> bool:
    """Return whether a process with this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def set_aside(path: Path) -> Path:
    """Rename a file or folder to a free name beside it, `<name>.old`, `<name>.old-2`, …; return the new
    path."""
    return path.rename(free_path(path.with_name(f"{path.name}.old")))


def free_path(stem: Path, suffix: str = "") -> Path:
    """Return the first path of `numbered(stem, suffix)` that does not exist."""
    return next(path for path in numbered(stem, suffix) if not path.exists())


def numbered(stem: Path, suffix: str = "") -> Iterator[Path]:
    """Yield the paths `<stem><suffix>`, `<stem>-2<suffix>`, `<stem>-3<suffix>`, … without end."""
    yield stem.with_name(f"{stem.name}{suffix}")
    for number in itertools.count(2):
        yield stem.with_name(f"{stem.name}-{number}{suffix}")
