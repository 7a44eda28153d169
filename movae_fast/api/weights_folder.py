"""Write a trained model's weights, settings and card into a folder, or to huggingface.co."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from movae_fast.api.model_card import FIGURE, ModelParts, card_of, figure_of
from movae_fast.files import sync_folder
from movae_fast.names import ArgumentError
from movae_fast.training.weights_file import NAME, save_weights


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write into, which is renamed to `folder` at the end of the block, or removed
    if the block raises.

    Raises ArgumentError if `folder` exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArgumentError(f"outdir {folder} is not empty and is not overwritten; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # a temporary folder is readable by its owner only
        if folder.exists():
            folder.rmdir()  # empty
        temporary.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export_weights(model: ModelParts, folder: Path) -> Path:
    """Write model.safetensors, config.json and the model card README.md into a new folder, and return its path.

    For a model of sentences the folder also has vocab.txt, for a run with pictures its newest reconstructions.
    Raises ArgumentError for a folder that is not empty.
    """
    with whole_folder(folder) as inside:
        write_files(model, inside)
    return folder


def write_files(model: ModelParts, folder: Path) -> None:
    """Write the files of `export_weights` into a folder that exists."""
    config = {k: v for k, v in model.config.flat().items() if k not in ("resume", "exp_dir", "export")}
    save_weights(folder / NAME, config, model.network.state_dict())
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card_of(model), encoding="utf-8")
    if (vocabulary := model.folder / "vocab.txt").is_file():
        shutil.copyfile(vocabulary, folder / "vocab.txt")
    if (figure := figure_of(model.folder)) is not None:
        shutil.copyfile(figure, folder / FIGURE)


def upload(model: ModelParts, repository: str, private: bool, token: str | None) -> str:
    """Upload the files of `export_weights` to a repository of huggingface.co, and return its web address.

    repository: "owner/name"; it is made if it does not exist. token: an access token, None for the stored one.
    Raises ArgumentError if huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ArgumentError("push_to_hub needs the extra: pip install 'movae-fast[hub]'") from None
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write_files(model, Path(folder))
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder)
    return str(address)
