"""The C++ compiles for 64-bit ARM, which the CPUs beside NVIDIA's newest GPUs are (GH200, GB200, DGX Spark)."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
COMPILER = "aarch64-linux-gnu-g++"


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").rglob("*.cpp")), ids=lambda p: p.stem)
def test_compiles_for_aarch64(source: Path) -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}: apt-get install g++-aarch64-linux-gnu")
    # pybind11 is at hand during a build only; torch brings the same headers.
    headers = [Path(torch.__file__).parent / "include", Path(sysconfig.get_paths()["include"]), ROOT / "csrc"]
    options = ["-std=c++17", "-fopenmp", "-Wall", "-fsyntax-only", *(f"-I{folder}" for folder in headers)]
    said = subprocess.run([COMPILER, *options, str(source)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[-3000:]
