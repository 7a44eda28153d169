"""Print the short help of `movae train`: the flags that most runs need, by task."""

from __future__ import annotations

import textwrap

from movae_fast.aggregation.catalog import AGGREGATORS
from movae_fast.choices import TEXT_SETS
from movae_fast.cli.flag_texts import first_sentence, flag_texts
from movae_fast.data.datasets import DATASETS
from movae_fast.models import MODELS, TEXT_MODELS
from movae_fast.training.config import SECTIONS, TrainConfig
from movae_fast.training.config_files import recipe_names

WIDTH, INDENT = 100, 22
TASKS = {
    "What to train on": ("dataset", "data_dir", "image_size", "batch_size", "limit_train", "binarize"),
    "The model": ("arch", "latent_dim", "hidden_dims", "num_embeddings", "recons_dist"),
    "Its objectives": ("agg", "loss_weights", "beta", "conflict_free", "gramian_at", "multirate"),
    "How long, and how": ("epochs", "steps", "lr", "optimizer", "scheduler", "seed", "device", "precision"),
    "What is written": ("exp_dir", "save_path", "log_every", "save_freq", "use_wandb", "export"),
    "Going on": ("resume",),
}


def short_help() -> str:
    """Return the help: usage, the flags of each task with their defaults, and the names that they take."""
    texts = flag_texts(list(SECTIONS.values()))
    defaults = TrainConfig().flat()
    lines = [
        "usage: movae train [--config RECIPE] [--flag value …]",
        "",
        "Train a variational autoencoder whose loss is a vector of objectives.",
    ]
    for task, names in TASKS.items():
        lines += ["", task]
        for name in names:
            default = defaults[name]
            ends = f" ({default})" if default is not None and default is not False else ""
            lines += entry(f"--{name}", first_sentence(texts[name]) + ends)
    lines += ["", "Names"]
    for flag, known in (
        ("--arch", [*MODELS, *TEXT_MODELS]),
        ("--agg", ["sum", *AGGREGATORS]),
        ("--dataset", [*DATASETS, *TEXT_SETS]),
        ("--config", families()),
    ):
        lines += entry(flag, ", ".join(known))
    return "\n".join([*lines, "", "movae train --help-all has every flag; movae init writes them to a file."])


def families() -> list[str]:
    """Return the recipes for the help: a folder as its name and number of recipes, a recipe that lies in
    no folder as its name."""
    counts: dict[str, int] = {}
    for name in recipe_names():
        family = name.partition("/")[0]
        counts[family] = counts.get(family, 0) + 1
    alone = set(recipe_names())
    return [name if name in alone else f"{name}/… ({count} recipes)" for name, count in counts.items()]


def entry(left: str, text: str) -> list[str]:
    """Return the lines of one entry: `left`, and the text beside it."""
    folded = textwrap.wrap(text, WIDTH - INDENT) or [""]
    return [f"  {left:<{INDENT - 2}}{folded[0]}".rstrip(), *(" " * INDENT + line for line in folded[1:])]
