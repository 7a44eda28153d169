"""The notebooks of examples/notebooks/ run from top to bottom; their own assertions say what they show."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples" / "notebooks").glob("*.ipynb"))


def test_there_are_three_without_outputs() -> None:
    nbformat = pytest.importorskip("nbformat")
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, 4)
        assert all(not cell.get("outputs") for cell in notebook.cells), path.name


def test_the_program_s_own_plots_go_where_they_went() -> None:
    """Training draws, and a notebook's plots still appear below its cells."""
    from matplotlib import pyplot as plt

    from movae_fast import plots

    before = plt.get_backend()
    try:
        plt.switch_backend("svg")
        assert plots.pyplot().get_backend() == "svg"
    finally:
        plt.switch_backend(before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    root = str(Path(__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", root + os.pathsep + os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, 4)
    nbclient.NotebookClient(notebook, timeout=540, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" for output in outputs)
    data = [output.data for output in outputs if output.output_type == "display_data"]
    if "movae_fast.train(" in path.read_text():
        # The bar, or without ipywidgets a line per epoch, and the run's pictures inline.
        assert any("data:image/png;base64" in d.get("text/html", "") for d in data)
        assert (tmp_path / "runs").is_dir()
    if "plt." in path.read_text():
        assert any("image/png" in d for d in data)
