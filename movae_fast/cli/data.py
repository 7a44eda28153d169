"""Run `movae data list|verify|prepare|synthetic_jpeg`: show datasets, check their files, decode them once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from movae_fast.cli.flags.data import DataCommand
from movae_fast.data import DATASETS, DatasetInfo, ImageFiles, ReadOptions
from movae_fast.data.datasets.facts import CELEBA_CROPS
from movae_fast.data.decode import MAX_PIXELS
from movae_fast.data.loaders import dali
from movae_fast.data.prepare import prepare
from movae_fast.data.prepared_format import OLD_FORMAT, damage, prepared_files, read_header
from movae_fast.data.synthetic_jpegs import synthetic_jpeg
from movae_fast.data.text import TEXTS, TextInfo, TextOptions, read_text
from movae_fast.data.unreadable import unreadable
from movae_fast.names import pick, shown

MAX_SIZE = math.isqrt(MAX_PIXELS)


def run(flags: tuple[str, str | None, DataCommand]) -> int:
    """Run one of `list`, `verify`, `prepare` and `synthetic_jpeg`, and return the exit status."""
    command, target, config = flags
    return COMMANDS[command](target, config, Console())


def chosen(target: str, config: DataCommand) -> tuple[DatasetInfo, Callable[[str], ReadOptions]]:
    """Return the dataset that `target` names, and a function from a split's name to the options to read it
    with.

    An existing folder that is not a dataset's name is read as the dataset `folder`. Raises ValueError for an
    unknown name or a flag out of range.
    """
    for flag, given in (("NAME or FOLDER", target), ("--data_dir", config.data_dir)):
        if not given.strip():
            raise ValueError(f"{flag} is empty")
    root = Path(config.data_dir).expanduser()
    if os.path.exists(Path(target).expanduser()) and target not in DATASETS:
        info, root = DATASETS["folder"], Path(target).expanduser()
    else:
        info = DATASETS[pick("dataset", target, DATASETS)]
    size = info.default_size if config.image_size is None else config.image_size
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"--image_size {size} must be from 1 to {MAX_SIZE:,}")
    assert config.crop in CELEBA_CROPS

    def options(split: str) -> ReadOptions:
        cpu = torch.device("cpu")
        return ReadOptions(root, split, size, config.download, cpu, config.crop, config.resize)

    return info, options


def list_sets(_: str | None, config: DataCommand, console: Console) -> int:
    table = Table(title=escape(shown(f"datasets; --data_dir {config.data_dir}")))
    for column in ("name", "images", "training", "test", "factors", "there"):
        table.add_column(column, justify="right" if column in ("training", "test") else "left")
    for info in DATASETS.values():
        factors = [
            f"{name} {size}" if size else name
            for name, size in zip(
                info.factor_names, info.factor_sizes or [0] * len(info.factor_names), strict=True
            )
        ]
        table.add_row(
            info.name,
            "any" if info.name == "folder" else f"{info.channels}x{info.native_size}x{info.native_size}",
            f"{info.n_train:,}" if info.n_train else "",
            f"{info.n_test:,}" if info.n_test else "",
            ", ".join(factors),
            escape(shown(there(info, config))),
        )
    for text in TEXTS.values():
        table.add_row(text.name, "text", "", "", "", escape(shown(text_there(text, config))))
    console.print(table)
    return 0


def text_there(text: TextInfo, config: DataCommand) -> str:
    """Return "built in" for a corpus without files, "files" if its training split is in data_dir, and ""
    otherwise."""
    if not text.files:
        return "built in"
    root = Path(config.data_dir).expanduser()
    named = [root / folder / f"{text.name}.train.txt" for folder in (text.name, f"{text.name}_data", ".")]
    plain = root / ("." if text.name == "text" else text.name) / "train.txt"
    return "files" if any(path.is_file() for path in (*named, plain)) else ""


def verify_text(name: str, config: DataCommand, console: Console) -> int:
    """Read every line of a corpus; print each split's size and unknown words, and the corpus's digest. Return
    the exit status 0."""
    corpus = read_text(name, TextOptions(Path(config.data_dir).expanduser(), config.label_column))
    for split in ("train", "valid", "test"):
        say(console, f"{name} {split}: {corpus.split(split).summary}")
    say(console, f"{name}: SHA-256 {corpus.digest}")
    return 0


def there(info: DatasetInfo, config: DataCommand) -> str:
    """Return what of a dataset is in data_dir, for the list: "files" for the originals, and each prepared
    split."""
    if info.files.startswith("nothing"):
        return "built in"
    root = Path(config.data_dir).expanduser()
    prepared = sorted(
        p.stem.removeprefix(f"{info.name}-") for p in (root / "prepared").glob(f"{info.name}-*.u8")
    )
    if info.name == "folder":
        return ", ".join(prepared)
    words = (w.strip(",{}()") for w in info.files.replace("{", "").split())
    exists = any((root / w.split("*")[0].split("CLASS")[0]).exists() for w in words if "/" in w or "." in w)
    parts = (["files"] if exists else []) + [f"prepared {p}" for p in prepared]
    return ", ".join(parts)


def verify(target: str | None, config: DataCommand, console: Console) -> int:
    """Check a dataset's files and print a line per split; return the exit status, 1 if any file is damaged.

    All originals are read, every image file is decoded, and every prepared file is compared with its checksums.
    """
    if str(target) in TEXTS:
        return verify_text(str(target), config, console)
    info, options = chosen(str(target), config)
    status = 0
    for split in splits(config):
        files = prepared_files(info.name, options(split))
        lines = []
        try:
            source: Any = info.read(options(split))
        except FileNotFoundError:
            if not files:
                raise
            lines.append(f"{info.name} {split}: the original files are not there")
        else:
            line, whole = verify_originals(info, split, source, console)
            lines.append(line)
            status = status or int(not whole)
        for path in files:
            line, whole = verify_prepared(path)
            lines.append(line)
            status = status or int(not whole)
        say(console, "; ".join(lines))
    return status


def verify_originals(info: DatasetInfo, split: str, source: Any, console: Console) -> tuple[str, bool]:
    """Return a message about a split's original files, and whether they are complete and undamaged."""
    line, whole = f"{info.name} {split}: {len(source):,} images", True
    expected = info.n_train if split == "train" else info.n_test
    if expected and len(source) != expected:
        line += f", the published set has {expected:,}"
        whole = False
    if isinstance(source, ImageFiles):
        bad = unreadable(source)
        line += f", {len(bad)} unreadable"
        for row, why in bad.items():
            say(console, f"{source.files[row]}: {why}")
        whole = whole and not bad
    elif hasattr(source, "gather"):
        source.gather(torch.tensor([0, len(source) - 1]))  # reads a set that is loaded at its first use
    note = getattr(source, "note", "")
    return line + (f", {note}" if note else ""), whole


