"""Decode an image file to upright 8-bit pixels, or refuse it with a reason.

CMYK and palette images become RGB, 16-bit images keep their upper byte, and of several pictures in one file the
first is taken. The image is rotated if Pillow finds a rotation in EXIF data, XMP or a PNG's text. Any other
file that is not a complete image of reasonable size raises ValueError, which names the file.
"""

from __future__ import annotations

import errno
import io
import warnings
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from movae_fast.data.find_files import File, opened
from movae_fast.names import first_line, shown

Box = tuple[int, int, int, int]  # top, left, height, width in pixels
MAX_PIXELS = 100_000_000  # A larger image is a mistake or an attack: this one takes 300 MB when it is decoded.

PILLOW = r"PIL\."  # matches the names of Pillow's modules
ORIENTATION = 0x0112  # EXIF's tag
# These errors tell of the machine's present state, not of the file.
PASSING_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def decode(path: File, channels: int = 3, data: bytes | None = None) -> np.ndarray:  # [H, W, channels] uint8
    """Return the pixels of the image file at `path`, or of its bytes if they are given as `data`.

    Raises ValueError, which names `path`, for a file that cannot be decoded.
    """
    pixels = try_decode(path, channels, data)
    if isinstance(pixels, str):
        raise refusal(path, pixels)
    return pixels


def try_decode(path: File, channels: int = 3, data: bytes | None = None) -> np.ndarray | str:
    """Return what `decode` returns or, for a file that cannot be decoded, the reason as text.

    Raises OSError or MemoryError if the machine lacks memory or file descriptors.
    """
    try:
        quieten_pillow()
        with opened(path) if data is None else io.BytesIO(data) as stream, Image.open(stream) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"{file.width}x{file.height}: more than {MAX_PIXELS:,} pixels")
            return _pixels(file, channels)
    except MemoryError:
        raise
    # Pillow's plugins raise SyntaxError, struct.error, IndexError and others on damaged files.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in PASSING_ERRORS:
            raise
        return _reason(error, path)


def refusal(path: File, why: str) -> ValueError:
    """Return the ValueError for an image file that cannot be used, with the reason and the remedy."""
    return ValueError(
        f"{shown(path)} is not a readable image ({shown(why)}); mend or remove it, "
        "or leave it out by --on_bad_image skip"
    )


def crop_box(path: File, box: Box | None, height: int, width: int) -> Box:
    """Return the rectangle to crop from an image of this size: `box`, or the central square if it is None.

    Raises ValueError, which names the file, if the box does not lie inside the image.
    """
    if box is None:
        side = min(height, width)
        return (height - side) // 2, (width - side) // 2, side, side
    if why := misfit(box, height, width):
        raise refusal(path, why)
    return box


def misfit(box: Box | None, height: int, width: int) -> str:
    """Return the reason why `box` does not lie inside an image of this size, or "" if it does."""
    if box is None or (box[0] + box[2] <= height and box[1] + box[3] <= width):
        return ""
    return f"{width}x{height} pixels, and the crop needs {box[1] + box[3]}x{box[0] + box[2]}"


def quieten_pillow() -> None:
    """Silence Pillow's warnings (a large image, odd metadata), since `decode` handles these cases itself.

    The filter is never removed: `catch_warnings` in one thread would undo or keep what another thread has set.
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
        return error.strerror  # The file cannot be opened.
    with suppress(OSError):
        if path.stat().st_size == 0:
            return "empty file"
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"  # Pillow's own text has the address of a stream in it.
    return first_line(error)
