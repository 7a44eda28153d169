"""From an image file to upright 8-bit pixels: what is accepted, what is refused, and who says so.

CMYK and palette images become RGB, 16-bit images keep their upper byte, of several pictures in one file the
first is taken. A rotation is carried out wherever Pillow finds one: in EXIF data, in XMP, in a PNG's text.
Everything else that is not a whole image of a sane size is a ValueError that names the file.

`plain_size` tells which files any other decoder may read in its place and mean the same.
"""

from __future__ import annotations

import errno
import io
import re
import struct
import warnings
import zlib
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from movae_fast.data.fetch import first_line
from movae_fast.data.find_files import File, opened
from movae_fast.names import shown

Box = tuple[int, int, int, int]  # top, left, height, width in pixels
MAX_PIXELS = 100_000_000  # what is larger is a mistake or an attack: 300 MB decoded

PILLOW = r"PIL\."  # its modules
ORIENTATION = 0x0112  # EXIF's tag
# What says something about this machine's state, not about the file.
OF_THE_MOMENT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def decode(path: File, channels: int = 3, data: bytes | None = None) -> np.ndarray:
    """uint8 [H, W, channels] of the image at `path` (or of `data`, its bytes). Raises ValueError naming it."""
    pixels = tried(path, channels, data)
    if isinstance(pixels, str):
        raise refused(path, pixels)
    return pixels


def tried(path: File, channels: int = 3, data: bytes | None = None) -> np.ndarray | str:
    """As `decode`, or why not. Raises OSError and MemoryError where the machine is short of something."""
    try:
        _quieten_pillow()
        with opened(path) if data is None else io.BytesIO(data) as stream, Image.open(stream) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"{file.width}x{file.height}: more than {MAX_PIXELS:,} pixels")
            return _pixels(file, channels)
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # Pillow's plugins raise SyntaxError, struct.error, IndexError, … on damaged files
        if isinstance(error, OSError) and error.errno in OF_THE_MOMENT:
            raise
        return _reason(error, path)


def refused(path: File, why: str) -> ValueError:
    return ValueError(
        f"{shown(path)} is not a readable image ({shown(why)}); mend or remove it, "
        "or leave it out by --on_bad_image skip"
    )


def crop_box(path: File, box: Box | None, height: int, width: int) -> Box:
    """`box`, or an image's central square. Raises ValueError naming a file that the box does not lie in."""
    if box is None:
        side = min(height, width)
        return (height - side) // 2, (width - side) // 2, side, side
    if why := misfit(box, height, width):
        raise refused(path, why)
    return box


def misfit(box: Box | None, height: int, width: int) -> str:
    """Why `box` cannot be cut out of an image of this size, "" where it can."""
    if box is None or (box[0] + box[2] <= height and box[1] + box[3] <= width):
        return ""
    return f"{width}x{height} pixels, and the crop needs {box[1] + box[3]}x{box[0] + box[2]}"


def _quieten_pillow() -> None:
    """What is worth a warning to Pillow (a large image, odd metadata) is decided here.

    For good: `catch_warnings` in one thread would undo or keep what another one set.
    """
    if all(getattr(module, "pattern", "") != PILLOW for _, _, _, module, _ in warnings.filters):
        warnings.filterwarnings("ignore", module=PILLOW)


