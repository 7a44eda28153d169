"""csrc/: a folder per op with its door to Python, no torch header, and all of it in a source distribution."""

import fnmatch
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
OPS = ["gramian", "nearest_code", "norm_swish", "projection", "quantize", "tc_terms", "weightings"]
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu"))


def included(path: Path) -> list[str]:
    return re.findall(
        r'^\s*#\s*(?:include|define MOVAE_KERNEL)\s+["<]([^">]+)[">]', path.read_text(), re.MULTILINE
    )


def test_a_folder_per_op_has_its_bindings() -> None:
    folders = sorted(path.name for path in CSRC.iterdir() if path.is_dir())
    assert folders == sorted([*OPS, "common"])
    bound = [
        name
        for op in OPS
        for name in re.findall(r"^void (bind_\w+)", (CSRC / op / "bind.cpp").read_text(), re.M)
    ]
    called = re.findall(r"^    (bind_\w+)\(m\);", (CSRC / "module.cpp").read_text(), re.M)
    assert sorted(bound) == sorted(called)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes(path: Path) -> None:
    for name in included(path):
        assert not name.startswith(("torch/", "ATen/", "c10/")), (
            "raw pointers come in: one build serves every torch"
        )
        if name.startswith(("common/", *(f"{op}/" for op in OPS))):
            assert (CSRC / name).is_file(), name
            if path.parent.name == "common":
                assert name.startswith("common/"), f"common/ includes an op's {name}"
        elif "pybind11" in name:
            assert path.name in ("bind.cpp", "bind.h", "module.cpp"), "only the bindings know of Python"


def test_only_one_place_reads_the_instruction_set() -> None:
    readers = [path.name for path in SOURCES if "getenv(" in path.read_text()]
    assert readers == ["instruction_set.cpp"]


def test_a_source_distribution_has_every_file() -> None:
    patterns = [
        word
        for line in (ROOT / "MANIFEST.in").read_text().splitlines()
        if line.startswith("recursive-include csrc")
        for word in line.split()[2:]
    ]
    for path in SOURCES:
        assert any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns), path
