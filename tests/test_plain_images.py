"""Which files any decoder may read, and that all loaders mean the same by the others."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from movae_fast.data import ImageFiles, ReadOptions, make_loader
from movae_fast.data.decode import decode
from movae_fast.data.plain_files import plain_size

CPU = torch.device("cpu")
HEIGHT, WIDTH = 40, 56
XMP = b"http://ns.adobe.com/xap/1.0/\0"


def gradient(height=HEIGHT, width=WIDTH):
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * y // max(height - 1, 1), 255 * x // max(width - 1, 1), 0 * y + 60], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def segment(marker, data):
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


PNG = saved(gradient(), "PNG")
JPEG = saved(gradient(), "JPEG", quality=97, subsampling=0)
SCAN = JPEG.index(b"\xff\xda")
FRAMES = [gradient(), gradient().rotate(180), gradient().rotate(90)]


def with_chunk(kind, data, before=b"IDAT"):
    at = PNG.index(before) - 4
    return PNG[:at] + chunk(kind, data) + PNG[at:]


def with_segment(marker, data, at=2):
    return JPEG[:at] + segment(marker, data) + JPEG[at:]


def xmp(orientation, element=False):
    tag = b"<tiff:Orientation>%d</tiff:Orientation>" if element else b'<r tiff:Orientation="%d"/>'
    return b"<x:xmpmeta>" + tag % orientation + b"</x:xmpmeta>"


def exif(orientation):
    record = Image.Exif()
    record[0x0112] = orientation
    return record.tobytes()


def raw_profile(orientation):
    data = exif(orientation)
    return b"\nexif\n%8d\n" % len(data) + data.hex().encode() + b"\n"


def renamed(data, ids):
    """A JPEG whose components bear other numbers, and no word on its colours."""
    data = data[:2] + data[2 + 2 + struct.unpack(">H", data[4:6])[0] :]  # without JFIF
    for marker, first, step in ((b"\xff\xc0", 10, 3), (b"\xff\xda", 5, 2)):
        at = data.index(marker) + first
        for i, number in enumerate(ids):
            data = data[: at + i * step] + bytes([number]) + data[at + i * step + 1 :]
    return data


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


PLAIN = {
    "png": PNG,
    "grey png": saved(gradient().convert("L"), "PNG"),
    "png with a comment": with_chunk(b"tEXt", b"Comment\0upright"),
    "png with a profile": saved(gradient(), "PNG", icc_profile=b"none", dpi=(72, 72)),
    "jpeg": JPEG,
    "grey jpeg": saved(gradient().convert("L"), "JPEG"),
    "progressive jpeg": saved(gradient(), "JPEG", progressive=True),
    "jpeg with restarts": saved(gradient(), "JPEG", restart_marker_rows=1),
    "jpeg with upright exif": with_segment(0xE1, exif(1)),
    "jpeg with upright xmp": with_segment(0xE1, XMP + xmp(1)),
    "jpeg with a comment": with_segment(0xFE, b"upright"),
}
TURNED = {
    "exif in a jpeg": with_segment(0xE1, exif(6)),
    "exif after the frame": with_segment(0xE1, exif(6), SCAN),
    "exif in two parts": JPEG[:2] + segment(0xE1, b"Exif\0\0") + segment(0xE1, exif(6)) + JPEG[2:],
    "xmp in a jpeg": with_segment(0xE1, XMP + xmp(6)),
    "xmp element in a jpeg": with_segment(0xE1, XMP + xmp(6, element=True)),
    "xmp after the frame": with_segment(0xE1, XMP + xmp(6), SCAN),
    "exif in a png": with_chunk(b"eXIf", exif(6)[6:]),
    "exif after the pixels": with_chunk(b"eXIf", exif(6)[6:], b"IEND"),
    "xmp in a png": with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6)),
    "packed xmp in a png": with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(6))),
    "xmp after the pixels": with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6), b"IEND"),
    "profile in a png's text": with_chunk(b"tEXt", b"Raw profile type exif\0" + raw_profile(6)),
    "packed profile": with_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw_profile(6))),
    "exif in a webp": saved(gradient(), "WEBP", lossless=True, exif=exif(6)),
    "xmp in a webp": saved(gradient(), "WEBP", lossless=True, xmp=xmp(6)),
    "tag in a tiff": saved(gradient(), "TIFF", tiffinfo={0x0112: 6}),
}
ODD = {
    "several in a gif": saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "several in a png": saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "a png's still and others": saved(
        FRAMES[0], "PNG", save_all=True, default_image=True, append_images=FRAMES[1:]
    ),
    "several in a webp": saved(FRAMES[0], "WEBP", save_all=True, lossless=True, append_images=FRAMES[1:]),
    "several in a tiff": saved(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]),
    "several in a jpeg": saved(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:], quality=97),
    "transparent rgb": saved(gradient(), "PNG", transparency=(0, 0, 60)),
    "transparent grey": saved(gradient().convert("L"), "PNG", transparency=3),
    "suggested palette": with_chunk(b"PLTE", bytes(48)),
    "jpeg of rgb": saved(gradient(), "JPEG", quality=97, keep_rgb=True),
    "jpeg of unnamed colours": renamed(JPEG, b"RGB"),
    "twice the same jpeg": JPEG + b"\0",
    "trailing bytes": PNG + b"more",
    **{
        f"{form} {mode}": saved(gradient().convert(mode), form)
        for form, modes in {
            "PNG": ("1", "LA", "P", "RGBA"),
            "TIFF": ("L", "CMYK", "YCbCr", "LAB"),
            "JPEG": ("CMYK",),
            "BMP": ("RGB", "P"),
            "PPM": ("RGB", "L"),
        }.items()
        for mode in modes
    },
}
DAMAGED = {
    "damaged comment": flipped(with_chunk(b"tEXt", b"Comment\0hello"), PNG.index(b"IDAT") + 10),
    "unknown critical chunk": with_chunk(b"ABCD", b"x"),
    "no end": PNG[:-12],
    "bytes before the scan": JPEG[:SCAN] + bytes(4) + JPEG[SCAN:],
    "a marker among the pixels": JPEG[: SCAN + 100] + b"\xff\xc8" + JPEG[SCAN + 102 :],
    "an end among the pixels": JPEG[: SCAN + 100] + b"\xff\xd9" + JPEG[SCAN + 102 :],
    "two frames": JPEG[:SCAN] + JPEG[JPEG.index(b"\xff\xc0") :],
}
LONG = {f"{h}x{w}": saved(gradient(h, w), "PNG") for h, w in ((1, 1), (1, 3000), (3000, 1), (2, 3))}
LONG |= {f"{h}x{w} jpeg": saved(gradient(h, w), "JPEG") for h, w in ((1, 1), (1, 3000), (3000, 1), (1, 2))}
EVERY = PLAIN | TURNED | ODD | DAMAGED | LONG


@pytest.mark.parametrize("name", EVERY)
def test_plain_is_what_decoders_cannot_disagree_on(name):
    size = plain_size(EVERY[name], 3)
    if name in PLAIN:
        assert size == (HEIGHT, WIDTH)
    elif name not in LONG:
        assert size is None


def test_a_picture_of_colours_is_not_plain_where_grey_is_wanted():
    assert plain_size(PNG, 1) is None
    assert plain_size(JPEG, 1) is None
    assert plain_size(PLAIN["grey png"], 1) == plain_size(PLAIN["grey jpeg"], 1) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("data", [PNG, JPEG], ids=["png", "jpeg"])
def test_what_is_cut_short_is_not_plain(data):
    assert all(plain_size(data[:n], 3) is None for n in range(len(data)))


@pytest.mark.parametrize("name", TURNED)
def test_a_turned_picture_is_read_upright(tmp_path, name):
    path = tmp_path / "x"
    path.write_bytes(TURNED[name])
    upright = np.asarray(gradient().transpose(Image.Transpose.ROTATE_270))
    pixels = decode(path)
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).mean() < 2


@pytest.mark.parametrize("name", [name for name in ODD if name.startswith("several")])
def test_of_several_pictures_the_first_is_read(tmp_path, name):
    path = tmp_path / "x"
    path.write_bytes(ODD[name])
    assert np.abs(decode(path).astype(int) - np.asarray(gradient())).mean() < 8  # a gif's palette


def first_batch(kind, source):
    """The images, or the error's text."""
    try:
        return next(iter(make_loader(kind, source, len(source), CPU, train=False).epoch()))[0].clone()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(("channels", "box"), [(3, None), (1, None), (3, (3, 2, 20, 20))])
