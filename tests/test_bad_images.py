"""Image files as they come: damage is named or left out, every kind of pixels is read; by each loader."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from movae_fast.data import DATASETS, ReadOptions, choose_loader, decode, make_loader, open_split
from movae_fast.data.decode import PILLOW
from movae_fast.data.prefetch import in_threads
from tests.datafiles import photo

pytestmark = pytest.mark.usefixtures("own_cache")
CPU = torch.device("cpu")
SIZE = 32


@pytest.fixture(params=["torch", "torch with workers", "resident", "dali"])
def kind(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


def loader(kind, root, on_bad_image="error", split="train", batch_size=2, train=False):
    options = ReadOptions(root, split, SIZE, False, CPU)
    source = open_split(DATASETS["folder"], options, on_bad_image)
    workers = 2 if kind == "torch with workers" else 0
    name = kind.split()[0]
    return make_loader(name, source, batch_size, CPU, num_workers=workers, train=train)


def pictures(root, n=6):
    for split in ("train", "test"):
        for i in range(n):
            photo(root / split / f"{i}.jpg", i)
    return root / "train"


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def corrupt(path):
    path.write_bytes(b"\xff\xd8" + bytes(500) + b"\xff\xd9")


def no_image(path):
    path.write_text("meeting notes of Tuesday")


def truncated_png(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:-300])


def corrupt_png(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path, "PNG")
    data = bytearray(path.read_bytes())
    data[300] ^= 0xFF
    path.write_bytes(bytes(data))


def adobe_cut_short(path):
    path.write_bytes(b"\xff\xd8\xff\xee\x00\x02Adobe\xff\xd9")


def exif_alone(path):
    path.write_bytes(b"\xff\xd8\xff\xe1\x00\x10Exif\x00\x00" + bytes(8) + b"\xff\xd9")


def absurdly_large(path):
    # A bilevel PNG of zeros is small on the disk, whatever it claims.
    Image.new("1", (11_000, 10_000)).save(path, "PNG")


DAMAGE = [empty, truncated, corrupt, no_image, truncated_png, corrupt_png, absurdly_large]
DAMAGE += [adobe_cut_short, exif_alone]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_a_bad_file_is_named_or_left_out(tmp_path, kind, damage):
    bad = pictures(tmp_path) / "3.jpg"
    damage(bad)
    with pytest.raises(ValueError, match=r"3\.jpg is not a readable image \(.+\); mend or remove it") as caught:
        list(loader(kind, tmp_path).epoch())
    assert "\n" not in str(caught.value)
    work = loader(kind, tmp_path, "skip")
    assert sum(len(x) for x, _ in work.epoch()) == 5
    assert len(work.left_out) == 1
    assert str(bad) in work.left_out[0]
    assert len(work.left_out[0]) > len(str(bad)) + 4  # and why


def test_every_damage_at_once_leaves_the_good_ones_in_order(tmp_path, kind):
    folder = pictures(tmp_path, len(DAMAGE) + 1)
    good = torch.cat([x for x, _ in loader(kind, tmp_path).epoch()])[-1]
    for i, damage in enumerate(DAMAGE):
        damage(folder / f"{i}.jpg")
    images = torch.cat([x for x, _ in loader(kind, tmp_path, "skip").epoch()])
    assert torch.equal(images, good[None])
    damage(folder / f"{len(DAMAGE)}.jpg")
    with pytest.raises(
        ValueError, match=r"--dataset folder: not one train image can be read \(.*0\.jpg: empty"
    ):
        loader(kind, tmp_path, "skip")


def test_a_file_that_was_mended_comes_back(tmp_path):
    bad = pictures(tmp_path) / "3.jpg"
    empty(bad)
    assert len(loader("torch", tmp_path, "skip").source) == 5
    photo(bad, 77)
    assert len(loader("torch", tmp_path, "skip").source) == 6


def test_the_survey_reads_each_file_once(tmp_path, monkeypatch):
    empty(pictures(tmp_path) / "3.jpg")
    first = loader("torch", tmp_path, "skip").left_out
    monkeypatch.setattr("movae_fast.data.unreadable.try_decode", None)
    assert loader("torch", tmp_path, "skip").left_out == first


def gradient(h=48, w=64):
    y, x = np.mgrid[0:h, 0:w]
    return np.stack([255 * y // (h - 1), 255 * x // (w - 1), np.full((h, w), 60)], -1).astype(np.uint8)


def cmyk(path, image):
    image.convert("CMYK").save(path, "JPEG", quality=98, subsampling=0)


def palette(path, image):
    image.quantize(256, dither=Image.Dither.NONE).save(path, "PNG")


def alpha(path, image):
    image.putalpha(200)
    image.save(path, "PNG")


def sixteen_bit(path, image):
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(path, "PNG")


def rotated(path, image):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it upright"
    image.rotate(90, expand=True).save(path, "JPEG", quality=98, subsampling=0, exif=exif)


def webp(path, image):
    image.save(path, "WEBP", lossless=True)


def progressive(path, image):
    image.save(path, "JPEG", quality=98, subsampling=0, progressive=True)


def grey_jpeg(path, image):
    image.convert("L").save(path, "JPEG", quality=98)


# Kind of file -> largest mean difference (of 255) from the upright RGB original that its own coding explains.
KINDS = {
    cmyk: 2,
    palette: 12,
    alpha: 1,
    sixteen_bit: 1,
    rotated: 2,
    webp: 1,
    progressive: 2,
    grey_jpeg: 2,
}


@pytest.mark.parametrize("write", KINDS, ids=lambda w: w.__name__)
def test_unusual_pixels_are_read_upright_as_rgb(tmp_path, kind, write):
    folder = pictures(tmp_path, 2)
    original = Image.fromarray(gradient())
    for path in folder.iterdir():
        write(path, original.copy())
    if write in (sixteen_bit, grey_jpeg):
        original = original.convert("L").convert("RGB")
    original.save(tmp_path / "test" / "0.jpg", "BMP")
    expected = next(iter(loader("torch", tmp_path, split="test", batch_size=1).epoch()))[0]
    images = next(iter(loader(kind, tmp_path).epoch()))[0]
    assert images.shape == (2, 3, SIZE, SIZE)
    assert float((images - expected).abs().mean()) * 255 < KINDS[write]
    if write is rotated:  # and it would be seen if nobody had turned it
        assert float((images.rot90(1, (2, 3)) - expected).abs().mean()) * 255 > 20


def test_decoding_in_threads_hides_pillows_warnings_only(tmp_path, recwarn):
    odd = tmp_path / "odd.jpg"
    photo(odd, 0)
    data = odd.read_bytes()
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x09\x00\x01"  # nine entries, of which there are none
    odd.write_bytes(data[:2] + b"\xff\xe1" + (2 + len(exif)).to_bytes(2, "big") + exif + data[2:])
    with pytest.warns(UserWarning, match="EXIF"), Image.open(odd) as file:
        file.getexif().get(1)
    before = list(warnings.filters)
    for pixels in in_threads(decode.decode, [odd] * 64):
        assert pixels.shape[2] == 3
    kept = [f for f in warnings.filters if f not in before]
    assert all(getattr(f[3], "pattern", "") == PILLOW for f in kept)
    assert [w for w in recwarn if "PIL" in w.filename] == []
    with pytest.warns(RuntimeWarning, match="of another kind"):
        warnings.warn("of another kind", RuntimeWarning, stacklevel=1)


def test_the_limit_of_size_is_on_pixels(tmp_path, monkeypatch):
    photo(tmp_path / "a.jpg", size=(40, 30))
    monkeypatch.setattr(decode, "MAX_PIXELS", 1200)
    assert decode.decode(tmp_path / "a.jpg").shape == (30, 40, 3)
    monkeypatch.setattr(decode, "MAX_PIXELS", 1199)
    with pytest.raises(ValueError, match=r"40x30: more than 1,199 pixels"):
        decode.decode(tmp_path / "a.jpg")


def test_training_says_and_logs_what_it_leaves_out(tmp_path, train, capsys):
    empty(pictures(tmp_path) / "3.jpg")
    flags = (f"--dataset folder --data_dir {tmp_path} --image_size 16 --batch_size 2 --limit_train 0 "
             "--limit_test 0 --steps 1 --log_every 1 --num_samples 2").split(" --")  # fmt: skip
    flags = [flags[0], *("--" + f for f in flags[1:])]
    train(*flags, status=2)
    assert "3.jpg is not a readable image (empty file)" in capsys.readouterr().err
    folder = train(*flags, "--on_bad_image skip")
    out = capsys.readouterr().out
    assert "--on_bad_image skip: 1 training images left out" in out
    assert "3.jpg: empty file" in out.replace("\n", "")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 0, "data/left_out_train": 1, "data/left_out_test": 0}


def test_auto_takes_what_fits_and_says_why(tmp_path, monkeypatch):
    pictures(tmp_path)
    source = open_split(DATASETS["folder"], ReadOptions(tmp_path, "train", SIZE, False, CPU))
    need = 6 * 3 * SIZE * SIZE
    monkeypatch.setattr("movae_fast.data.loaders.choose.free_memory", lambda device: 4 * need)
    assert choose_loader("auto", source, CPU, 0.25)[0] == "resident"
    monkeypatch.setattr("movae_fast.data.loaders.dali.available", lambda: False)
    kind, why = choose_loader("auto", source, CPU, 0.24)
    assert kind == "torch"
    assert "chosen for" in why
    assert "resident takes at most 24%" in why
    monkeypatch.setattr("movae_fast.data.loaders.dali.available", lambda: True)
    assert choose_loader("auto", source, CPU, 0.24)[0] == "dali"
    assert choose_loader("torch", source, CPU)[0] == "torch"


def test_resident_files_are_decoded_once(tmp_path, monkeypatch):
    pictures(tmp_path)
    work = loader("resident", tmp_path, train=True)
    first = [x for x, _ in work.epoch(0)]
    monkeypatch.setattr("movae_fast.data.sources.decode", None)
    for a, b in zip(first, work.epoch(0), strict=True):
        assert torch.equal(a, b[0])