def verify_prepared(path: Path) -> tuple[str, bool]:
    """Return a message about a prepared file, and whether it is complete and undamaged."""
    try:
        header = read_header(path)
    except ValueError as error:
        return str(error), False
    if header is None:
        return f"{path.name} has no header: prepare again", False
    if problem := damage(path, header):
        return f"{path.name} is damaged: {problem}; prepare again", False
    old = ", but none of its labels: prepare again" if header["format"] == OLD_FORMAT else ""
    return f"{path.name} has its checksums{old}", True


def prepare_splits(target: str | None, config: DataCommand, console: Console) -> int:
    if str(target) in TEXTS:
        raise ValueError(f"data prepare {target}: text is read as it is; there is nothing to prepare")
    info, options = chosen(str(target), config)
    if config.decoder == "dali":
        dali.require()
    decoder = "dali" if config.decoder != "pillow" and dali.available() and config.resize != "pad" else "pillow"
    for split in splits(config):
        with bar(console, f"{info.name} {split}") as progress:
            path, how = prepare(
                info, options(split), config.on_bad_image, decoder, progress, partial(say, console)
            )
        header = read_header(path)
        assert header is not None
        n, size = header["shape"][0], path.stat().st_size / 1e6
        say(console, f"{path}: {how}, {n:,} images, {size:,.1f} MB")
        for name in header["skipped"]:
            say(console, f"left out: {name}")
    return 0


def say(console: Console, line: str) -> None:
    """Print a line without interpreting any markup in it, as file names may contain brackets."""
    console.print(shown(line), highlight=False, markup=False, soft_wrap=True)


def write_scenes(target: str | None, config: DataCommand, console: Console) -> int:
    if config.n < 1:
        raise ValueError(f"--n {config.n} must be at least 1")
    with bar(console, "scenes") as progress:
        synthetic_jpeg(Path(str(target)).expanduser(), config.n, progress)
    say(console, f"{target}: {config.n:,} JPEGs of 178x218")
    return 0


def splits(config: DataCommand) -> tuple[str, ...]:
    return ("train", "test") if config.split == "both" else (config.split,)


@contextmanager
def bar(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar if the output is a terminal; yield the function to call with (done, total)."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title)
        yield lambda done, total: progress.update(task, completed=done, total=total)


COMMANDS: dict[str, Callable[[str | None, DataCommand, Console], int]] = {
    "list": list_sets,
    "verify": verify,
    "prepare": prepare_splits,
    "synthetic_jpeg": write_scenes,
}