def test_all_loaders_mean_the_same_by_every_file(tmp_path, channels, box):
    pytest.importorskip("nvidia.dali")
    for name, data in EVERY.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(data)
        sources = [
            ImageFiles([path], ReadOptions(tmp_path, "train", 24, False, CPU), box, "bilinear", [0], channels)
            for _ in range(3)
        ]
        expected, *others = map(first_batch, ("torch", "resident", "dali"), sources)
        for found in others:
            if isinstance(expected, str):
                assert found == expected, name
            else:
                assert float((found - expected).abs().mean()) * 255 < 3, name


def test_an_image_that_a_crop_does_not_fit_in_is_refused_by_name(tmp_path):
    (tmp_path / "small.png").write_bytes(PNG)
    options = ReadOptions(tmp_path, "train", 24, False, CPU)
    for kind in ("torch", "resident"):
        fits = ImageFiles([tmp_path / "small.png"], options, (0, 0, HEIGHT, WIDTH), "bilinear")
        assert first_batch(kind, fits).shape == (1, 3, 24, 24)
        wide = ImageFiles([tmp_path / "small.png"], options, (0, 1, HEIGHT, WIDTH), "bilinear")
        assert "small.png is not a readable image (56x40 pixels, and the crop needs 57x40)" in first_batch(
            kind, wide
        )
