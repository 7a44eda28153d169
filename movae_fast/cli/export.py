"""Run `movae export`: write a trained model for other programs."""

from __future__ import annotations

from pathlib import Path

from movae_fast.api.exporting import export_programs
from movae_fast.api.loading import load
from movae_fast.api.weights_folder import export_weights
from movae_fast.cli.flags.export import ExportConfig
from movae_fast.files import free_path
from movae_fast.names import shown
from movae_fast.training.run_folder import folder_of


def run(config: ExportConfig) -> int:
    """Load the trained model, export it, print which files were written, and return the exit status."""
    weights = Path(config.weights)
    model = load(weights, config.device)
    folder = Path(config.outdir) if config.outdir else free_path(folder_of(weights) / f"export_{config.format}")
    if config.format == "safetensors":
        print(shown(export_weights(model, folder)))
        return 0
    for written in export_programs(model, folder, config.format):
        by = f"not compared with the model: needs {written.by}"
        if written.difference is not None:
            by = f"equals the model to {written.difference:.1g} ({written.by})"
        print(f"{shown(written.path)}: {by}")
    return 0
