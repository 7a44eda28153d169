"""Define and check the flags of `movae report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from movae_fast.cli import parsing
from movae_fast.training.limits import Bounds, check_values
from movae_fast.training.run_list import find_run

DESCRIPTION = "One page on one or several runs, for any browser, without a network: movae report RUN [RUN …]"


@dataclass
class ReportConfig:
    """Report.

    Args:
        runs: Runs, by folder or by the beginning of their name; may stand first without the flag. Runs of the
            same images are compared by their betas.
        out: The HTML file, which must not exist; the default is report.html in the first run's folder, numbered
            where there is one.
        images: Images in a picture.
        betas: Betas of a multi-rate run's curve, evenly spaced in their logarithm.
        limit: Compute numbers on this many evenly spaced test images; 0 means all.
        batch_size: Images at a time.
        seed: Seed of the draws.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        data_dir: Folder of the original files, if not where training had it.
    """

    runs: list[str]
    out: str | None = None
    images: int = 16
    betas: int = 12
    limit: int = 1000
    batch_size: int = 500
    seed: int = 0
    device: str = "auto"
    data_dir: str | None = None


def parse(argv: Sequence[str]) -> ReportConfig:
    """Return the flags, checked by themselves. Raises ValueError."""
    words = parsing.first_words_as("runs", argv)
    which = "which run? movae report RUN [RUN …]; movae runs lists them"
    config = parsing.read_flags(ReportConfig, "report", DESCRIPTION, words, "runs", which)
    check_values(config, images=Bounds(1, 256), betas=Bounds(2, 1000))
    config.runs = list(dict.fromkeys(str(find_run(name)) for name in config.runs))
    return config
