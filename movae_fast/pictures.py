"""Arrange and write pictures of a model's images: labelled sheets, grids, pairs, strips, GIFs.

Images come in as [N, C, H, W] in [0, 1]; a picture is uint8 [h, w, 3]. A file is written under a temporary name
and renamed, so a file that exists is complete.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from movae_fast.files import replacing

PAD = 2  # pixels between images
LABEL, FONT = 15, 11  # height of a line of text, and size of its font
LEAST_WIDTH = 240  # of a picture with a caption
LEAST_SIDE = 64  # small images are enlarged to about this side, by whole factors


def to_pixels(images: Tensor, scale: int | None = None) -> np.ndarray:
    """Convert images [N, C, H, W] in [0, 1] to RGB pixels, uint8 [N, h, w, 3].

    Images are enlarged by the whole factor `scale`; None enlarges small images to a side of about 64 pixels.
    """
    images = images.detach().float().cpu().clamp(0, 1)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    factor = scale or max(1, LEAST_SIDE // pixels.shape[1])
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2)


def grid(images: Tensor, columns: int | None = None, scale: int | None = None) -> np.ndarray:
    """Arrange images [N, C, H, W] in rows as one picture uint8 [h, w, 3], with `columns` images per row.

    None makes the picture nearly square. `scale` enlarges the images by a whole factor.
    """
    pixels = to_pixels(images, scale)
    n, height, width, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    picture = np.full((rows * (height + PAD) + PAD, columns * (width + PAD) + PAD, 3), 255, np.uint8)
    for i in range(n):
        top, left = PAD + i // columns * (height + PAD), PAD + i % columns * (width + PAD)
        picture[top : top + height, left : left + width] = pixels[i]
    return picture


def sheet(
    images: Tensor,  # [N, C, H, W]
    columns: int,
    caption: str = "",
    rows: Sequence[str] = (),
    heads: Sequence[str] = (),
    labels: Sequence[str] = (),
    scale: int | None = None,
) -> np.ndarray:
    """Arrange images as one picture uint8 [h, w, 3], row by row, with words around them.

    rows: a label per row, at its left; heads: one per column, above it; labels: one per image, above it. Where
    one is empty it takes no room. An image that is NaN stays white.
    """
    pixels = to_pixels(torch.where(images.isnan(), 1.0, images), scale)
    _, height, width, _ = pixels.shape
    left = max((text_width(row) for row in rows), default=-2 * PAD) + 2 * PAD
    above = LABEL if heads else 0
    step = (height + PAD + (LABEL if labels else 0), width + PAD)
    size = (left + columns * step[1] + PAD, above + math.ceil(len(pixels) / columns) * step[0] + PAD)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)

    def write(x: int, y: int, text: str) -> None:
        pen.text((x, y), text, fill="black", font=font())

    for column, head in enumerate(heads):
        write(left + PAD + column * step[1], 0, head)
    for row, text in enumerate(rows):
        write(PAD, above + row * step[0] + (step[0] - LABEL) // 2, text)
    for i, image in enumerate(pixels):
        x, y = left + PAD + i % columns * step[1], above + PAD + i // columns * step[0]
        if labels:
            write(x, y - PAD, labels[i])
        canvas.paste(Image.fromarray(image), (x, y + (LABEL if labels else 0)))
    picture = np.asarray(canvas)
    return captioned(picture, caption) if caption else picture


def captioned(picture: np.ndarray, text: str) -> np.ndarray:
    """Add text above a picture uint8 [h, w, 3], in as many lines as its width asks for.

    A picture that is narrower than LEAST_WIDTH gets white at its right.
    """
    height, width, _ = picture.shape
    width = max(width, LEAST_WIDTH)
    lines = wrapped(text, width - 2 * PAD)
    canvas = Image.new("RGB", (width, height + LABEL * len(lines) + PAD), "white")
    pen = ImageDraw.Draw(canvas)
    for k, line in enumerate(lines):
        pen.text((PAD, k * LABEL), line, fill="black", font=font())
    canvas.paste(Image.fromarray(picture), (0, LABEL * len(lines) + PAD))
    return np.asarray(canvas)


def widened(picture: np.ndarray, width: int) -> np.ndarray:
    """Add white at the right of a picture uint8 [h, w, 3] up to a width."""
    return np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255)


def wrapped(text: str, width: int) -> list[str]:
    """Return the words of `text` as lines that are at most `width` pixels wide, where no word is wider; an end
    of line in it stays one."""
    lines = []
    for part in text.split("\n"):
        line = ""
        for word in part.split():
            longer = f"{line} {word}".strip()
            if line and text_width(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def text_width(text: str) -> int:
    """Return how many pixels wide a line of text is."""
    return math.ceil(font().getlength(text))


@cache
def font() -> Any:
    """Return Pillow's own font in the size of labels."""
    return ImageFont.load_default(FONT)


def png_bytes(picture: np.ndarray) -> bytes:
    """Return a picture uint8 [h, w, 3] as a PNG file's content."""
    return bytes(iio.imwrite("<bytes>", picture, extension=".png"))


def write_png(path: Path, picture: np.ndarray) -> Path:
    """Write a picture uint8 [h, w, 3] as PNG."""
    return _write(path, png_bytes(picture))


def write_gif(path: Path, frames: Sequence[np.ndarray], seconds: float = 0.1) -> Path:
    """Write pictures uint8 [h, w, 3] as a GIF that loops for ever and shows each for `seconds`; return
    `path`."""
    data = iio.imwrite("<bytes>", np.stack(frames), extension=".gif", duration=int(seconds * 1000), loop=0)
    return _write(path, data)


def _write(path: Path, data: Any) -> Path:
    with replacing(path) as file:
        file.write(data)
    return path


def pairs(originals: Tensor, reconstructions: Tensor, columns: int = 8, caption: str = "") -> np.ndarray:
    """Return a picture uint8 [h, w, 3]: originals in rows of `columns`, each above the row of their
    reconstructions."""
    columns = min(columns, len(originals))
    rows = []
    for at in range(0, len(originals), columns):
        for images in (originals, reconstructions):
            part = images[at : at + columns]
            lack = columns - len(part)  # the last row is filled with white
            rows += [part, part.new_full((lack, *part.shape[1:]), math.nan)]
    labels = ["original", "reconstruction"] * math.ceil(len(originals) / columns)
    return sheet(torch.cat(rows), columns, caption, labels)


def back_and_forth(frames: list[Any]) -> list[Any]:
    """Return the frames followed by the same frames in reverse, without repeating the ends, for an animation
    that loops without a jump."""
    return frames + frames[-2:0:-1]
