"""A run's folder, free names and first lines: one function for each."""

import itertools
from pathlib import Path

import pytest

from movae_fast.files import free_path, numbered
from movae_fast.names import first_line
from movae_fast.training.run_folder import folder_of


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("run", "run"),
        ("run/checkpoints/last.pt", "run"),
        ("run/../run/checkpoints/best.pt", "run/../run"),
        ("exported.pt", "."),
        ("none/exported.pt", "none"),
    ],
)
def test_the_folder_of_a_run(tmp_path, monkeypatch, path, folder):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert folder_of(Path(path)) == Path(folder)
    assert folder_of(tmp_path / path) == tmp_path / folder


@pytest.mark.parametrize("name", ["last.pt", "./last.pt"])
def test_a_checkpoint_may_be_named_from_inside_its_folder(tmp_path, monkeypatch, name):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "checkpoints")
    assert folder_of(Path(name)) == tmp_path / "run"


def test_numbered_names(tmp_path):
    names = [path.name for path in itertools.islice(numbered(tmp_path / "a.b", ".png"), 3)]
    assert names == ["a.b.png", "a.b-2.png", "a.b-3.png"]
    for name in names:
        assert free_path(tmp_path / "a.b", ".png") == tmp_path / name
        (tmp_path / name).touch()
    assert free_path(tmp_path / "a.b") == tmp_path / "a.b"


@pytest.mark.parametrize(
    ("message", "line"),
    [("one", "one"), ("one\ntwo", "one"), ("\n one \r\n two", "one"), ("", "OSError"), (" \n ", "OSError")],
)
def test_the_first_line_of_an_error(message, line):
    assert first_line(OSError(message)) == line
    assert first_line(OSError(" "), "") == ""
