"""Write the model card (README.md) of a trained model: a summary, how to use it, its scores and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import yaml

from movae_fast.models import VAE
from movae_fast.training.config import TrainConfig
from movae_fast.training.log_lines import read_lines

FIGURE = "reconstructions.png"  # the picture that lies beside the card
MARK = "<!-- movae-fast -->"  # marks a card as written here


class ModelParts(Protocol):
    """Define the attributes that a card is written from: a network, its configuration, and the folder it came
    from."""

    @property
    def network(self) -> VAE: ...

    @property
    def config(self) -> TrainConfig: ...

    @property
    def folder(self) -> Path: ...


def figure_of(folder: Path) -> Path | None:
    """Return the path of the newest picture of reconstructions in a run's folder; None if there is none."""
    own = folder / FIGURE
    if own.is_file():  # of an exported model that is exported again
        return own
    pictures = sorted((folder / "figures").glob("reconstructions_*.png"), key=lambda p: p.stat().st_mtime_ns)
    return pictures[-1] if pictures else None


def card_of(model: ModelParts) -> str:
    """Return the model card as Markdown, with the YAML front matter that huggingface.co reads."""
    config = model.config
    front = {
        "library_name": "movae-fast",
        "tags": ["vae", "multi-objective", config.model.arch],
        "datasets": [config.data.dataset],
    }
    head = yaml.safe_dump(front, sort_keys=False)
    picture = ["", f"![Originals above their reconstructions]({FIGURE})"] if figure_of(model.folder) else []
    return "\n".join(
        [
            f"---\n{head}---",
            MARK,
            f"# {config.model.arch} on {config.data.dataset}",
            "",
            *summary(model),
            *picture,
            "",
            "## Use",
            "",
            *usage(model),
            "",
            *scores(model),
            "## Settings",
            "",
            "```yaml",
            yaml.safe_dump(given_settings(model), sort_keys=False).rstrip(),
            "```",
            "",
        ]
    )


def summary(model: ModelParts) -> list[str]:
    """Return the lines of a paragraph on the model: its size, data and objectives, and their aggregator."""
    config, size = model.config, sum(p.numel() for p in model.network.parameters())
    objectives = ", ".join(model.network.objectives)
    how = "added up" if config.objective.agg == "sum" else f"aggregated by {config.objective.agg}"
    what = "sentences" if config.is_text else "images of " + "x".join(map(str, config.image_shape))
    return [
        f"A variational autoencoder of {what} with {size:,} parameters, trained by movae-fast. Its objectives "
        f"({objectives}) were {how}.",
    ]


def usage(model: ModelParts) -> list[str]:
    """Return the lines of a Python example that loads the model and samples from it."""
    what = "sentences" if model.config.is_text else "images [16, C, S, S] in [0, 1]"
    return [
        "```python",
        "import movae_fast",
        "",
        'model = movae_fast.load("path/to/this/folder")',
        f"samples = model.sample(16, seed=0)  # {what}",
        "latents = model.encode(samples)",
        "```",
    ]


def scores(model: ModelParts) -> list[str]:
    """Return the lines of a section with the last metrics on the test split; [] if the folder has no log of
    them."""
    lines = [line for line in read_lines(model.folder / "metrics.jsonl") if "test/loss" in line]
    if not lines:
        return []
    last = lines[-1]
    rows = [
        f"| {name.removeprefix('test/').replace('_', ' ')} | {value:.5g} |"
        for name, value in last.items()
        if name.startswith("test/") and isinstance(value, int | float)
    ]
    used = model.config.data.limit_test
    images = f"{used:,} evenly spaced images of the test split" if used else "the whole test split"
    return [
        "## Scores",
        "",
        f"Measured by training's own evaluation at step {last['step']:,}, on {images} of "
        f"{model.config.data.dataset}, seed {model.config.run.seed}. Objectives are unweighted; loss is their "
        "weighted sum.",
        "",
        "| test split | value |",
        "|---|---|",
        *rows,
        "",
    ]


def given_settings(model: ModelParts) -> dict[str, Any]:
    """Return the settings, by name, whose values are not the defaults; paths and the device are left out."""
    flat, defaults = model.config.flat(), type(model.config)().flat()
    left_out = ("resume", "exp_dir", "export", "data_dir", "save_path", "device")
    return {k: v for k, v in flat.items() if v != defaults[k] and k not in left_out}
