"""Files replaced whole, and digests."""

import hashlib

import pytest

from movae_fast.files import file_digest, replacing


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
