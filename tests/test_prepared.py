"""Prepared files: whatever is damaged in them is found before it is trained on; two preparations are one."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch

from movae_fast.cli import main
from movae_fast.data import DATASETS, Prepared, ReadOptions, make_loader, open_split, prepared_format
from movae_fast.data.prepare import prepare
from movae_fast.files import locked, sync
from tests.datafiles import labelled, photo, shard

pytestmark = pytest.mark.usefixtures("own_cache")
CPU = torch.device("cpu")
SIZE, N = 16, 23
INFO = DATASETS["folder"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr("movae_fast.data.prepared_format.BLOCK", 4 * 3 * SIZE * SIZE)  # four images


@pytest.fixture
def root(tmp_path):
    """A tar of 23 images in train/ and one of 4 in test/, the classes their numbers."""
    shard(tmp_path / "set" / "train" / "0.tar", labelled(range(N)))
    shard(tmp_path / "set" / "test" / "0.tar", labelled(range(4)))
    return tmp_path / "set"


def options(root, split="train", size=SIZE):
    return ReadOptions(root, split, size, False, CPU)


def path_of(root):
    return prepared_format.prepared_path("folder", options(root))


def read(root, **changes):
    source = open_split(INFO, options(root), **changes)
    assert isinstance(source, Prepared)
    return source


def flip(path, at, bit=0):
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ 1 << bit]))


def old_format(root):
    """Make of a prepared file one that an earlier version wrote."""
    path = path_of(root)
    at = path.with_suffix(".json")
    header = json.loads(at.read_text())
    for key in ("block", "blocks_crc32", "labels_crc32", "header_crc32"):
        del header[key]
    header |= {"format": prepared_format.OLD_FORMAT, "checksum": prepared_format.checksum(path)}
    at.write_text(json.dumps(header, indent=1))


@pytest.mark.parametrize("kind", ["resident", "torch", "torch with workers"])
@pytest.mark.parametrize("image", [0, 13, N - 1])
def test_a_flipped_bit_is_found_as_its_block_is_first_read(root, kind, image):
    prepare(INFO, options(root))
    flip(path_of(root), image * 3 * SIZE * SIZE + 100, bit=3)
    workers = 2 if kind == "torch with workers" else 0

    def epoch(source):
        work = make_loader(kind.split()[0], source, 3, CPU, num_workers=workers, train=True, seed=1, pad=True)
        return sum(len(x) for x, _ in work.epoch())

    first, last = image // 4 * 4, min(image // 4 * 4 + 3, N - 1)
    said = rf"train-16-center148-auto\.u8 is damaged \(checksums differ at images {first} to {last}\): prepare"
    with pytest.raises(ValueError, match=said):
        epoch(read(root))
    assert epoch(read(root, verify=False)) == 24
    whole = [i for i in range(N) if not first <= i <= last]
    images, labels = read(root).gather(torch.tensor(whole))
    assert labels.tolist() == whole
    assert images.shape == (len(whole), 3, SIZE, SIZE)


def test_training_stops_at_a_flipped_bit_unless_told_otherwise(root, train, capsys):
    prepare(INFO, options(root))
    prepare(INFO, options(root, "test"))
    flip(path_of(root), 5)
    flags = ["--dataset folder", f"--data_dir {root}", "--limit_train 0", "--limit_test 0"]
    flags += ["--steps 8", "--num_samples 2", "--batch_size 4"]
    train(*flags, status=2)
    err = capsys.readouterr().err
    assert "is damaged (checksums differ at images 0 to 3)" in err
    assert err.count("\n") == 1
    train(*flags, "--verify_prepared False")


def test_each_block_is_compared_once_and_workers_share_what_they_know(root, monkeypatch):
    prepare(INFO, options(root))
    source, seen = read(root), []
    crc32 = zlib.crc32
    monkeypatch.setattr(
        "movae_fast.data.prepared_format.zlib.crc32", lambda data: seen.append(len(data)) or crc32(data)
    )
    work = make_loader("resident", source, 4, CPU, train=True, seed=1)
    for number in range(3):
        list(work.epoch(number))
    assert len(seen) == 6 == len(source.sums)
    assert sum(seen) == N
    again = read(root)
    assert not again.checked.any()
    list(make_loader("torch", again, 4, CPU, num_workers=2, train=False).epoch())
    assert again.checked.all()  # which the workers did


def test_labels_and_header_are_covered(root):
    prepare(INFO, options(root))
    path = path_of(root)
    labels, header = path.with_suffix(".labels.npy"), path.with_suffix(".json")
    for victim in (labels, header):
        whole = victim.read_bytes()
        for at in range(0, len(whole), 7):
            flip(victim, at, bit=at % 8)
            try:
                again = json.loads(header.read_text()) == json.loads(whole) if victim is header else False
            except ValueError:
                again = False
            if not again:  # a blank that became a tab changes nothing
                with pytest.raises(
                    ValueError, match=r"is not a whole prepared file \(.*\): delete it"
                ) as caught:
                    read(root)
                assert "\n" not in str(caught.value)
                assert len(str(caught.value)) < 600
            victim.write_bytes(whole)
    assert read(root).labels.tolist() == list(range(N))


def verify(root, capsys):
    status = main(["data", "verify", str(root)])
    return status, capsys.readouterr().out


def test_verify_covers_images_labels_headers_and_every_size(root, capsys):
    for split in ("train", "test"):
        for size in (SIZE, 20):
            prepare(INFO, options(root, split, size))
    status, out = verify(root, capsys)
    assert status == 0
    assert out.count("has its checksums") == 4
    path = path_of(root)
    for victim, said in (
        (
            path,
            "folder-train-16-center148-auto.u8 is damaged: checksums differ at images 4 to 7; prepare again",
        ),
        (path.with_suffix(".labels.npy"), "the labels differ from their checksum"),
        (path.with_suffix(".json"), "folder-train-16-center148-auto.u8 is not a whole prepared file"),
    ):
        whole = victim.read_bytes()
        flip(victim, 5 * 3 * SIZE * SIZE if victim is path else len(whole) - 20)
        status, out = verify(root, capsys)
        assert status == 1
        assert said in out
        assert out.count("has its checksums") == 3
        victim.write_bytes(whole)
    path.with_suffix(".json").unlink()
    status, out = verify(root, capsys)
    assert status == 1
    assert "folder-train-16-center148-auto.u8 has no header: prepare again" in out
    assert "has no header and is not used" in open_split(INFO, options(root)).note


def test_verify_needs_no_original_files(root, capsys):
    prepare(INFO, options(root))
    prepare(INFO, options(root, "test"))
    for split in ("train", "test"):
        (root / split / "0.tar").unlink()
    status, out = verify(root, capsys)
    assert status == 0
    assert "folder train: the original files are not there; folder-train-16" in out
    flip(path_of(root), 9)
    assert verify(root, capsys)[0] == 1


@pytest.mark.parametrize("suffix", [".u8", ".labels.npy", ".json"])
def test_preparing_again_mends_what_is_damaged(root, suffix):
    prepare(INFO, options(root))
    path = path_of(root)
    whole = {s: path.with_suffix(s).read_bytes() for s in (".u8", ".labels.npy", ".json")}
    flip(path.with_suffix(suffix), 130)
    assert prepare(INFO, options(root))[1] == "written"
    assert {s: path.with_suffix(s).read_bytes() for s in whole} == whole
    assert prepare(INFO, options(root))[1] == "current"


def test_files_of_the_old_format_are_read_and_given_checksums(root, monkeypatch, capsys):
    prepare(INFO, options(root))
    path = path_of(root)
    header = path.with_suffix(".json").read_bytes()
    images = read(root).images[:].copy()
    old_format(root)
    source = read(root)
    assert np.array_equal(source.images, images)
    assert "without checksums of blocks, which `movae data prepare` adds" in source.note
    assert len(list(make_loader("resident", source, 4, CPU, train=True).epoch())) == 5
    assert "has its checksums, but none of its labels: prepare again" in verify(root, capsys)[1]
    with monkeypatch.context() as patch:
        patch.setattr("movae_fast.data.sources.decode", None)  # not again
        assert prepare(INFO, options(root))[1] == "given checksums"
    assert path.with_suffix(".json").read_bytes() == header
    old_format(root)
    flip(path, 77)
    assert "is damaged: its checksum differs; prepare again" in verify(root, capsys)[1]
    assert prepare(INFO, options(root))[1] == "written"
    assert path.with_suffix(".json").read_bytes() == header
    old_format(root)
    text = json.loads(path.with_suffix(".json").read_text())
    del text["checksum"]
    path.with_suffix(".json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"not a whole prepared file \(the header has no checksum\)"):
        read(root)


def test_labels_that_changed_since_are_noticed_and_given_without_decoding(tmp_path, monkeypatch):
    for i in range(6):
        photo(tmp_path / "imagenet" / "train" / f"n{i % 2 + 1:02d}" / f"{i}.jpg", i)
    info, where = DATASETS["imagenet"], options(tmp_path)
    path, how = prepare(info, where)
    assert how == "written"
    assert open_split(info, where).labels.tolist() == [0, 0, 0, 1, 1, 1]
    (tmp_path / "imagenet" / "train" / "n00").mkdir()
    assert "out of date" in open_split(info, where).note
    monkeypatch.setattr("movae_fast.data.sources.decode", None)
    assert prepare(info, where)[1] == "given other labels"
    assert open_split(info, where).labels.tolist() == [1, 1, 1, 2, 2, 2]
    assert prepared_format.damage(path, prepared_format.read_header(path)) == ""
    assert prepare(info, where)[1] == "current"


class StoppedError(Exception):
    pass


@pytest.fixture
def stopped(root, monkeypatch):
    """A preparation that was stopped after 12 images were written durably."""
    monkeypatch.setattr("movae_fast.data.prepare.CHUNK", 4)

    def stop(done, total):
        if done == 16:
            raise StoppedError

    with pytest.raises(StoppedError):
        prepare(INFO, options(root), progress=stop)
    assert not list(path_of(root).parent.glob("*.lock"))
    return path_of(root)


def from_where(root):
    """Where a preparation goes on, in images; and what it was, in a word."""
    starts = []
    how = prepare(INFO, options(root), progress=lambda done, total: starts.append(done))[1]
    assert read(root).gather(torch.arange(N))[1].tolist() == list(range(N))
    assert prepared_format.damage(path_of(root), prepared_format.read_header(path_of(root))) == ""
    originals = INFO.read(options(root))
    assert all(np.array_equal(read(root).images[i], originals[i][0]) for i in range(N))
    return starts[0], how


def test_a_preparation_goes_on_from_its_last_whole_block(root, stopped):
    assert from_where(root) == (12, "continued")
    assert sorted(p.suffix for p in stopped.parent.iterdir()) == [".json", ".npy", ".u8"]


def test_what_was_damaged_meanwhile_is_done_again(root, stopped):
    flip(stopped.with_suffix(".u8.part"), 5 * 3 * SIZE * SIZE)  # in the second block
    assert from_where(root) == (4, "continued")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"header": 3}', b"\xff\xfe", None])
def test_a_damaged_state_is_a_beginning(root, stopped, content):
    state = stopped.with_suffix(".part.json")
    if content is None:
        stopped.with_suffix(".u8.part").unlink()
    else:
        state.write_bytes(content)
    assert from_where(root) == (0, "written")


HOLD = """
import sys, time
from pathlib import Path
from movae_fast.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(path, seconds):
    """A process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(seconds)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_the_lock_of_a_dead_process_holds_nobody_up(root):
    lock = path_of(root).with_suffix(".lock")
    with holder(lock, 600) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert lock.exists()
        lines = []
        assert prepare(INFO, options(root), say=lines.append)[1] == "written"
    assert not any("waiting" in line for line in lines)
    assert not lock.exists()


def test_a_preparation_waits_for_another_and_says_so(root):
    lock = path_of(root).with_suffix(".lock")
    lines = []
    with holder(lock, 2) as process:
        began = time.monotonic()
        assert prepare(INFO, options(root), say=lines.append)[1] == "written"
        assert time.monotonic() - began > 0.5
        assert process.wait() == 0
    assert any(
        "folder-train-16-center148-auto.u8: waiting for who prepares it already" in line for line in lines
    )
    assert not lock.exists()


def test_preparations_at_once_write_one_file(root):
    words = [sys.executable, "-m", "movae_fast", "data", "prepare", str(root), "--image_size", str(SIZE)]
    words += ["--decoder", "pillow", "--split", "train"]
    running = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    done = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0] * 2, done
    assert [err for _, err in done] == [""] * 2
    assert sorted(": current, 23" in out for out, _ in done) == [False, True]
    assert prepared_format.damage(path_of(root), prepared_format.read_header(path_of(root))) == ""
    assert sorted(p.suffix for p in path_of(root).parent.iterdir()) == [".json", ".npy", ".u8"]


def test_locks_pass_from_one_to_the_next(tmp_path):
    path = tmp_path / "made" / "lock"
    others = [holder_later(path) for _ in range(4)]
    for _ in range(20):
        with locked(path):
            marker = tmp_path / "inside"
            assert not marker.exists()
            marker.touch()
            time.sleep(0.005)
            marker.unlink()
    assert [process.wait() for process in others] == [0] * 4
    assert not path.exists()


def holder_later(path):
    code = """
