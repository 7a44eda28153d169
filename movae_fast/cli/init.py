"""Run `movae init`: write every setting of a run, with what it does, to a file that `--config` reads."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from movae_fast.cli.flag_texts import flag_texts
from movae_fast.cli.flags.init import InitConfig
from movae_fast.files import replacing
from movae_fast.names import shown
from movae_fast.training.config import SECTIONS, TrainConfig

# Of one run: given on the command line. And what training fills in itself.
LEFT_OUT = ("resume", "exp_dir", "export", "vocabulary_size", "longest", "corpus_digest")


def run(flags: tuple[InitConfig, dict[str, Any]]) -> int:
    """Write a YAML file of settings for `movae train`, print how to use it, and return the exit status."""
    config, recipe = flags
    with replacing(Path(config.file)) as file:
        file.write(commented(recipe).encode())
    print(f"{shown(config.file)}: edit it, then movae train --config {shown(config.file)}")
    return 0


def commented(recipe: dict[str, Any]) -> str:
    """Return all settings as YAML, each below its text; one without a value is commented out."""
    values = TrainConfig().flat() | recipe
    lines = ["# Settings of movae train. A line that is deleted has its default again."]
    for section in SECTIONS.values():
        title = (inspect.getdoc(section) or "").splitlines()[0]
        lines += ["", f"# --- {title.rstrip('.')} ---"]
        texts = flag_texts([section])
        for name in (f.name for f in fields(section) if f.name not in LEFT_OUT):
            lines += ["", *(f"# {line}" for line in textwrap.wrap(texts[name], 100))]
            value = yaml.safe_dump(values[name], default_flow_style=True, sort_keys=False, width=1000)
            line = f"{name}: {value.splitlines()[0]}"
            lines.append(f"# {line}" if values[name] is None else line)
    return "\n".join(lines) + "\n"
