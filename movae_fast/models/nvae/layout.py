"""Define the numbers of scales, groups, cells and channels of a hierarchy, and which image sizes suit them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from movae_fast.choices import KLRows

PADDED = 4  # pixels that images may lack of a side that fits: 28 are padded to 32
MOST_ROWS = 64  # KLs that may be objectives of their own


@dataclass(frozen=True)
class Layout:
    """Hold the sizes of an nvae network. Channels double, and sides halve, at each outer block and after each
    scale."""

    num_scales: int  # resolutions that have latents
    groups_per_scale: int  # of the largest resolution
    ada_groups: bool  # whether each smaller resolution has half the groups of the next larger one
    latents_per_group: int  # channels of a group's latent map
    channels: int  # of the stem
    outer_blocks: int  # halvings before the largest resolution that has latents
    outer_cells: int  # cells per outer block, the one that halves or doubles the side among them
    cells_per_group: int
    num_flows: int  # pairs of flows per group
    norm_penalty: float  # lambda, what the norms of weights are multiplied by in training

    @property
    def groups(self) -> tuple[int, ...]:
        """Return the number of groups of each scale, the smallest resolution first."""
        counts = [self.groups_per_scale]
        for _ in range(self.num_scales - 1):
            counts.append(max(counts[-1] // 2, 1) if self.ada_groups else counts[-1])
        return tuple(reversed(counts))

    @property
    def stride(self) -> int:
        """Return the number of pixels of the image's side that correspond to one pixel of the smallest latent
        map."""
        return 2 ** (self.outer_blocks + self.num_scales - 1)

    def width(self, scale: int) -> int:
        """Return the number of channels at a scale, where scale 0 is the smallest resolution."""
        return self.channels * 2 ** (self.outer_blocks + self.num_scales - 1 - scale)

    def padded(self, side: int) -> int:
        """Return the side to which images are padded with black; their own side if the strides divide it."""
        return side if side % self.stride == 0 else side + PADDED

    def side(self, image: int, scale: int) -> int:
        """Return the side of the latent maps of a scale for images of side `image`; scale 0 is the smallest
        resolution."""
        return (self.padded(image) // self.stride) << scale

    def kl_names(self, rows: KLRows) -> tuple[str, ...]:
        """Return the names of the KL objectives: one per scale, per group, or one in total."""
        count = {"scale": self.num_scales, "group": sum(self.groups), "total": 0}[rows]
        return tuple(f"kl_{i + 1}" for i in range(count)) or ("kl",)

    def kl_spans(self, rows: KLRows) -> tuple[tuple[int, int], ...]:
        """Return, for each KL objective, the number of its first group and of the group after its last, in the
        decoder's order."""
        total = sum(self.groups)
        ends = {"scale": self.groups, "group": (1,) * total, "total": (total,)}[rows]
        stops = [sum(ends[: i + 1]) for i in range(len(ends))]
        return tuple(zip([0, *stops[:-1]], stops, strict=True))


PRESETS: dict[str, Layout] = {
    "mnist": Layout(2, 10, True, 20, 32, 2, 3, 2, 0, 1e-2),
    "omniglot": Layout(2, 10, True, 20, 16, 2, 3, 2, 0, 1e-2),
    "celeba64": Layout(3, 20, True, 20, 64, 1, 2, 2, 1, 1e-1),
    "cifar10": Layout(1, 30, False, 20, 128, 1, 2, 2, 1, 1e-2),
    "tiny": Layout(2, 4, True, 4, 8, 2, 1, 1, 0, 1e-2),
}


def layout_of(options: Mapping[str, Any]) -> Layout:
    """Return the sizes of the preset that the options name (default mnist), with other options that are not
    None replacing its values. Raises ValueError for an unknown preset."""
    preset = options.get("preset") or "mnist"
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset} is unknown to nvae; valid: {', '.join(PRESETS)}")
    base = PRESETS[preset]
    names = [f.name for f in fields(Layout)]
    given = {name: options[name] for name in names if options.get(name) is not None}
    return replace(base, **given)


def check_layout(layout: Layout, side: int, kl_rows: KLRows) -> None:
    """Raise ValueError, naming what fits, for an image side, channels, groups or flows that do not go
    together."""
    if layout.channels % 2:
        raise ValueError(
            f"--channels {layout.channels} does not fit nvae, which divides twice as many by 4: give an even "
            f"number, {max(layout.channels - 1, 2)} or {layout.channels + 1}"
        )
    stride = layout.stride
    if side % stride and (side + PADDED) % stride:
        raise ValueError(
            f"--image_size {side} does not fit nvae with {layout.outer_blocks} outer_blocks and "
            f"{layout.num_scales} num_scales, whose strides need a multiple of {stride}, or {PADDED} pixels "
            f"less: {_listed(_sides_near(side, stride))}"
        )
    count = sum(layout.groups)
    if kl_rows == "group" and count > MOST_ROWS:
        raise ValueError(
            f"--kl_rows group: {count} groups are more than the {MOST_ROWS} objectives that there may be; use "
            "--kl_rows scale"
        )
    smallest = layout.side(side, 0)
    if layout.num_flows and smallest < 2:
        raise ValueError(
            f"--num_flows {layout.num_flows}: the smallest groups are maps of {smallest}x{smallest}, where a "
            "latent has no neighbour to depend on; give fewer --num_scales or --outer_blocks, or --num_flows 0"
        )


def _sides_near(side: int, stride: int) -> list[int]:
    fitting = [s for k in range(side // stride, side // stride + 3) for s in (k * stride - PADDED, k * stride)]
    near = sorted({s for s in fitting if s > 0}, key=lambda s: (abs(s - side), s))
    return sorted(near[:3])


def _listed(numbers: Iterable[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
