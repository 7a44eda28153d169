"""From an image file to upright 8-bit pixels: what is accepted, what is refused, and who says so.

CMYK and palette images become RGB, 16-bit images keep their upper byte, a rotation in the EXIF data is
carried out. Everything else that is not a whole image of a sane size is a ValueError that names the file.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from movae_fast.data.fetch import first_line
from movae_fast.data.files import File

Box = tuple[int, int, int, int]  # top, left, height, width in pixels
MAX_PIXELS = 100_000_000  # what is larger is a mistake or an attack: 300 MB decoded

PILLOW = r"PIL\."  # its modules
ORIENTATION = 0x0112  # EXIF's tag


def decode(path: File, channels: int = 3, data: bytes | None = None) -> np.ndarray:
    """uint8 [H, W, channels] of the image at `path` (or of `data`, its bytes). Raises ValueError naming it."""
    try:
        _quieten_pillow()
        with path.open("rb") if data is None else io.BytesIO(data) as stream, Image.open(stream) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"{file.width}x{file.height}: more than {MAX_PIXELS:,} pixels")
            return _pixels(file, channels)
    except (
        Exception
    ) as error:  # Pillow's plugins raise SyntaxError, struct.error, IndexError, … on damaged files
        raise ValueError(
            f"{path} is not a readable image ({_reason(error, path)}); mend or remove it, "
            "or leave it out by --on_bad_image skip"
        ) from None


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
    if path.stat().st_size == 0:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"  # Pillow adds the address of the stream that it read
    return first_line(error)
