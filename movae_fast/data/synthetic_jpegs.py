"""Write JPEGs of synthetic scenes at CelebA's size, for benchmarks and tests that download nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from movae_fast.data.prefetch import in_threads
from movae_fast.files import replacing

WIDTH, HEIGHT = 178, 218
PER_FOLDER = 10_000


def scene(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Return the RGB picture determined by `seed`: a shaded background with ellipses, boxes and photographic
    grain."""
    rng = np.random.default_rng(seed)
    corners = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    image = corners.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(4, 9)):
        x, y = rng.integers(0, width), rng.integers(0, height)
        w, h = rng.integers(10, width // 2, 2)
        shape = draw.ellipse if rng.random() < 0.7 else draw.rectangle
        corner, opposite = (int(x - w // 2), int(y - h // 2)), (int(x + w // 2), int(y + h // 2))
        shape((*corner, *opposite), tuple(rng.integers(0, 256, 3)))
    grain = rng.normal(0, 6, (height, width, 1))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def synthetic_jpeg(
    folder: Path,
    n: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> None:
    """Write the scenes 0 to n - 1 below `folder` as 00/000000.jpg, 00/000001.jpg, …; existing files are
    kept."""
    paths = [folder / f"{i // PER_FOLDER:02d}" / f"{i:06d}.jpg" for i in range(n)]
    for parent in {p.parent for p in paths}:
        parent.mkdir(parents=True, exist_ok=True)

    def write(i: int) -> None:
        if not paths[i].exists():
            with replacing(paths[i]) as file:
                scene(i, width, height).save(file, "JPEG", quality=90)

    for done, _ in enumerate(in_threads(write, range(n)), 1):
        progress(done, n)
