"""Write a run's metrics and pictures: metrics.jsonl, TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from movae_fast.files import CHUNK, naming, replacing, set_aside, sync
from movae_fast.training.config import MlflowConfig, WandbConfig
from movae_fast.training.events import Events
from movae_fast.training.log_lines import parsed, read_lines
from movae_fast.training.mlflow_log import MlflowLog
from movae_fast.training.yaml_file import yaml_text

SHOWN_BESIDE = ("test/loss", "test/mse", "train/conflict")  # metrics beside the settings, in TensorBoard

# Not a function of the training state: a resumed run repeats every other metric exactly.
TIMING_KEYS = (
    *(
        f"train/{k}"
        for k in ("images_per_s", "data_wait_share", "step_ms_p50", "step_ms_p95", "peak_memory_mib")
    ),
    "test/images_per_s",
    "time",
)


def require_extras(wandb: WandbConfig, mlflow: MlflowConfig) -> None:
    """Say at start, not in the middle of a run, that an extra is missing."""
    for name, wanted in (("wandb", wandb.use_wandb), ("mlflow", mlflow.use_mlflow)):
        if wanted:
            try:
                import_module(name)
            except ImportError:
                raise ValueError(f"--use_{name} needs the extra: pip install 'movae-fast[{name}]'") from None


class Logs:
    """Write each line of metrics, and pictures, to every log. Lines have `step` and `epoch`.

    resume_step: the step at which the run is resumed, None for a new run; what was logged after it is removed.
    saved: the result of `mark` in the checkpoint that the run is resumed from; None in old checkpoints. `note`
    says afterwards what was wrong with the log of a resumed run and how it was repaired; "" if nothing was.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        wandb: WandbConfig,
        resume_step: int | None,
        saved: Mapping[str, Any] | None = None,
        mlflow: MlflowConfig | None = None,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.note = "" if resume_step is None else take_back(self.path, resume_step, saved)
        with naming(self.path):
            self.sha, self.length = hash_of(self.path)
            self.file = self.path.open("ab", buffering=0)
        self.events = Events(folder / "tensorboard", None if resume_step is None else resume_step + 1)
        if resume_step is None:
            self.events.write_text("config", as_code(config))
            self.events.write_settings(settings_of(config), SHOWN_BESIDE)
        self.mlflow = MlflowLog(folder, config, mlflow) if mlflow is not None and mlflow.use_mlflow else None
        self.wandb = None
        if wandb.use_wandb:
            import wandb as wandb_module

            self.wandb = wandb_module.init(
                project=wandb.wandb_project,
                entity=wandb.wandb_entity,
                name=wandb.wandb_name,
                tags=wandb.wandb_tags,
                config=config,
                dir=str(folder),
                id=wandb_id(folder / "wandb_id"),
                resume="allow",
            )

    def write(self, line: dict[str, Any]) -> None:
        """Append one line, with `step`, `epoch` and metrics, to every log; it is handed to the operating system
        when this returns."""
        data = (json.dumps(line) + "\n").encode()
        try:
            with naming(self.path):
                written = self.file.write(data)
                if written != len(data):  # the disk is full: writing the rest raises the error
                    self.file.write(data[written:])
        except OSError:
            with suppress(OSError):  # remove the half-written line
                self.file.truncate(self.length)
            raise
        self.sha.update(data)
        self.length += len(data)
        step = line["step"]
        self.events.write(step, {k: v for k, v in line.items() if "/" in k})
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in line.items() if k != "step"}, step=step)
        if self.mlflow is not None:
            self.mlflow.write(step, {k: v for k, v in line.items() if "/" in k})

    def write_images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:  # uint8 [h, w, 3] each
        """Give pictures to every log that shows them, as images/<name>."""
        tagged = {f"images/{name}": picture for name, picture in pictures.items()}
        self.events.write_images(step, {tag: (png(p), *p.shape[:2]) for tag, p in tagged.items()})
        if self.wandb is not None:
            from wandb import Image as WandbImage

            self.wandb.log({tag: WandbImage(picture) for tag, picture in tagged.items()}, step=step)
        if self.mlflow is not None:
            self.mlflow.write_images(step, pictures)

    def mark(self) -> dict[str, Any]:
        """Return the length in bytes and the SHA-256 of metrics.jsonl, for a checkpoint; the file is on the
        disk then."""
        with naming(self.path):
            sync(self.file)
        return {"bytes": self.length, "sha256": self.sha.hexdigest()}

    def close(self) -> None:
        """Close every log."""
        if not self.file.closed:
            with naming(self.path):
                sync(self.file)
                self.file.close()
        self.events.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.mlflow is not None:
            self.mlflow.close()


def png(picture: np.ndarray) -> bytes:
    """Return a picture uint8 [h, w, 3] as a PNG file's content."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()


def as_code(config: Mapping[str, Any]) -> str:
    """Return a configuration as YAML in a block of Markdown."""
    return f"```yaml\n{yaml_text(config)}```"


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that were given a value, but for those that say where a run lies."""
    return {k: v for k, v in config.items() if v is not None and k not in ("exp_dir", "export", "resume")}


def wandb_id(path: Path) -> str:
    """Return the run's id at Weights & Biases: the one stored in the file `path`, or a new one, which is
    stored."""
    known = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if known:
        return known
    new = secrets.token_hex(4)
    with replacing(path) as file:
        file.write(new.encode())
    return new


def hash_of(path: Path, length: int | None = None) -> tuple[Any, int]:
    """Return the SHA-256 object over the first `length` bytes of a file (all of it if None), and how many bytes
    it covers."""
    sha, read = hashlib.sha256(), 0
    if path.exists():
        with path.open("rb") as file:
            while part := file.read(CHUNK if length is None else min(CHUNK, length - read)):
                sha.update(part)
                read += len(part)
    return sha, read


def take_back(path: Path, step: int, saved: Mapping[str, Any] | None) -> str:
    """Cut metrics.jsonl back to what it held when the checkpoint of `step` was written; the resumed run writes
    the rest again, with the same metrics.

    saved: the result of `Logs.mark` in the checkpoint. If the file no longer begins with the content that it
    describes, the lines of steps after `step` are removed, and a file with damaged lines is kept under another
    name. Returns a note on such a repair, or "".
    """
    if not path.exists():
        lost = step if saved is None else saved["bytes"]
        return f"{path.name} is gone: it goes on without its earlier lines" if lost else ""
    if saved is not None:
        sha, length = hash_of(path, saved["bytes"])
        if length == saved["bytes"] and sha.hexdigest() == saved["sha256"]:
            with naming(path):
                os.truncate(path, length)
            return ""
    read_lines(path)  # raises an error if the file is not text
    texts = path.read_bytes().split(b"\n")
    lines = [(text, parsed(text)) for text in texts]
    kept = [text + b"\n" for text, line in lines if line is not None and line["step"] <= step]
    note = f"{path.name} was changed after the checkpoint; its lines up to step {step:,} are kept"
    if damaged := sum(line is None and bool(text.strip()) for text, line in lines[:-1]):
        note = f"{path.name} has {damaged} damaged lines, which are left out; {set_aside(path)} keeps them"
    with replacing(path) as file:
        file.writelines(kept)
    return note if damaged or saved is not None else ""
