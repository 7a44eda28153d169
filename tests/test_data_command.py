"""`movae data`: what it lists, what it checks, what it writes, and how later runs use that."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from movae_fast.cli import main
from movae_fast.data import DATASETS, Prepared, ReadOptions, make_loader, open_split, prepared_format
from movae_fast.data.datasets.factor_grids import GRIDS
from movae_fast.data.decode import decode
from movae_fast.data.text import TEXTS
from tests import datafiles

pytestmark = pytest.mark.usefixtures("own_cache")
CPU = torch.device("cpu")
SIZE = 16


@pytest.fixture
def movae(capsys):
    def run(*words, status=0):
        assert main(["data", *map(str, words)]) == status
        captured = capsys.readouterr()
        return captured.out + captured.err

    return run


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    for split, n in (("train", 7), ("test", 3)):
        for i in range(n):
            datafiles.photo(root / split / f"{i}.jpg", i)
    return root


def options(root, split="train"):
    return ReadOptions(root, split, SIZE, False, CPU)


def split(root, split="train", on_bad_image="error", name="folder"):
    return open_split(DATASETS[name], options(root, split), on_bad_image)


def prepare(movae, root, *flags, decoder="pillow", status=0):
    return movae("prepare", root, "--image_size", SIZE, "--decoder", decoder, *flags, status=status)


def test_the_list_shows_every_set_and_what_is_there(tmp_path, monkeypatch, movae):
    monkeypatch.setenv("COLUMNS", "250")
    datafiles.svhn(tmp_path, monkeypatch)
    datafiles.celeba(tmp_path, monkeypatch)
    lines = movae("list", "--data_dir", tmp_path).splitlines()
    rows = {line.split("│")[1].strip(): line.split("│")[-2].strip() for line in lines if line.startswith("│")}
    assert set(rows) == {*DATASETS, *TEXTS}
    assert rows["lstm_text"] == rows["python_topics"] == "built in"
    assert rows["yahoo"] == rows["text"] == ""
    assert rows["svhn"] == rows["celeba"] == "files"
    assert rows["sprites"] == rows["digits"] == "built in"
    assert rows["imagenet"] == rows["mnist"] == rows["shapes3d"] == ""
    assert any("orientation 40, pos_x 32, pos_y 32" in line for line in lines)


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_a_prepared_set_is_the_set(pictures, movae, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    loaders = [make_loader("torch", split(pictures), 2, CPU, train=True, seed=4, flip=True)]
    assert "written, 7 images" in prepare(movae, pictures, decoder=decoder)
    source = split(pictures)
    assert isinstance(source, Prepared)
    loaders.append(make_loader("resident", source, 2, CPU, train=True, seed=4, flip=True))
    for (x, y), (x2, y2) in zip(*(loader.epoch(1) for loader in loaders), strict=True):
        assert float((x - x2).abs().mean()) * 255 <= (2 if decoder == "dali" else 0)
        assert torch.equal(y, y2)
    rest = list(loaders[1].epoch(1, start=2))
    assert torch.equal(rest[0][0], x2)
    assert "current" in prepare(movae, pictures, decoder=decoder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_prepared_set_that_fits_lies_on_the_gpu(pictures, movae):
    prepare(movae, pictures)
    loaders = [
        make_loader("resident", split(pictures), 2, torch.device(d), train=True, flip=True)
        for d in ("cpu", "cuda")
    ]
    assert loaders[1].source.images.device.type == "cuda"
    for (x, y), (x2, y2) in zip(*(loader.epoch(1) for loader in loaders), strict=True):
        assert torch.equal(x, x2.cpu())
        assert torch.equal(y, y2.cpu())


def test_training_maps_what_is_prepared(pictures, movae, train, capsys, monkeypatch):
    prepare(movae, pictures)
    monkeypatch.setattr("movae_fast.data.sources.decode", None)
    flags = ["--limit_train 0", "--limit_test 0", "--steps 2", "--num_samples 2", "--batch_size 2"]
    train("--dataset folder", f"--data_dir {pictures}", "--image_size 16", *flags)
    out = capsys.readouterr().out
    assert "resident loader" in out
    assert "training images: prepared" in out


def test_a_changed_file_is_noticed(pictures, movae):
    prepare(movae, pictures)
    datafiles.photo(pictures / "train" / "2.jpg", 99)
    source = split(pictures)
    assert "is out of date (the original files changed); reading those" in source.note
    assert torch.equal(source[2][0], split(pictures)[2][0])
    assert isinstance(split(pictures, "test"), Prepared)
    assert "written" in prepare(movae, pictures)
    again = split(pictures)
    assert isinstance(again, Prepared)
    assert torch.equal(again.gather(torch.tensor([2]))[0][0], source[2][0])
    (pictures / "train" / "9.jpg").write_bytes((pictures / "train" / "2.jpg").read_bytes())
    assert not isinstance(split(pictures), Prepared)


def test_another_transform_is_another_file(pictures, movae):
    prepare(movae, pictures)
    wider = ReadOptions(pictures, "train", 20, False, CPU)
    assert not isinstance(open_split(DATASETS["folder"], wider), Prepared)
    at = prepared_format.prepared_path("folder", options(pictures)).with_suffix(".json")
    header = json.loads(at.read_text())
    header["transform"]["box"] = [0, 0, 8, 8]
    at.write_text(json.dumps(prepared_format.sealed(header)))
    assert "out of date" in split(pictures).note


def test_a_preparation_goes_on_where_it_was_stopped(pictures, movae, monkeypatch):
    monkeypatch.setattr("movae_fast.data.prepare.CHUNK", 2)
    monkeypatch.setattr("movae_fast.data.prepared_format.BLOCK", 1)
    read, seen = decode, []

    def stops(path, *rest):
        seen.append(path.name)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return read(path, *rest)

    monkeypatch.setattr("movae_fast.data.prepare.in_threads", map)  # one after another
    monkeypatch.setattr("movae_fast.data.sources.decode", stops)
    assert "interrupted" in prepare(movae, pictures, "--split", "train", status=130)
    assert not isinstance(split(pictures), Prepared)  # half-written: not used
    assert "continued, 7 images" in prepare(movae, pictures, "--split", "train")
    assert seen == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "4.jpg", "5.jpg", "6.jpg"]
    monkeypatch.setattr("movae_fast.data.sources.decode", read)
    source = split(pictures)
    images = DATASETS["folder"].read(options(pictures))
    for i in range(7):
        assert torch.equal(source.gather(torch.tensor([i]))[0][0], images[i][0])
    assert not list((pictures / "prepared").glob("*.part*"))


@pytest.mark.parametrize("what", ["u8", "json", "labels.npy"])
def test_a_damaged_prepared_file_is_refused_with_what_was_expected(pictures, movae, what):
    prepare(movae, pictures)
    path = prepared_format.prepared_path("folder", options(pictures))
    victim = path.with_suffix(f".{what}")
    victim.write_bytes(victim.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"is not a whole prepared file \(.*\): delete it") as caught:
        split(pictures)
    if what == "u8":
        assert "5,367 bytes, expected 5,376 for images [7, 3, 16, 16]" in str(caught.value)
    assert "written" in prepare(movae, pictures)
    assert isinstance(split(pictures), Prepared)


def test_verify_finds_damage(pictures, movae):
    prepare(movae, pictures)
    out = movae("verify", pictures, "--image_size", SIZE)
    assert "folder train: 7 images, 0 unreadable; folder-train-16-center148-auto.u8 has its checksums" in out
    path = prepared_format.prepared_path("folder", options(pictures))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(bytes(data))
    (pictures / "test" / "1.jpg").write_bytes(b"")
    out = movae("verify", pictures, "--image_size", SIZE, status=1)
    assert "is damaged: checksums differ at images 0 to 6; prepare again" in out
    assert "folder test: 3 images, 1 unreadable" in out
    assert "1.jpg: empty file" in out.replace("\n", "")


def test_verify_knows_the_published_sizes_and_reads_grids(tmp_path, monkeypatch, movae):
    datafiles.mnist(tmp_path, monkeypatch)
    out = movae("verify", "mnist", "--data_dir", tmp_path, status=1)
    assert "mnist train: 8 images, the published set has 60,000" in out
    datafiles.WRITERS["dsprites"](tmp_path, monkeypatch)
    path = tmp_path / GRIDS["dsprites"].filename
    data = bytearray(path.read_bytes())
    data[2000] ^= 0xFF  # within the compressed images
    path.write_bytes(bytes(data))
    assert "is damaged" in movae("verify", "dsprites", "--data_dir", tmp_path, status=2)


def test_bad_images_stop_a_preparation_or_stay_out(pictures, movae):
    (pictures / "train" / "2.jpg").write_bytes(b"")
    assert "2.jpg is not a readable image (empty file)" in prepare(movae, pictures, status=2)
    out = prepare(movae, pictures, "--on_bad_image", "skip")
    assert "6 images" in out
    assert "left out: " in out
    source = split(pictures, on_bad_image="skip")
    assert (len(source), len(source.skipped)) == (6, 1)
    with pytest.raises(ValueError, match="leaves out 1 unreadable images"):
        split(pictures)


def test_a_prepared_set_needs_its_original_files_no_more(pictures, movae):
    prepare(movae, pictures)
    for path in [*pictures.glob("train/*"), *pictures.glob("test/*")]:
        path.unlink()
    assert len(split(pictures)) == 7


def test_a_list_of_files_is_a_set(pictures, movae):
    names = [f"train/{i}.jpg" for i in (5, 1, 3)] * 3 + ["test/0.jpg"]
    path = pictures / "mine.txt"
    path.write_text("\n".join(names) + "\n\n")
    train, test = split(path), split(path, "test")
    assert [f.name for f in train.files] == ["5.jpg", "1.jpg", "3.jpg"] * 3
    assert [f.parent.name for f in test.files] == ["test"]
    prepare(movae, path)
    assert isinstance(split(path), Prepared)
    assert not isinstance(split(pictures), Prepared)
    path.write_text("train/5.jpg\nelsewhere.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 listed files are missing, as .*elsewhere\.jpg"):
        DATASETS["folder"].read(options(path))


def test_grids_are_prepared_with_their_factors(tmp_path, monkeypatch, movae):
    datafiles.WRITERS["shapes3d"](tmp_path, monkeypatch)
    original = split(tmp_path, name="shapes3d")
    movae("prepare", "shapes3d", "--data_dir", tmp_path, "--image_size", SIZE)
    source = split(tmp_path, name="shapes3d")
    rows = torch.arange(len(source))
    assert isinstance(source, Prepared)
    for a, b in zip(source.gather(rows), original.gather(rows), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(source.factors(rows), original.factors(rows))
    datafiles.mnist(tmp_path, monkeypatch)
    assert "nothing to prepare" in movae("prepare", "mnist", "--data_dir", tmp_path, status=2)


def test_synthetic_scenes_are_jpegs_of_celebas_size(tmp_path, movae):
    movae("synthetic_jpeg", tmp_path / "scenes", "--n", 5)
    files = sorted((tmp_path / "scenes").rglob("*.jpg"))
    assert [f.name for f in files] == [f"00000{i}.jpg" for i in range(5)]
    pixels = []
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (178, 218), "RGB")
            pixels.append(np.asarray(image).astype(float))
    assert all(np.abs(a - b).mean() > 10 for a, b in pairwise(pixels))
    changed = files[2].stat().st_mtime_ns
    movae("synthetic_jpeg", tmp_path / "scenes", "--n", 6)
    assert files[2].stat().st_mtime_ns == changed
    assert len(list((tmp_path / "scenes").rglob("*.jpg"))) == 6


def test_what_is_asked_wrongly_is_one_line(movae, tmp_path):
    assert "unknown (did you mean prepare?)" in movae("prepar", status=2)
    assert "takes a NAME or FOLDER" in movae("prepare", status=2)
    assert "takes no name" in movae("list", "mnist", status=2)
    assert "--dataset celeb: unknown (did you mean celeba?" in movae("verify", "celeb", status=2)
    assert "usage: movae data" in movae("--help")


def test_a_corpus_is_listed_and_verified(tmp_path, movae):
    (tmp_path / "yahoo").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "yahoo" / f"yahoo.{split}.txt").write_text(f"a dog\n{split} it\n")
    lines = movae("list", "--data_dir", tmp_path).splitlines()
    assert any("yahoo" in line and "files" in line for line in lines)
    train, _, test, digest = movae("verify", "yahoo", "--data_dir", tmp_path).splitlines()
    assert train == "yahoo train: 2 sentences, 4 words, vocabulary 8"
    assert test == "yahoo test: 2 sentences, 4 words, vocabulary 8; 1 words unknown"
    assert len(digest.split()[-1]) == 64
    assert "nothing to prepare" in movae("prepare", "yahoo", "--data_dir", tmp_path, status=2)
