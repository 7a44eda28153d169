"""The sdist and the wheel: what they carry, and that the wheel works in an environment of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import movae_fast

ROOT = Path(__file__).parent.parent


def test_the_version_is_in_one_place_and_has_notes() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", movae_fast.__version__)
    assert 'attr = "movae_fast.__version__"' in (ROOT / "pyproject.toml").read_text()
    assert f"\n## {movae_fast.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    """Return what a command prints, which has to succeed."""
    done = subprocess.run(
        [str(w) for w in words],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist as `python -m build` does; or the one that MOVAE_WHEEL names."""
    if given := os.environ.get("MOVAE_WHEEL"):
        return Path(given)
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("build")
    names = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in names:
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--outdir", folder / "dist"]
    run(*command, cwd=folder / "source", MOVAE_NO_CUDA="1")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    assert sdist.name == f"movae_fast-{movae_fast.__version__}.tar.gz"
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_carries_what_a_run_needs(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert f"movae_fast/_csrc{suffix}" in names
    packed = {name for name in names if name.startswith("movae_fast/")}
    files = run("git", "ls-files", "movae_fast", "kernels", cwd=ROOT).splitlines()
    wanted = {f"movae_fast/{f}" if f.startswith("kernels/") else f for f in files} - {"movae_fast/kernels"}
    assert wanted - packed == set()
    assert not any(name.startswith(("tests", "benchmarks", "examples")) for name in names)


@pytest.mark.slow
def test_the_wheel_trains_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """Without a compiler. Torch and the other dependencies are this environment's, not the wheel's."""
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    # Read after the environment's own packages, so the installed wheel is the one that is imported.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    bare = {"PATH": str(tmp_path / "env" / "bin"), "HOME": str(tmp_path), "CC": "/nowhere", "CXX": "/nowhere"}
    where = run(python, "-c", "import movae_fast; print(movae_fast.__file__)", cwd=tmp_path, **bare)
    assert str(site) in where
    said = run(tmp_path / "env" / "bin" / "movae", "doctor", cwd=tmp_path, **bare)
    assert f"movae-fast {movae_fast.__version__}" in said
    assert "C++" in said
    flags = "--dataset sprites --image_size 16 --arch vq_vae --hidden_dims 8 8 --agg upgrad --steps 3"
    limits = "--batch_size 8 --limit_train 24 --limit_test 8 --device cpu --exp_dir run"
    words = ["train", *flags.split(), *limits.split()]
    run(tmp_path / "env" / "bin" / "movae", *words, cwd=tmp_path, **bare)
    assert (tmp_path / "run" / "checkpoints" / "last.pt").is_file()
    fallback = "from movae_fast.ops import extension; assert extension.csrc is not None"
    run(python, "-c", fallback, cwd=tmp_path, **bare)
