"""Run `movae report`: one HTML page on one or several runs."""

from __future__ import annotations

import sys
from pathlib import Path

from movae_fast.cli.flags.report import ReportConfig
from movae_fast.files import free_path
from movae_fast.pages.gather import Options, gather
from movae_fast.pages.report import render, write_report
from movae_fast.training.device import resolve_device
from movae_fast.training.run_list import run_folder, unlike_names


def run(config: ReportConfig) -> int:
    """Write the report on the given runs as an HTML page, print its path, and return the exit status."""
    paths = [Path(name) for name in config.runs]
    folders = [run_folder(path) for path in paths]
    out = Path(config.out).expanduser() if config.out else free_path(folders[0] / "report", ".html")
    if out.exists():
        raise ValueError(f"--out {out} exists and is not overwritten; name another file")
    device = resolve_device(config.device)
    options = Options(
        config.images, config.betas, config.limit, config.batch_size, config.seed, config.data_dir
    )
    names = unlike_names(folders)
    pages = [gather(path, name, device, options) for path, name in zip(paths, names, strict=True)]
    for page in pages:
        for note in page.notes:
            print(f"movae report: {page.name}: {note}", file=sys.stderr)
    print(write_report(out, render(pages, device)))
    return 0