def _pixels(file: Image.Image, channels: int) -> np.ndarray:
    image = file if file.getexif().get(ORIENTATION, 1) == 1 else ImageOps.exif_transpose(file)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"{image.mode}: pixels of 32 bits")
    pixels = np.array(image.convert("RGB" if channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _reason(error: Exception, path: File) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # it cannot be opened
    with suppress(OSError):
        if path.stat().st_size == 0:
            return "empty file"
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"  # Pillow adds the address of the stream that it read
    return first_line(error)


JPEG_TABLES = {0xC4, 0xDB, 0xDD}  # of Huffman codes, of quantisation, the interval of restarts
# Before the first scan also comments and the applications' own, into some of which `_plain_jpeg` looks.
JPEG_SEGMENTS = {*JPEG_TABLES, 0xFE, *range(0xE0, 0xF0)}
JPEG_SCAN = 0xDA
# What is neither coded pixels (where a zero follows 0xFF) nor a restart between them.
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")
JPEG_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive; none of them lossless or arithmetic
# PNG chunks that change no pixel of an 8-bit grey or RGB picture, and those of text, which may hold a rotation.
PNG_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"sBIT", b"bKGD", b"tIME"}
PNG_TEXTS = {b"tEXt", b"zTXt", b"iTXt"}
PNG_TURNED = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")


def plain_size(data: bytes, channels: int) -> tuple[int, int] | None:
    """(height, width) of a plain image file, None for all else, damaged files among it.

    Plain is a JPEG or PNG, whole to its last byte, upright, alone in its file, 8 bits deep, grey or (for three
    channels) RGB, without transparency or interlacing, and with nothing in it that decoders disagree on.
    """
    try:
        if data[:2] == b"\xff\xd8" and data[-2:] == b"\xff\xd9":
            size = _plain_jpeg(data, channels)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            size = _plain_png(data, channels)
        else:
            return None
    except Exception:  # damage of any kind, of which `decode` says what it is
        return None
    return size if size is not None and 0 < size[0] * size[1] <= MAX_PIXELS else None


def _plain_jpeg(data: bytes, channels: int) -> tuple[int, int] | None:
    at, size, ask_pillow, jfif, adobe, ids = 2, None, False, False, -1, b""
    while data[at] == 0xFF and data[at + 1] != JPEG_SCAN:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        segment = data[at + 4 : at + 2 + length]
        if marker in JPEG_FRAMES and size is None:
            precision, height, width, components = struct.unpack(">BHHB", segment[:6])
            ids, size = segment[6::3], (height, width)
            if precision != 8 or components not in (1, channels) or len(ids) != components:
                return None
        elif marker not in JPEG_SEGMENTS or (marker == 0xE2 and segment[:4] == b"MPF\0"):
            return None
        jfif = jfif or (marker == 0xE0 and segment[:5] == b"JFIF\0")
        adobe = segment[11] if marker == 0xEE and segment[:5] == b"Adobe" else adobe
        ask_pillow = ask_pillow or marker == 0xE1
        at += 2 + length
    if not _scans_are_whole(data, at) or adobe not in (-1, len(ids) // 3):
        return None
    if len(ids) == 3 and not jfif and adobe < 0 and ids != b"\1\2\3":
        return None  # without a word on its colours, they are what the decoder takes them for
    if ask_pillow:
        _quieten_pillow()
        with Image.open(io.BytesIO(data)) as file:
            return size if file.format == "JPEG" and file.getexif().get(ORIENTATION, 1) == 1 else None
    return size


def _scans_are_whole(data: bytes, at: int) -> bool:
    """Whether from `at` on scans and tables follow each other up to the last two bytes, the image's end."""
    while data[at] == 0xFF and (data[at + 1] == JPEG_SCAN or data[at + 1] in JPEG_TABLES):
        scan, at = data[at + 1] == JPEG_SCAN, at + 2 + (data[at + 2] << 8 | data[at + 3])
        if scan:
            found = JPEG_MARKER.search(data, at)
            at = found.start() if found else len(data)
    return at == len(data) - 2  # of which the caller knows that they are the mark of the end


def _plain_png(data: bytes, channels: int) -> tuple[int, int] | None:
    at, kinds, view = 8, list[bytes](), memoryview(data)
    while at < len(data):
        length, kind = struct.unpack(">I4s", view[at : at + 8])
        end = at + 12 + length
        if kind not in PNG_CHUNKS and (kind not in PNG_TEXTS or data.startswith(PNG_TURNED, at + 8)):
            return None
        if zlib.crc32(view[at + 4 : end - 4]) != struct.unpack(">I", view[end - 4 : end])[0]:
            return None
        if not kinds or kinds[-1] != kind or kind != b"IDAT":
            kinds.append(kind)
        at = end
    width, height, depth, colour, *methods = struct.unpack(">IIBBBBB", view[16:29])
    plain = depth == 8 and colour in ((0,) if channels == 1 else (0, 2)) and not any(methods)
    whole = kinds[0] == b"IHDR" and kinds[-1] == b"IEND" and kinds.count(b"IEND") == kinds.count(b"IDAT") == 1
    return (height, width) if plain and whole else None
