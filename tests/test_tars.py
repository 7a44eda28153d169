"""Tars of images: what is in them and in which order, by every loader; damage is named."""

import gzip
import io
import os
import subprocess
import tarfile

import pytest
import torch

from movae_fast.data import DATASETS, Prepared, ReadOptions, make_loader, open_split, tars
from movae_fast.data.find_files import find_below
from movae_fast.data.prepare import prepare
from tests.datafiles import jpeg, labelled, shard

pytestmark = pytest.mark.usefixtures("own_cache")
CPU = torch.device("cpu")
SIZE = 16


@pytest.fixture
def shards(tmp_path):
    """A folder of two tars, 23 images with their numbers as classes."""
    for i, numbers in enumerate((range(10), range(10, 23))):
        shard(tmp_path / "shards" / f"{i}.tar", labelled(numbers))
    return tmp_path / "shards"


@pytest.fixture(params=["torch", "torch with workers", "resident", "dali"])
def kind(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


def options(root, split="train"):
    return ReadOptions(root, split, SIZE, False, CPU)


def read(root, split="train", on_bad_image="error"):
    return open_split(DATASETS["folder"], options(root, split), on_bad_image)


def loader(kind, source, batch_size=4, **changes):
    workers = 2 if kind == "torch with workers" else 0
    flags = {"num_workers": workers, "train": True, "seed": 3, "flip": True} | changes
    return make_loader(kind.split()[0], source, batch_size, CPU, **flags)


def copied(batches):
    return [(x.clone(), y) for x, y in batches]


def test_images_classes_and_order_are_those_of_dalis_reader(tmp_path):
    dali = pytest.importorskip("nvidia.dali")
    # The class may stand first, other files between, names may have folders and further points.
    first = labelled(range(3)) | {"a/0007.cls": b"70\n", "a/0007.txt": b"seven", "a/0007.jpg": jpeg(7)}
    second = labelled(range(3, 6)) | {"b.c/d.meta.json": b"{}", "b.c/d.cls": b"5", "b.c/d.jpg": jpeg(9)}
    paths = [str(shard(tmp_path / f"{i}.tar", files)) for i, files in enumerate((first, second))]
    pipe = dali.Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipe:
        pipe.set_outputs(*dali.fn.readers.webdataset(paths=paths, ext=["jpg", "cls"]))
    pipe.build()
    images, classes = tars.images_in(find_below(tmp_path).tars)
    assert len(images) == 8
    for image, label in zip(images, classes, strict=True):
        data, text = (out.at(0).tobytes() for out in pipe.run())
        assert image.read_bytes() == data
        assert label == int(text)


def test_loaders_take_a_tar_as_the_folder_of_its_files(shards, kind):
    source = read(shards)
    folder = shards.parent / "unpacked"
    for path in sorted(shards.iterdir()):
        with tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")
    plain = loader(kind, read(folder))
    packed = loader(kind, source)
    for number in (0, 2):
        for (x, y), (x2, _) in zip(packed.epoch(number), plain.epoch(number), strict=True):
            assert torch.equal(x, x2)
            assert set(y.tolist()) <= set(range(23)) - {9, 19}  # every tenth is for testing
    whole = copied(packed.epoch(2))
    assert len(whole) == 5
    for (x, y), (x2, y2) in zip(whole[2:], copied(packed.epoch(2, start=2)), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_ranks_share_the_images_of_all_tars(shards, kind):
    for train, n in ((True, 20), (False, 21)):
        parts = [loader(kind, read(shards), 2, train=train, rank=r, world=2) for r in range(2)]
        seen = [int(label) for part in parts for _, y in part.epoch(1) for label in y]
        assert len(seen) == len(set(seen)) == n


def test_where_tars_may_be(shards):
    tar = shards / "0.tar"
    assert [len(read(tar, s)) for s in ("train", "test")] == [9, 1]
    assert read(tar).labels == list(range(9))
    listed = shards.parent / "list.txt"
    listed.write_text("shards/1.tar\nshards/0.tar\n")
    assert read(listed).labels == [*range(10, 19), *range(20, 23), *range(6), *range(7, 10)]
    assert read(listed, "test").labels == [19, 6]
    parts = shards.parent / "parts"
    for split, name in (("train", "1.tar"), ("test", "0.tar")):
        (parts / split).mkdir(parents=True)
        os.link(shards / name, parts / split / name)
    assert [read(parts, s).labels for s in ("train", "test")] == [list(range(10, 23)), list(range(10))]
    shard(shards / "2.tar", {f"{i}.png": b"" for i in range(3)})
    with pytest.raises(ValueError, match=r"2\.tar/0\.png has no class and others have"):
        read(shards)
    (shards / "lone.jpg").write_bytes(jpeg(1))
    source = read(shards)
    assert [f.name for f in source.files] == ["lone.jpg"]
    assert source.note == "left aside: 3 .tar beside image files (0.tar, …)"


def test_headers_are_read_once(shards, monkeypatch):
    before = read(shards).labels
    with monkeypatch.context() as patch:
        patch.setattr(tars.tarfile, "open", None)
        assert read(shards).labels == before
    shard(shards / "0.tar", labelled(range(10), label=lambda i: i + 50))
    assert read(shards).labels[:2] == [50, 51]


def test_headers_that_were_remembered_wrongly_are_read_again(shards, tmp_path):
    before = [(str(file), file.offset, label) for file, label in tars.index(shards / "0.tar")]
    (cache,) = (tmp_path / "cache" / "movae").iterdir()
    whole = cache.read_bytes()
    for at in range(0, len(whole), 11):
        cache.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert [(str(file), file.offset, label) for file, label in tars.index(shards / "0.tar")] == before
    for content in (b"", whole[:-9], b"[1]", b"{}"):
        cache.write_bytes(content)
        assert [(str(file), file.offset, label) for file, label in tars.index(shards / "0.tar")] == before
        assert cache.read_bytes() == whole


def damaged_header(data):
    return data[:1030] + b"?" + data[1031:]  # in the second member's header, 1,024 bytes in


# Damage -> what is said. A member is a header of 512 bytes and its content, filled up to blocks of 512.
DAMAGE = {
    "empty": (lambda data: b"", "is not a whole tar (empty file)"),
    "cut in a header": (lambda data: data[:1100], "is not a whole tar (cut short at byte 1,024)"),
    "cut in an image": (lambda data: data.rstrip(b"\0")[:-800], "is not a whole tar ("),
    "cut between two files": (lambda data: data[:1024], "is not a whole tar (cut short at byte 1,024)"),
    "a header changed": (damaged_header, "is not a whole tar ("),
    "no tar": (lambda data: b"<html>404</html>" * 100, "is not a whole tar ("),
    "compressed": (gzip.compress, "is compressed, which leaves no way into its middle: gunzip it"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_tar_is_named(shards, how):
    damage, said = DAMAGE[how]
    path = shards / "1.tar"
    samples = {"0.cls": b"1", "0.jpg": jpeg(1)} | labelled(range(2, 30))
    path.write_bytes(damage(shard(path, samples).read_bytes()))
    with pytest.raises(ValueError, match=r"1\.tar is ") as caught:
        read(shards)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tar_without_images_or_with_a_wrong_class_is_named(shards, train, capsys):
    shard(shards / "2.tar", {"0.cls": b"3", "0.txt": b"none"})
    flags = ("--dataset folder", f"--data_dir {shards}", "--limit_train 0", "--limit_test 0")
    train(*flags, status=2)
    assert "2.tar holds no image (.png, .jpg, .jpeg, .webp, .bmp, .jfif" in capsys.readouterr().err
    shard(shards / "2.tar", {"0.jpg": jpeg(3), "0.cls": b"cat"})
    train(*flags, status=2)
    assert "2.tar/0.cls is no class: b'cat', expected one whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", [b"9" * 20, b"9" * 5000, b"9223372036854775808", b"1_000", b"", b"3.0", b"1 2"]
)
def test_a_class_that_no_label_can_be_is_named(tmp_path, text):
    path = shard(tmp_path / "x.tar", {"0.jpg": jpeg(1), "0.cls": text})
    with pytest.raises(
        ValueError, match=r"x\.tar/0\.cls is no class: b'.*', expected one whole number of at most 64"
    ):
        read(path)


@pytest.mark.parametrize(
    ("text", "number"),
    [(b"9223372036854775807", 2**63 - 1), (b"-1\n", -1), (b"\xef\xbb\xbf3\r\n", 3), (b" 007 ", 7)],
)
def test_a_class_is_any_number_of_64_bits(tmp_path, text, number):
    path = shard(tmp_path / "x.tar", {"0.jpg": jpeg(1), "0.cls": text})
    source = read(path)
    assert source.labels == [number]
    assert make_loader("resident", source, 1, CPU, train=False).source.labels.tolist() == [number]


def add(tar, name, content=b"", **fields):
    header = tarfile.TarInfo(name)
    header.size = len(content)
    for key, value in fields.items():
        setattr(header, key, value)
    tar.addfile(header, io.BytesIO(content))


def test_links_in_a_tar_are_the_files_that_they_link_to(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "./a/0.jpg", jpeg(0))
        add(tar, "./a/0.cls", b"5")
        add(tar, "./a/1.jpg", type=tarfile.LNKTYPE, linkname="./a/0.jpg")
        add(tar, "./a/1.cls", type=tarfile.LNKTYPE, linkname="./a/0.cls")
        add(tar, "./b/2.jpg", type=tarfile.SYMTYPE, linkname="../a/./1.jpg")  # of a link
        add(tar, "./b/2.cls", b"6")
        add(tar, "./b/3.jpg", type=tarfile.SYMTYPE, linkname="4.jpg")  # of what comes after
        add(tar, "./b/3.cls", b"7")
        add(tar, "./b/4.jpg", jpeg(4))
        add(tar, "./b/4.cls", b"8")
        add(tar, "./b/5.jpg", type=tarfile.SYMTYPE, linkname="/etc/5.jpg")
        add(tar, "./b/6.jpg", type=tarfile.SYMTYPE, linkname="6.jpg")
        add(tar, "./b/7.jpg", type=tarfile.LNKTYPE, linkname="gone.jpg")
        add(tar, "./c", type=tarfile.SYMTYPE, linkname="b")
        add(tar, "./b/.ipynb_checkpoints/4.jpg", jpeg(4))
        add(tar, "./b/._4.jpg", b"notes of a Mac")
        add(tar, "./b/p.png", type=tarfile.FIFOTYPE)
        add(tar, "./b/4.json", b"{}")
    source = read(path)
    expected = ((0, 5), (0, 5), (0, 6), (4, 7), (4, 8))
    assert source.labels == [label for _, label in expected]
    assert [file.read_bytes() for file in source.files] == [jpeg(seed) for seed, _ in expected]
    assert source.note == (
        "left aside: 1 linked (x.tar/./c), 2 hidden (x.tar/./b/.ipynb_checkpoints/4.jpg, …), "
        "1 neither file nor folder (x.tar/./b/p.png), 1 .json (x.tar/./b/4.json), "
        "3 linked to nothing in the tar (x.tar/./b/5.jpg, …)"
    )
    assert read(path).note == source.note  # from what is remembered


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar"])
def test_hard_links_as_tar_itself_writes_them(tmp_path, form):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    os.link(folder / "0.jpg", folder / "6.jpg")
    os.link(folder / "0.jpg", folder / "7.jpg")
    subprocess.run(
        ["tar", f"--format={form}", "--sort=name", "-cf", tmp_path / "x.tar", "-C", folder, "."], check=True
    )
    images, _ = tars.images_in([tmp_path / "x.tar"])
    assert [image.read_bytes() for image in images] == [jpeg(i) for i in (0, 1, 2, 3, 4, 5, 0, 0)]


def test_an_image_with_holes_is_refused(tmp_path):
    path = tmp_path / "in" / "0.bmp"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(b"BM")
        file.truncate(1 << 20)
    subprocess.run(["tar", "--sparse", "-cf", tmp_path / "x.tar", "-C", path.parent, "."], check=True)
    with pytest.raises(
        ValueError, match=r"x\.tar/\./0\.bmp is stored with holes: write the tar without --sparse"
    ):
        read(tmp_path / "x.tar")


def test_a_tar_and_its_members_may_have_names_of_any_bytes(tmp_path, kind):
    names = [os.fsdecode(b"caf\xe9\n%d.jpg" % i) for i in range(6)]
    path = shard(tmp_path / os.fsdecode(b"t\xe9.tar"), {name: jpeg(i) for i, name in enumerate(names)})
    for _ in range(2):
        source = read(path)
        assert [file.name for file in source.files] == names
    assert len(list(loader(kind, source, 2).epoch())) == 3
    path = shard(path, {names[0]: jpeg(0), names[1]: b"none"})
    with pytest.raises(ValueError, match=r"t\\xe9\.tar/caf\\xe9\\n1\.jpg is not a readable image"):
        list(loader(kind, read(path), 2).epoch())


def test_folders_and_pipes_called_tar_are_none(tmp_path):
    shard(tmp_path / "a.tar", labelled(range(12)))
    (tmp_path / "old.tar").mkdir()
    os.mkfifo(tmp_path / "p.tar")
    source = read(tmp_path)
    assert len(source) == 11
    assert "1 neither file nor folder (p.tar)" in source.note


def test_a_bad_image_in_a_tar_is_named_or_left_out(shards, kind):
    files = labelled(range(6))
    files["0003.jpg"] = files["0003.jpg"][:-200]
    files["0004.jpg"] = b""
    path = shard(shards.parent / "bad.tar", files)
    with pytest.raises(ValueError, match=r"bad\.tar/000\d\.jpg is not a readable image \(.+\); mend"):
        list(loader(kind, read(path), 2).epoch())
    work = loader(kind, read(path, on_bad_image="skip"), 2)
    assert sorted(int(label) for _, y in work.epoch() for label in y) == [0, 1, 2, 5]
    assert [line.partition(": ")[0] for line in work.left_out] == [f"{path}/0003.jpg", f"{path}/0004.jpg"]
    assert "empty file" in work.left_out[1]


def test_tars_are_prepared_and_their_change_is_noticed(shards):
    plain = read(shards)
    prepare(DATASETS["folder"], options(shards))
    source = read(shards)
    assert isinstance(source, Prepared)
    images, labels = source.gather(torch.arange(21))
    assert labels.tolist() == plain.labels
    assert all(torch.equal(images[i], plain[i][0]) for i in range(21))
    shard(shards / "0.tar", labelled(range(10), label=lambda i: 0))
    assert "is out of date" in read(shards).note


def test_training_reads_tars_by_every_loader(shards, kind, train):
    workers = "2" if kind == "torch with workers" else "0"
    folder = train(
        "--dataset folder",
        f"--data_dir {shards}",
        f"--loader {kind.split()[0]}",
        f"--num_workers {workers}",
        "--batch_size 4",
        "--limit_train 0",
        "--limit_test 0",
        "--steps 2",
        "--num_samples 2",
    )
    assert (folder / "checkpoints" / "last.pt").is_file()


def test_a_member_is_read_as_a_file(tmp_path):
    path = shard(tmp_path / "a.tar", {"x/1.jpg": b"one", "x/2.jpg": b"twenty"})
    (_, member), _ = tars.images_in([path])
    assert (str(member), member.name, member.parent) == (f"{path}/x/2.jpg", "2.jpg", path / "x")
    assert member.read_bytes() == b"twenty"
    assert isinstance(member.open("rb"), io.BytesIO)
    assert member.stat().st_size == 6
