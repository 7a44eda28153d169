"""Exchange trained models with huggingface.co, by huggingface_hub's mixin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from movae_fast.api.loading import load
from movae_fast.api.trained_model import LoadedModel
from movae_fast.api.weights_folder import write_files
from movae_fast.names import ArgumentError

try:
    from huggingface_hub import ModelHubMixin, snapshot_download
except ImportError:
    raise ArgumentError("HubModel needs the extra: pip install 'movae-fast[hub]'") from None

FILES = ["model.safetensors", "config.json", "README.md", "vocab.txt", "reconstructions.png"]


class HubModel(ModelHubMixin):
    """Give a trained model the methods of huggingface_hub: `save_pretrained`, `from_pretrained`, `push_to_hub`.

    `HubModel.from_pretrained("owner/name")` downloads a model from huggingface.co; a local folder may be given,
    too. The attribute `model` is the loaded model, as `movae_fast.load` returns it.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.model = model

    def _save_pretrained(self, save_directory: Path) -> None:
        write_files(self.model, save_directory)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        device: str = "auto",
        **options: Any,
    ) -> HubModel:
        if options:
            raise ArgumentError(f"from_pretrained: {', '.join(options)} is no option of it; it has device")
        folder = model_id
        if not Path(model_id).is_dir():
            folder = snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=FILES,
            )
        return cls(load(folder, device))
