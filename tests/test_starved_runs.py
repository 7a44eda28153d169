"""Disk full, read-only, out of descriptors or memory, names too long: one line, and what was saved is whole."""

import errno
import os
import random
import resource
import subprocess
from collections import Counter

import pytest

from movae_fast.cli import main
from tests import lives
from tests.chains import Chain, assert_same

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.EACCES)


@pytest.mark.slow
def test_a_disk_that_fails_at_any_operation(tmp_path, capsys):
    """The disk stays so until the run ends, and the run goes on later."""
    draw, counts = random.Random(0), Counter()
    lives.ready()
    whole = Chain("vae", tmp_path / "whole")
    _, operations = whole.finish()
    expected = whole.result()
    for number in range(24):
        chain = Chain("vae", tmp_path / f"{number}")
        error, at = ERRORS[number % len(ERRORS)], draw.randint(1, operations)
        said = chain.starve(at=at, error=error)
        assert not said or (os.strerror(error) in said and str(chain.folder) in said), said
        counts[errno.errorcode[error] if said else "no harm"] += 1
        chain.finish("--resume", "auto")
        assert_same(chain.result(), expected, f"{chain.log}: {said}")
        assert not list(tmp_path.rglob(".*.tmp")), "a temporary file is left"
    with capsys.disabled():
        print("\nfailing disk: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))


@pytest.fixture
def mounted(tmp_path):
    """Mount a file system in memory of a given size at tmp_path/disk, or change its options."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        again = ["-o", f"remount,{options}"] if os.path.ismount(disk) else ["-o", options]
        words = ["mount", "-t", "tmpfs", *again, "tmpfs", str(disk)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this process may not mount: {done.stderr.strip()}")
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [20, 56, 80, 140, 220, 300])
def test_a_full_disk_and_then_a_larger_one(kilobytes, mounted, tmp_path):
    disk = mounted(f"size={kilobytes}k")
    lives.ready()
    whole = Chain("vae", tmp_path / "whole")
    whole.finish()
    chain = Chain("vae", disk / "run")
    chain.log = tmp_path / "run.log"
    said = chain.starve()
    assert not said or "No space left on device" in said
    assert said or kilobytes > 200
    mounted("size=10m")
    chain.finish("--resume", "auto")
    assert_same(chain.result(), whole.result(), said)
    assert not list(disk.rglob(".*.tmp"))


def test_a_disk_that_is_read_only(mounted, tmp_path, capsys):
    disk = mounted("size=10m")
    mounted("ro")
    assert main(["train", "--dataset", "digits", "--steps", "1", "--exp_dir", str(disk / "run")]) == 2
    error = capsys.readouterr().err
    assert str(disk) in error
    assert error.count("\n") == 1
    mounted("rw")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_out_of_descriptors(workers, tmp_path, capsys):
    lives.ready()
    counts = Counter()
    for number, limit in enumerate((8, 16, 32, 63, 64, 80, 96, 128)):
        chain = Chain("vae", tmp_path / f"{number}", "--loader", "torch", "--num_workers", str(workers))
        said = chain.starve(limits={resource.RLIMIT_NOFILE: limit})
        assert not said or "ulimit -n" in said
        counts["refused" if said else "trained"] += 1
    assert counts["refused"] >= 4
    assert counts["trained"] >= 2
    with capsys.disabled():
        print(f"\nout of descriptors, {workers} workers: {dict(counts)}")


@pytest.mark.slow
def test_out_of_memory(tmp_path, capsys):
    lives.ready()
    counts = Counter()
    for number, megabytes in enumerate((4, 16, 45, 80, 150, 300)):
        chain = Chain("vae", tmp_path / f"{number}", "--batch_size", "120", "--hidden_dims", "64", "128")
        said = chain.starve(limits={resource.RLIMIT_AS: megabytes << 20})
        assert not said or "memory" in said
        counts["refused" if said else "trained"] += 1
    with capsys.disabled():
        print(f"\nout of memory: {dict(counts)}")
    assert counts["refused"] >= 2


@pytest.mark.parametrize("flag", ["exp_dir", "save_path", "export", "resume", "data_dir"])
@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000], ids=["name", "path"])
def test_names_that_are_too_long(flag, name, tmp_path, capsys):
    words = ["train", "--dataset", "mnist", "--steps", "1", "--save_path", str(tmp_path / "runs")]
    assert main([*words, f"--{flag}", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert "File name too long" in error
    assert error.count("\n") == 1
    assert len(error) < 620
    assert not any(p.name.startswith("x") for p in tmp_path.rglob("*"))
