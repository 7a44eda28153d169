"""Files replaced whole, and digests."""

import errno
import hashlib
import os

import pytest

from movae_fast.files import file_digest, give_name, remove_leftovers, replacing


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path, durable):
    path = tmp_path / "made" / "file"
    for text in (b"old", b"new"):
        before = path.read_bytes() if path.exists() else None
        with replacing(path, durable) as file:
            file.write(text)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == text
    assert list(path.parent.iterdir()) == [path]


def test_what_raises_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail():
        with replacing(path) as file:
            file.write(b"new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_digest_of_a_file_of_several_chunks(tmp_path):
    data = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file", hashlib.sha256()) == hashlib.sha256(data).hexdigest()


def test_another_name_is_the_same_file_until_one_of_them_is_replaced(tmp_path):
    best, last = tmp_path / "best", tmp_path / "last"
    best.write_bytes(b"first")
    last.write_bytes(b"old")
    for _ in range(2):  # the second time there is nothing to do
        give_name(best, last)
        assert best.samefile(last)
        assert last.read_bytes() == b"first"
        assert sorted(tmp_path.iterdir()) == [best, last]
    with replacing(last, durable=True) as file:
        file.write(b"second")
    assert (best.read_bytes(), last.read_bytes()) == (b"first", b"second")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.ENOSYS])
def test_where_there_are_no_links_another_name_is_a_copy(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    best, last = tmp_path / "best", tmp_path / "last"
    best.write_bytes(b"first")
    give_name(best, last)
    assert not best.samefile(last)
    assert last.read_bytes() == b"first"
    assert sorted(tmp_path.iterdir()) == [best, last]


def test_a_name_that_cannot_be_given_leaves_the_old_file(tmp_path, monkeypatch):
    best, last = tmp_path / "best", tmp_path / "last"
    best.write_bytes(b"first")
    last.write_bytes(b"old")

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(OSError, match="last") as raised:
        give_name(best, last)
    assert raised.value.filename == str(last)
    assert sorted(tmp_path.iterdir()) == [best, last]
    assert last.read_bytes() == b"old"


def test_a_link_that_a_dead_process_left_is_in_nobodys_way(tmp_path):
    best, last = tmp_path / "best", tmp_path / "last"
    best.write_bytes(b"first")
    (tmp_path / f".last.{os.getpid()}.tmp").write_bytes(b"left by a process of this number")
    give_name(best, last)
    assert last.read_bytes() == b"first"
    os.link(best, tmp_path / ".last.999999999.tmp")
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == [best, last]
    assert best.read_bytes() == b"first"
