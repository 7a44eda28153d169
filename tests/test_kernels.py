"""Runs the files of tests/interpreted: on a CPU under Triton's interpreter, and on CUDA where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
FILES = sorted(path.name for path in (ROOT / "tests" / "interpreted").glob("[!c]*.py"))


def run(file: str, marked: str, **environment: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        marked,
        f"tests/interpreted/{file}",
    ]
    done = subprocess.run(
        command, check=False, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_files_are_found() -> None:
    assert FILES == [
        "gramian_combine.py",
        "nearest_code.py",
        "project_weights.py",
        "quantize.py",
        "tc_terms.py",
    ]


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str) -> None:
    run(file, "not slow", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", [f for f in FILES if "mark.slow" in (ROOT / "tests/interpreted" / f).read_text()]
)
def test_interpreted_at_more_shapes(file: str) -> None:
    run(file, "slow", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("file", FILES)
def test_on_cuda(file: str) -> None:
    run(file, "slow or not slow", TRITON_INTERPRET="0")
