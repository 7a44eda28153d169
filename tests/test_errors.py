"""Errors of the machine are one line that names file, size or flag; defects keep their traceback."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from movae_fast.cli import errors, main
from movae_fast.data.loaders import torch_workers
from movae_fast.files import abandoned, naming, remove_leftovers, replacing, set_aside

ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB of which"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.pt"), "a.pt: No space left on device; free space"),
        (PermissionError(errno.EACCES, "Permission denied", b"a\xff"), r"a\xff: Permission denied; change"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files; raise the limit (ulimit -n)"),
        (OSError(errno.EXDEV, "Invalid link", "a", None, "b"), "a and b: Invalid link"),
        (OSError("of a library\nwith two lines"), r"of a library\nwith two lines"),
        (MemoryError(), "out of memory; lower --batch_size"),
        (MemoryError("Unable to allocate 7 PiB"), "out of memory: Unable to allocate 7 PiB; lower"),
        (RuntimeError(ALLOCATOR), "out of memory: tried to allocate 4 GiB; lower --batch_size"),
        (torch.OutOfMemoryError(CUDA), "out of memory: tried to allocate 2.50 GiB; lower"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "or give --num_workers 0"),
        (ImportError("libx.so: failed to map segment from shared object"), "raise the limit on memory"),
    ],
)
def test_errors_of_the_machine(error, text, monkeypatch, capsys):
    def fail(argv):
        raise error

    monkeypatch.setattr("movae_fast.cli.doctor.run", fail)
    assert main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("movae doctor: ")
    assert text in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2"),
        KeyError("x"),
        ImportError("no module"),
        UnicodeDecodeError("utf-8", b"", 0, 1, ""),
    ],
)
def test_a_defect_keeps_its_traceback(error, monkeypatch):
    def fail(argv):
        raise error

    monkeypatch.setattr("movae_fast.cli.doctor.run", fail)
    with pytest.raises(type(error)):
        main(["doctor"])


def test_a_long_message_is_cut_in_its_middle():
    text = errors.shortened("a" * 400 + "b" * 400)
    assert len(text) <= errors.LIMIT
    assert text.startswith("aaa")
    assert text.endswith("bbb")
    assert " … " in text


def test_a_defect_during_training_keeps_its_traceback(train, monkeypatch):
    def fail(*_):
        raise RuntimeError("mat1 and mat2")

    monkeypatch.setattr("movae_fast.cli.train.fit", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train()


def test_out_of_memory_during_training_says_where_to_go_on(train, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr("movae_fast.cli.train.fit", fail)
    folder = train(status=2)
    error = capsys.readouterr().err
    assert "stopped after step 0: out of memory: tried to allocate 2.50 GiB" in error
    assert f"movae train --resume {folder}" in error


def test_output_to_a_full_disk_is_one_line():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "movae_fast", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_workers_that_cannot_start_end_the_run(train, monkeypatch, capsys):
    """And those that did are ended with it; the half-made iterator's destructor says nothing."""
    started = []
    start = torch.multiprocessing.Process.start

    def second_fails(process):
        if started:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(process)
        start(process)

    monkeypatch.setattr(torch.multiprocessing.Process, "start", second_fails)
    train("--loader torch", "--num_workers 2", status=2)
    error = capsys.readouterr().err
    assert "Resource temporarily unavailable; end other processes, or lower --num_workers" in error
    started[0].join(10)
    assert started[0].exitcode is not None


def test_started_passes_an_iterator_on():
    loader = torch.utils.data.DataLoader([1, 2])
    assert [int(x) for x in torch_workers.started(loader)] == [1, 2]


# What dead processes leave of files.


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    gone, mine, other = (tmp_path / name for name in (".a.pt.4194305.tmp", f".b.{os.getpid()}.tmp", ".c.tmp"))
    for path in (gone, mine, other):
        path.touch()
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([mine.name, other.name])
    os.utime(mine, (1, 1))  # older than the process that has its number now
    assert abandoned(mine, os.getpid())
    remove_leftovers(tmp_path / "none")


def test_what_is_set_aside_replaces_nothing(tmp_path):
    for text in ("1", "2", "3"):
        (tmp_path / "a").write_text(text)
        set_aside(tmp_path / "a")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.old": "1", "a.old-2": "2", "a.old-3": "3"}


def test_an_error_of_a_replaced_file_names_it(tmp_path):
    with pytest.raises(OSError, match=r"disk full: '.*/a\.txt'"), replacing(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "disk full")
    with pytest.raises(OSError, match=r"too long: '.*/xxx"), replacing(tmp_path / ("x" * 250)):
        pass
    with pytest.raises(OSError, match="'other'"), naming(tmp_path):
        raise OSError(errno.ENOSPC, "disk full", "other")
    with pytest.raises(OSError, match=r"^of a library$"), naming(tmp_path):
        raise OSError("of a library")
    assert list(tmp_path.iterdir()) == []
