"""The CUDA sources compile for Ampere, Hopper and Blackwell without a GPU and without spilling registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
SHARED = 48 * 1024  # what a block gets without asking; up to 16 rows ask for less


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("projection/upgrad", {"upgrad_kernel": 3, "project_kernel": 1}),
        ("weightings/gramian_weights", {"weigh_kernel": 1}),
    ],
)
def test_no_spills(source: str, expected: dict[str, int], capability: int, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    architecture = f"-gencode=arch=compute_{capability},code=sm_{capability}"
    options = ["-O3", "-std=c++17", "--fmad=true", "-Xptxas", "-v", "-c"]
    command = [
        nvcc,
        *options,
        architecture,
        f"-I{CSRC}",
        f"{CSRC}/{source}.cu",
        "-o",
        str(tmp_path / "kernel.o"),
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[-3000:]
    kernels = re.findall(r"Compiling entry function '(\w+)'", said.stderr)
    for stem, count in expected.items():
        assert sum(stem in name for name in kernels) == count
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", said.stderr)]
    assert len(spills) >= 2 * len(kernels)
    assert not any(spills), said.stderr
    assert all(int(used) < SHARED for used in re.findall(r"(\d+) bytes smem", said.stderr))
