import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
# The search, and what every op asks of the CPU; no Python.
COMMON = sorted(
    path
    for path in CSRC.glob("*/*.cpp")
    if path.parent.name in ("common", "nearest_code") and path.stem != "bind"
)
SOURCES = [
    *COMMON,
    CSRC / "quantize/quantize.cpp",
    ROOT / "tests/csrc/quantize_driver.cpp",
]


JACOBIAN = [
    *COMMON,
    CSRC / "gramian/gramian.cpp",
    CSRC / "projection/project_weights.cpp",
    ROOT / "tests/csrc/jacobian_driver.cpp",
]


@pytest.mark.slow
def test_the_ops_on_a_jacobian_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    """The Gramian, the projection and the weighted sum on every path of this CPU, in exact buffers."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    driver = tmp_path / "driver"
    options = ["-std=c++17", "-O1", "-g", "-fopenmp", "-fsanitize=address,undefined"]
    options += ["-fno-sanitize-recover=all", f"-I{CSRC}"]
    subprocess.run([compiler, *options, *map(str, JACOBIAN), "-o", str(driver)], check=True)
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    run = subprocess.run([str(driver)], capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "\n0 failures" in run.stdout


@pytest.mark.slow
def test_search_and_quantize_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    """Every path of this CPU, and AMX's with its instructions written out, on odd shapes in exact buffers."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    driver = tmp_path / "driver"
    emulated = ROOT / "tests/csrc/emulated_amx.h"
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O1",
            "-g",
            "-fopenmp",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
            f"-I{CSRC}",
            f'-DMOVAE_EMULATE_AMX="{emulated}"',
            *map(str, SOURCES),
            "-o",
            str(driver),
        ],
        check=True,
    )
    # libgomp keeps its thread pool to the end: a leak only in name.
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    run = subprocess.run([str(driver)], capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert " 0 failures" in run.stdout
    if "avx512_bf16" in run.stdout:
        assert "amx" in run.stdout


def test_the_weightings_team_under_thread_sanitizer(tmp_path: Path) -> None:
    """Four threads in the place of a warp: no place is written by two, and the result is that of one thread."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    driver = tmp_path / "driver"
    options = ["-std=c++17", "-O1", "-g", "-pthread", "-ffp-contract=off", "-fsanitize=thread", f"-I{CSRC}"]
    subprocess.run(
        [compiler, *options, str(ROOT / "tests/csrc/weightings_team.cpp"), "-o", str(driver)], check=True
    )
    run = subprocess.run([str(driver)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "54 compared, 0 failures" in run.stdout
