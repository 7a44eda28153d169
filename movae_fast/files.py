"""Replace files atomically, lock them, compute their digests, and remove the leftovers of killed processes."""

import errno
import fcntl
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

CHUNK = 1 << 20
TEMPORARY = re.compile(r"\.[^/]+\.(\d+)\.tmp$")  # of `replacing`


def file_digest(path: Path, digest: Any) -> str:
    """Return the file's digest by `digest` (`hashlib.sha256()`, …), in hexadecimal."""
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that takes its name when the block ends, and is removed if the
    block raises.

    Whatever moment the process dies at, `path` is the old file or the new one, whole; with `durable` also
    whatever moment the machine does. Missing folders are made. An OSError names `path`.
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
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError of the block that names no file, or our temporary one, the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or TEMPORARY.search(str(error.filename))):
            error.filename, error.filename2 = str(path), None
        raise


def sync(file: IO[Any]) -> None:
    """Wait until what was written lies on the disk."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file `path`, once no other process does; `waiting` is called if one does.

    The lock is the kernel's: it ends with its process, however that ends, and the file goes with it. Missing
    folders are made. On a file system that has no locks this is a warning, and nobody is kept out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(lock, path, waiting)
            if _is_at(lock, path):  # else whoever had it took the file with it: try for the next one
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
    """Remove the temporary files that `replacing` left in `folder` in processes that were killed in it."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if (name := TEMPORARY.fullmatch(path.name)) and abandoned(path, int(name[1])):
            path.unlink(missing_ok=True)


def abandoned(path: Path, pid: int) -> bool:
    """Return whether the process that wrote a temporary file is gone: none has its number, or only a
    younger one."""
    if not alive(pid):
        return True
    with suppress(OSError):
        return path.stat().st_mtime < Path(f"/proc/{pid}").stat().st_mtime
    return False


def alive(pid: int) -> bool:
    """Return whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def set_aside(path: Path) -> Path:
    """Rename a file or folder to a free name beside it, `<name>.old`, `<name>.old-2`, …; the new path."""
    return path.rename(free_path(path.with_name(f"{path.name}.old")))


def free_path(stem: Path, suffix: str = "") -> Path:
    """Return the first of `numbered` paths where nothing is."""
    return next(path for path in numbered(stem, suffix) if not path.exists())


def numbered(stem: Path, suffix: str = "") -> Iterator[Path]:
    """Yield `<stem><suffix>`, `<stem>-2<suffix>`, `<stem>-3<suffix>`, … without an end."""
    yield stem.with_name(f"{stem.name}{suffix}")
    for number in itertools.count(2):
        yield stem.with_name(f"{stem.name}-{number}{suffix}")
