"""Recognise the image files for which any decoder gives the same picture as `decode`."""

from __future__ import annotations

import io
import re
import struct
import zlib

from PIL import Image

from movae_fast.data.decode import MAX_PIXELS, ORIENTATION, quieten_pillow

# Segments that hold Huffman codes, quantisation tables and the interval of restarts.
JPEG_TABLES = {0xC4, 0xDB, 0xDD}
# Before the first scan there may also be comments and applications' segments; `_plain_jpeg` looks into some.
JPEG_SEGMENTS = {*JPEG_TABLES, 0xFE, *range(0xE0, 0xF0)}
JPEG_SCAN = 0xDA
# A marker that is neither coded pixels (a zero follows 0xFF there) nor a restart between them.
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")
JPEG_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive; none of them lossless or arithmetic
# PNG chunks that change no pixel of an 8-bit grey or RGB picture, and those of text, which may hold a rotation.
PNG_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"sBIT", b"bKGD", b"tIME"}
PNG_TEXTS = {b"tEXt", b"zTXt", b"iTXt"}
PNG_ROTATIONS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")


def plain_size(data: bytes, channels: int) -> tuple[int, int] | None:
    """Return (height, width) of a plain image file, given as bytes; None for any other file, damaged ones
    included.

    A plain file is a JPEG or PNG that is complete, upright and single, 8 bits deep, grey or (for three
    channels) RGB, without transparency or interlacing, and without anything that decoders interpret
    differently.
    """
    try:
        if data[:2] == b"\xff\xd8" and data[-2:] == b"\xff\xd9":
            size = _plain_jpeg(data, channels)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            size = _plain_png(data, channels)
        else:
            return None
    except Exception:  # Damage of any kind; `decode` says which.
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
        return None  # Nothing names the colours, so each decoder would guess.
    if ask_pillow:
        quieten_pillow()
        with Image.open(io.BytesIO(data)) as file:
            return size if file.format == "JPEG" and file.getexif().get(ORIENTATION, 1) == 1 else None
    return size


def _scans_are_whole(data: bytes, at: int) -> bool:
    """Return whether a JPEG's scans and tables follow each other from byte `at` up to its end marker."""
    while data[at] == 0xFF and (data[at + 1] == JPEG_SCAN or data[at + 1] in JPEG_TABLES):
        scan, at = data[at + 1] == JPEG_SCAN, at + 2 + (data[at + 2] << 8 | data[at + 3])
        if scan:
            marker = JPEG_MARKER.search(data, at)
            at = marker.start() if marker else len(data)
    return at == len(data) - 2  # `plain_size` has seen that these two mark the end.


def _plain_png(data: bytes, channels: int) -> tuple[int, int] | None:
    at, kinds, view = 8, list[bytes](), memoryview(data)
    while at < len(data):
        length, kind = struct.unpack(">I4s", view[at : at + 8])
        end = at + 12 + length
        if kind not in PNG_CHUNKS and (kind not in PNG_TEXTS or data.startswith(PNG_ROTATIONS, at + 8)):
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
