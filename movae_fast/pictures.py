"""Arrange and write pictures of a model's images: grids, pairs, strips, GIFs.

Images come in as [N, C, H, W] in [0, 1]; a picture is uint8 [h, w, 3]. A file is written under a temporary name
and renamed, so a file that exists is complete.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from movae_fast.files import replacing

PAD = 2  # pixels between images
LABEL = 13  # height of a label
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


def labelled_grid(images: Tensor, labels: Sequence[str], columns: int) -> np.ndarray:
    """Arrange images [N, C, H, W] in rows as one picture uint8 [h, w, 3], each with its label above it."""
    pixels = to_pixels(images)
    _, height, width, _ = pixels.shape
    rows = math.ceil(len(pixels) / columns)
    step = (height + LABEL + PAD, width + PAD)
    canvas = Image.new("RGB", (columns * step[1] + PAD, rows * step[0] + PAD), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        top, left = PAD + i // columns * step[0], PAD + i % columns * step[1]
        pen.text((left, top), label, fill="black")
        canvas.paste(Image.fromarray(image), (left, top + LABEL))
    return np.asarray(canvas)


def captioned(picture: np.ndarray, text: str) -> np.ndarray:
    """Return a picture uint8 [h, w, 3] with a line of text added above it."""
    height, width, _ = picture.shape
    canvas = Image.new("RGB", (width, height + LABEL), "white")
    ImageDraw.Draw(canvas).text((PAD, 1), text, fill="black")
    canvas.paste(Image.fromarray(picture), (0, LABEL))
    return np.asarray(canvas)


def write_png(path: Path, picture: np.ndarray) -> Path:
    """Write a picture uint8 [h, w, 3] as a PNG; return `path`."""
    return _write(path, iio.imwrite("<bytes>", picture, extension=".png"))


def write_gif(path: Path, frames: Sequence[np.ndarray], seconds: float = 0.1) -> Path:
    """Write pictures uint8 [h, w, 3] as a GIF that loops for ever and shows each for `seconds`; return
    `path`."""
    data = iio.imwrite("<bytes>", np.stack(frames), extension=".gif", duration=int(seconds * 1000), loop=0)
    return _write(path, data)


def _write(path: Path, data: Any) -> Path:
    with replacing(path) as file:
        file.write(data)
    return path


def pairs(originals: Tensor, reconstructions: Tensor, columns: int = 8) -> np.ndarray:
    """Return a picture uint8 [h, w, 3] that compares images [N, C, H, W] with their reconstructions: a row of
    originals, below it the row of their reconstructions, and so on."""
    rows = []
    for at in range(0, len(originals), columns):
        rows += [originals[at : at + columns], reconstructions[at : at + columns]]
        for k in (-2, -1):  # fill the last row with white
            lack = min(columns, len(originals)) - len(rows[k])
            rows[k] = torch.cat([rows[k], torch.ones_like(rows[k][:1]).expand(lack, -1, -1, -1)])
    return grid(torch.cat(rows), min(columns, len(originals)))


def back_and_forth(frames: list[Any]) -> list[Any]:
    """Return the frames followed by the same frames in reverse, without repeating the ends, for an animation
    that loops without a jump."""
    return frames + frames[-2:0:-1]
