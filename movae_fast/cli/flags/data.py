"""Define and check the flags of `movae data`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from movae_fast.cli import parsing
from movae_fast.names import nearest
from movae_fast.training.limits import check_values

COMMANDS = ("list", "verify", "prepare", "synthetic_jpeg")
USAGE = """usage: movae data COMMAND [NAME] [flags]

  list                     the datasets: size, splits, factors, and which are in --data_dir
  verify NAME              read the original files and the prepared ones, and check them
  prepare NAME|FOLDER      decode once into a file of uint8 that later runs map
  synthetic_jpeg FOLDER    write --n JPEGs of rendered scenes, for benchmarks

movae data COMMAND --help lists a command's flags."""


@dataclasses.dataclass
class DataCommand:
    """Where and how.

    Args:
        data_dir: Folder that holds the original files.
        image_size: Side of the square images in pixels; the default is the dataset's own.
        resize: How images reach that side, as in `movae train`.
        crop: CelebA's crop, as in `movae train`.
        split: The split to prepare.
        on_bad_image: What an image file that cannot be read does: stop, or stay out.
        decoder: Who decodes; `auto` is DALI where it is installed.
        download: Fetch missing files, where this program can.
        n: Number of images that synthetic_jpeg writes.
        label_column: Whether the lines of a corpus are label<TAB>text; the default is the corpus's own.
    """

    data_dir: str = "data"
    image_size: int | None = None
    resize: Literal["auto", "pad", "bilinear", "bicubic"] = "auto"
    crop: Literal["center148", "center140", "stylegan", "none"] = "center148"
    split: Literal["both", "train", "test"] = "both"
    on_bad_image: Literal["error", "skip"] = "error"
    decoder: Literal["auto", "dali", "pillow"] = "auto"
    download: bool = False
    n: int = 1000
    label_column: bool | None = None


def parse(argv: Sequence[str]) -> tuple[str, str | None, DataCommand] | int:
    """Return (subcommand, its NAME or FOLDER, flags) of `movae data`, or an exit status after printing the
    usage.

    Raises ValueError for an unknown subcommand or an invalid flag.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    command, *rest = argv
    if command not in COMMANDS:
        raise ValueError(f"{command}: unknown{nearest(command, COMMANDS)}; valid: {', '.join(COMMANDS)}")
    target = rest.pop(0) if rest and not rest[0].startswith("-") else None
    config = parsing.read_flags(DataCommand, f"data {command}", USAGE.splitlines()[0], rest)
    check_values(config)
    if target is not None and not target.strip():
        raise ValueError("NAME or FOLDER is empty")
    if (target is None) != (command == "list"):
        raise ValueError(f"data {command} takes {'no name' if command == 'list' else 'a NAME or FOLDER'}")
    return command, target, config