import sys, time
from pathlib import Path
from movae_fast.files import locked
path = Path(sys.argv[1])
marker = path.parent.parent / "inside"
for _ in range(20):
    with locked(path):
        assert not marker.exists()
        marker.touch()
        time.sleep(0.005)
        marker.unlink()
"""
    return subprocess.Popen([sys.executable, "-c", code, str(path)])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line_and_what_was_done_is_kept(root, monkeypatch, capsys):
    monkeypatch.setattr("movae_fast.data.prepare.CHUNK", 4)
    count = []

    def full(file):
        count.append(1)
        if len(count) == 3:
            with open("/dev/full", "wb", buffering=0) as disk:
                disk.write(b"x")
        sync(file)

    monkeypatch.setattr("movae_fast.data.prepare.sync", full)
    words = ["data", "prepare", str(root), "--image_size", str(SIZE), "--decoder", "pillow", "--split", "train"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "cannot be written (No space left on device): mend that and prepare again, which goes on" in err
    assert err.count("\n") == 1
    monkeypatch.setattr("movae_fast.data.prepare.sync", sync)
    assert from_where(root) == (8, "continued")


@pytest.mark.parametrize("size", ["0", "-3", "10001", "1000000"])
def test_sizes_that_no_image_has_are_refused_before_anything_is_written(root, capsys, size):
    for command in ("prepare", "verify"):
        assert main(["data", command, str(root), "--image_size", size]) == 2
        err = capsys.readouterr().err
        limit = "from 1 to 10,000" if int(size) > 0 else "at least 1"
        assert err == f"movae data: --image_size {size} must be {limit}\n"
    assert not (root / "prepared").exists()


def test_empty_names_are_refused(capsys):
    assert main(["data", "prepare", ""]) == 2
    assert capsys.readouterr().err == "movae data: NAME or FOLDER is empty\n"
    assert main(["data", "verify", "mnist", "--data_dir", ""]) == 2
    assert capsys.readouterr().err.startswith("movae data: --data_dir is empty")


def test_bytes_that_were_damaged_in_100_places_are_all_found(root):
    prepare(INFO, options(root))
    path = path_of(root)
    whole = path.read_bytes()
    draws = np.random.default_rng(0)
    for _ in range(100):
        flip(path, int(draws.integers(len(whole))), int(draws.integers(8)))
        with pytest.raises(ValueError, match="is damaged"):
            read(root).gather(torch.arange(N))
        path.write_bytes(whole)
    read(root).gather(torch.arange(N))


def test_images_beside_a_set_are_no_part_of_its_prepared_files(tmp_path):
    folder = tmp_path / "set"
    for i in range(12):
        photo(folder / f"{i}.jpg", i)
    photo(folder / "prepared" / "13.jpg", 13)  # a folder of this name may be the user's own
    prepare(INFO, options(folder))
    assert len(read(folder)) == 12
    assert "left aside" not in read(folder).note
