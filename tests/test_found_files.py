"""What lies below a folder or on a list: all of it is read, or named with a count, whatever it is called."""

import codecs
import errno
import hashlib
import os
import types

import pytest
import torch
from PIL import Image

from movae_fast.cli import main
from movae_fast.data import DATASETS, ReadOptions, find_files, make_loader, open_split
from movae_fast.data.decode import decode
from movae_fast.data.find_files import find_below, opened
from movae_fast.data.unreadable import list_hash
from movae_fast.names import shown

pytestmark = pytest.mark.usefixtures("own_cache")
CPU = torch.device("cpu")
SIZE = 8


def picture(path, form="PNG", level=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIZE, SIZE), (level, level, level)).save(path, form)
    return path


def pictures(root, n=12):
    for i in range(n):
        picture(root / f"{i:02d}.png", level=i)
    return root


def read(root, split="train", name="folder", on_bad_image="error"):
    return open_split(DATASETS[name], ReadOptions(root, split, SIZE, False, CPU), on_bad_image)


def names(source):
    return [file.name for file in source.files]


def test_every_kind_of_file_is_read_or_counted(tmp_path):
    root = pictures(tmp_path / "a", 3)
    for name, form in {
        "a.tif": "TIFF",
        "b.TIFF": "TIFF",
        "c.jfif": "JPEG",
        "d.gif": "GIF",
        "e.ppm": "PPM",
    }.items():
        picture(root / name, form)
    picture(root / "album.png" / "1.png")  # a folder of that name
    for name in ("notes.txt", "more.txt", "x.heic", "README"):
        (root / name).write_bytes(b"")
    picture(root / ".ipynb_checkpoints" / "0-checkpoint.png")
    picture(root / "._0.png")
    picture(root / "deep" / ".hidden" / "0.png")
    (root / "gone").symlink_to("nowhere")
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "pipe.tar")
    (root / "null.jpg").symlink_to("/dev/null")
    found = find_below(root)
    read_ = [str(path.relative_to(root)) for path in found.images]
    expected = ["00.png", "01.png", "02.png", "a.tif", "album.png/1.png", "b.TIFF", "c.jfif", "d.gif", "e.ppm"]
    assert read_ == sorted(expected)
    assert found.aside.counts == {
        "hidden": 3,
        "neither file nor folder": 3,
        "linked to nothing": 1,
        ".txt": 2,
        ".heic": 1,
        "without a suffix": 1,
    }
    assert found.aside.first["hidden"] == "._0.png"
    assert found.aside.first["neither file nor folder"] == "null.jpg"
    assert found.aside.first["linked to nothing"] == "gone"
    note = read(root).note
    assert note.startswith("left aside: ")
    assert "2 .txt (more.txt, …)" in note
    assert "1 .heic (x.heic)" in note
    for path in found.images:
        assert decode(path).shape == (SIZE, SIZE, 3)


def test_a_set_may_itself_be_hidden(tmp_path):
    assert len(read(pictures(tmp_path / ".cache" / ".set"))) == 11


