"""Where a run's metrics go: metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import secrets
import warnings
from pathlib import Path
from typing import Any

from movae_fast.files import replacing, sync
from movae_fast.training.config import WandbConfig

# Not a function of the training state: a resumed run repeats every other figure exactly.
TIMING_KEYS = (
    *(
        f"train/{k}"
        for k in ("images_per_s", "data_wait_share", "step_ms_p50", "step_ms_p95", "peak_memory_mib")
    ),
    "test/images_per_s",
    "time",
)


def require_wandb(config: WandbConfig) -> None:
    """Say at start, not in the middle of a run, that the extra is missing."""
    if config.use_wandb:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ValueError("--use_wandb needs the extra: pip install 'movae-fast[wandb]'") from None


class Logs:
    """Writes one line of metrics to every log. Lines carry `step` and `epoch`."""

    def __init__(
        self, folder: Path, config: dict[str, Any], wandb: WandbConfig, resume_step: int | None
    ) -> None:
        self.path = folder / "metrics.jsonl"
        if resume_step is not None:
            drop_lines_after(self.path, resume_step)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch.utils.tensorboard import SummaryWriter
        purge = None if resume_step is None else resume_step + 1
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        self.wandb = None
        if wandb.use_wandb:
            import wandb as wandb_module

            id_file = folder / "wandb_id"
            run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
            id_file.write_text(run_id)
            self.wandb = wandb_module.init(
                project=wandb.wandb_project,
                entity=wandb.wandb_entity,
                name=wandb.wandb_name,
                tags=wandb.wandb_tags,
                config=config,
                dir=str(folder),
                id=run_id,
                resume="allow",
            )

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; it is on its way to the disk when this returns."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        step = line["step"]
        for key, value in line.items():
            if "/" in key:
                self.board.add_scalar(key, value, step)
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in line.items() if k != "step"}, step=step)

    def close(self) -> None:
        """Flush and close every log."""
        sync(self.file)
        self.file.close()
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a crash cut short is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def drop_lines_after(path: Path, step: int) -> None:
    """Take back the lines of steps after `step`: the resumed run writes them again, with the same figures."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    with replacing(path) as file:
        file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
