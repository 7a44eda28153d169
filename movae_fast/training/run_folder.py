"""Find, create and fill a run's folder without overwriting anything; checkpoints and logs are handled in
modules of their own."""

from __future__ import annotations

import datetime
import os
from contextlib import suppress
from pathlib import Path

from movae_fast.files import numbered, remove_leftovers, replacing, set_aside
from movae_fast.models import model_options
from movae_fast.training import checkpoint
from movae_fast.training.config import TrainConfig
from movae_fast.training.yaml_file import yaml_text

OURS = (
    "config.yaml",
    "metrics.jsonl",
    "tensorboard",
    "figures",
    "wandb_id",
    "mlflow_id",
    "trace.json",
)  # in a run's folder


def folder_of(path: Path) -> Path:
    """Return the folder of the run that `path` belongs to, be it the folder or a checkpoint; for other weights,
    the folder that they lie in."""
    if path.is_dir():
        return path
    folder = path.parent
    if folder.name == "checkpoints":
        return folder.parent
    absolute = folder.absolute()  # a checkpoint is named without its folder by who is in that folder
    return absolute.parent if absolute.name == "checkpoints" else folder


def check_places(config: TrainConfig, take: bool) -> None:
    """Raise ValueError, before any data are read, if the run could not write its folder or its export; nothing
    is created.

    take: allow an exp_dir that holds files.
    """
    if config.run.exp_dir is not None and not take:
        check_empty(Path(config.run.exp_dir))
    for flag, given in (("exp_dir", config.run.exp_dir), ("export", config.run.export)):
        if given is not None:
            check_place(flag, Path(given))
    if config.run.exp_dir is None:
        check_place("save_path", Path(config.run.save_path))
    if config.run.export is not None and Path(config.run.export).exists():
        raise ValueError(f"--export {config.run.export} exists and is not overwritten; name another file")


def check_place(flag: str, path: Path, folder: bool = False) -> None:
    """Raise ValueError if `path`, given as `--flag`, cannot be created or written; folder: as a folder."""
    above = path.absolute()
    while not above.exists():
        above = above.parent
    if (folder or above != path.absolute()) and not above.is_dir():
        raise ValueError(f"--{flag} {path}: {above} is a file, not a folder; name another place")
    if not os.access(above, os.W_OK | os.X_OK if above.is_dir() else os.W_OK):
        raise ValueError(f"--{flag} {path}: {above} may not be written; name another place")


def make_folder(config: TrainConfig, take: bool = False) -> Path:
    """Create the run's new folder, exp_dir or save_path/dataset/arch/agg/time, and return it; one that holds
    anything is refused.

    take: allow an exp_dir with files but no checkpoint; files with names that a run uses are renamed first.
    """
    if config.run.exp_dir is not None:
        folder = Path(config.run.exp_dir)
        if take and folder.is_dir():
            clear_killed(folder)
            for path in [folder / name for name in OURS if (folder / name).exists()]:
                set_aside(path)
        else:
            check_empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path(config.run.save_path, config.data.dataset, config.model.arch, config.objective.agg)
    folders = numbered(base / time)
    while True:
        folder = next(folders)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise


def check_empty(folder: Path) -> None:
    """Raise ValueError for a folder that is not empty, apart from what a run killed before its first checkpoint
    leaves, which is removed."""
    clear_killed(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"--exp_dir {folder} is not empty and is not overwritten; name a new folder, or continue "
            f"the run in it: movae train --resume {folder}"
        )


def clear_killed(folder: Path) -> None:
    """Remove from a folder what a run leaves that was killed before its first checkpoint was complete."""
    for inside in (folder / "checkpoints", folder):
        remove_leftovers(inside)
    with suppress(OSError):  # it is not there, or not empty
        (folder / "checkpoints").rmdir()


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write the run's config.yaml with the value of every flag, the seed included; `movae train --config` reads
    it."""
    flat = {k: v for k, v in config.flat().items() if k not in ("resume", "exp_dir", "export")}
    options = model_options(config.model.arch)
    model_only = {k for k in vars(config.model) if k != "arch" and k not in options}
    text = yaml_text({k: v for k, v in flat.items() if k not in model_only})
    path = folder / "config.yaml"
    if not path.exists() or path.read_bytes() != text.encode():
        with replacing(path) as file:
            file.write(text.encode())


def tidy(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a run's folder."""
    for inside in (folder, folder / "checkpoints", folder / "figures"):
        remove_leftovers(inside)


def latest(folder: Path) -> tuple[Path | None, str]:
    """Return the checkpoint from which the run in `folder` is to be resumed (None if it has none), and a note
    on damage.

    That is last.pt or, if it is damaged, the latest undamaged checkpoint; last.pt is then renamed. Raises
    CheckpointError if all are damaged.
    """
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir() or not any(checkpoints.glob("*.pt")):
        return None, ""
    last = checkpoints / "last.pt"
    try:
        checkpoint.load(last)
    except checkpoint.CheckpointError as error:
        whole = checkpoint.whole(checkpoints)
        if not whole:
            raise checkpoint.CheckpointError(
                f"{str(error)[:300]}; no checkpoint in {checkpoints} is whole: name another --exp_dir, or move "
                "these files away"
            ) from None
        kept = f", now {set_aside(last).name}" if last.exists() else ""
        return whole[0][0], f"{last.name} is missing or damaged{kept}; going on from {whole[0][0].name}"
    return last, ""