def test_the_order_is_that_of_the_paths(tmp_path):
    for name in ("b/1.png", "b.png", "a/9.png", "B.png", "b/c/0.png", "a.b/0.png"):
        picture(tmp_path / name)
    assert find_below(tmp_path).images == sorted(tmp_path.rglob("*.png"))


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    root = tmp_path / "set"
    for split in ("train", "test"):
        pictures(root / split / "cat", 6)
    pictures(tmp_path / "elsewhere" / "dog", 5)
    (root / "train" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (root / "train" / "dog again").symlink_to(tmp_path / "elsewhere" / "dog")
    (root / "train" / "cat" / "up").symlink_to(root)
    (tmp_path / "elsewhere" / "dog" / "self").symlink_to(".")
    (root / "train" / "aaa").symlink_to("cat")  # comes first by name, and the folder proper has its images
    source = read(root)
    assert [file.parent.name for file in source.files] == ["cat"] * 6 + ["dog"] * 5
    assert "4 linked to a folder that is read already or lies above (aaa, …)" in source.note
    (tmp_path / "link").symlink_to(root)
    assert len(read(tmp_path / "link")) == 11


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    root = pictures(tmp_path / "a")
    pictures(root / "locked", 3)
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(find_files.os, "scandir", refuse)
    assert read(root).note == "left aside: 1 unreadable: Permission denied (locked)"
    monkeypatch.setattr(find_files.os, "scandir", lambda folder: refuse("locked"))
    with pytest.raises(FileNotFoundError, match=r"No train image was found \(left aside: 1 unreadable: Perm"):
        read(root)


def test_a_broken_link_called_an_image_is_a_bad_image(tmp_path):
    root = pictures(tmp_path / "a")
    (root / "00.png").unlink()
    (root / "00.png").symlink_to("nowhere")
    (root / "01.png").unlink()
    (root / "01.png").symlink_to("01.png")
    with pytest.raises(ValueError, match=r"00\.png is not a readable image \(No such file or directory\)"):
        list(make_loader("torch", read(root), 2, CPU, train=False).epoch())
    left = read(root, on_bad_image="skip").skipped
    assert [line.rpartition("/")[2] for line in left] == [
        "00.png: No such file or directory",
        "01.png: Too many levels of symbolic links",
    ]


@pytest.mark.parametrize("kind", ["torch", "resident", "dali"])
def test_a_pipe_in_an_images_place_is_named_and_not_waited_for(tmp_path, kind):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    source = read(pictures(tmp_path / "a"))
    source.files[3].unlink()
    os.mkfifo(source.files[3])
    with pytest.raises(ValueError, match=r"03\.png is not a readable image \(no regular file\)"):
        list(make_loader(kind, source, 4, CPU, train=False).epoch())
    for path in (source.files[3], tmp_path):
        with pytest.raises(OSError, match="no regular file"):
            opened(path)


def test_why_a_file_does_not_open_is_not_remembered(tmp_path):
    root = pictures(tmp_path / "a")
    target = tmp_path / "elsewhere.png"
    (root / "00.png").unlink()
    (root / "00.png").symlink_to(target)
    (root / "01.png").write_bytes(b"no image")
    assert len(read(root, on_bad_image="skip").skipped) == 2
    cache = tmp_path / "cache" / "movae"
    assert not cache.exists()
    picture(target)
    assert len(read(root, on_bad_image="skip").skipped) == 1
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_an_image_is_not_bad_because_the_machine_is_short(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("movae_fast.data.decode._pixels", fail)
    with pytest.raises(type(error)):
        read(pictures(tmp_path / "a"), on_bad_image="skip")


def test_class_folders_do_not_shift(tmp_path):
    for split in ("train", "val"):
        for i, name in enumerate(("n01", "n02", "n03")):
            pictures(tmp_path / "imagenet" / split / name, 2 + i)
    train = tmp_path / "imagenet" / "train"
    picture(train / ".ipynb_checkpoints" / "0.png")
    picture(train / "lost.png")
    for path in (train / "n02").iterdir():
        path.unlink()
    moved = tmp_path / "moved"
    (train / "n03").rename(moved)
    (train / "n03").symlink_to(moved)
    source = read(tmp_path, name="imagenet")
    assert source.labels == [0, 0, 2, 2, 2, 2]
    assert read(tmp_path, "test", "imagenet").labels == [0] * 2 + [1] * 3 + [2] * 4
    for part in ("1 hidden (", "1 in no class folder (lost.png)", "1 class folder without an image (n02)"):
        assert part in source.note


LISTS = {
    "utf-8": lambda text: text.encode(),
    "byte-order mark": lambda text: text.encode("utf-8-sig"),
    "utf-16, little end first": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16, big end first": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "windows' line ends": lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
    "joined": lambda text: text[:14].encode("utf-8-sig") + text[14:].encode("utf-8-sig"),
    "blanks": lambda text: ("  " + text.replace("\n", " \n\n\t")).encode(),
}


@pytest.mark.parametrize("how", LISTS)
def test_a_list_is_read_whatever_wrote_it(tmp_path, how):
    root = pictures(tmp_path / "a")
    for i, odd in enumerate(("é.png", " blank.png", "a\u2028b.png")):
        picture(root / odd, level=i)
    every = [*(f"{i:02d}.png" for i in range(6)), "é.png", " blank.png", "a\u2028b.png"]
    if how == "blanks":
        every.remove(" blank.png")
    (root / "list.txt").write_bytes(LISTS[how]("".join(f"{name}\n" for name in every)))
    assert names(read(root / "list.txt")) == every


def test_a_list_that_is_none_is_refused(tmp_path):
    root = pictures(tmp_path / "a")
    for content in (b"\0\1\2", b"\x89PNG\r\n\x1a\n\0\0", codecs.BOM_UTF16_LE + b"a"):
        (root / "list.txt").write_bytes(content)
        with pytest.raises(ValueError, match=r"list\.txt is no list of files"):
            read(root / "list.txt")
    os.mkfifo(root / "p.png")
    (root / "list.txt").write_text("00.png\np.png\nalbum\n")
    with pytest.raises(FileNotFoundError, match=r"2 of 3 listed files are missing, as .*p\.png"):
        read(root / "list.txt")


def test_a_list_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text("00.png\n")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("movae_fast.data.datasets.image_folders.opened", refuse)
    with pytest.raises(ValueError, match=r"--data_dir .*list\.txt cannot be read \(Permission denied\)"):
        read(tmp_path / "list.txt")


NAMES = {
    "plain é 中.png": "plain é 中.png",
    "a\nb": "a\\nb",
    "red \x1b[31m": "red \\x1b[31m",
    "turned \u202etxt.png": "turned \\u202etxt.png",
    os.fsdecode(b"caf\xe9"): "caf\\xe9",
    "[bold]": "[bold]",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_one_line_that_can_be_printed(name):
    assert shown(name) == NAMES[name]
    shown(name).encode("utf-8")
    assert shown(shown(name)) == shown(name)


def odd_folder(tmp_path):
    """A folder, and images in it, of names that are not UTF-8 and would turn a terminal red."""
    root = tmp_path / os.fsdecode(b"caf\xe9 \x1b[31m")
    for i in range(20):
        picture(root / os.fsdecode(b"p\xe9\n[red]%02d.png" % i), level=9 * i)
    return root


def test_names_of_any_bytes_are_prepared_verified_and_trained_on(tmp_path, capsys):
    root = odd_folder(tmp_path)
    (root / os.fsdecode(b"p\xe9\n[red]13.png")).write_bytes(b"")
    where = ["--image_size", "16"]
    prepare = ["data", "prepare", str(root), *where, "--decoder", "pillow", "--on_bad_image", "skip"]
    assert main(prepare) == 0
    out = capsys.readouterr().out
    assert "caf\\xe9 \\x1b[31m/p\\xe9\\n[red]13.png: empty file" in out
    assert "\x1b" not in out
    assert main(["data", "verify", str(root), *where]) == 1
    assert "p\\xe9\\n[red]13.png: empty file" in capsys.readouterr().out
    assert read(root, on_bad_image="skip").files
    run = tmp_path / "run"
    flags = "--latent_dim 4 --hidden_dims 8 8 --steps 2 --batch_size 4 --num_samples 2 --device cpu".split()
    train = ["train", "--dataset", "folder", "--data_dir", str(root), *where, *flags, "--exp_dir"]
    assert main([*train, str(run), "--on_bad_image", "skip"]) == 0
    assert "prepared" in capsys.readouterr().out
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 0
    assert main([*train, str(tmp_path / "other")]) == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert captured.err.count("\n") == 1


def test_a_list_names_files_of_any_bytes(tmp_path):
    root = odd_folder(tmp_path)
    name = os.fsdecode(b"q\xe9.png")
    picture(root / name)
    (root / "list.txt").write_bytes(b"q\xe9.png\n" * 3)
    assert names(read(root / "list.txt")) == [name] * 3


def test_the_digest_of_usual_names_is_what_it_was(tmp_path):
    path = picture(tmp_path / "a" / "é.png")
    os.utime(path, ns=(10**18, 10**18))
    line = f"a/é.png\0{path.stat().st_size}\0{10**18}\n"
    assert list_hash([path]) == hashlib.blake2b(line.encode(), digest_size=16).hexdigest()


@pytest.mark.parametrize("what", ["a file in its place", "no permission", "a full disk"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch, what):
    root = pictures(tmp_path / "a")

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    if what == "a file in its place":
        (root / "prepared").write_text("")
        said = "File exists"
    elif what == "no permission":
        monkeypatch.setattr("movae_fast.files.os.open", refuse)
        said = "Permission denied"
    else:
        monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=8447))
        said = "8.45e-06 GB to write and 8.45e-06 GB free"
    assert main(["data", "prepare", str(root), "--image_size", "16", "--decoder", "pillow"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert f"folder-train-16-center148-auto.u8 cannot be written ({said})" in captured.err
    assert not list(root.rglob("*.u8"))
