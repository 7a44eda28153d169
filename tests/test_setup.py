"""setup.py with nvcc of every sort: what it builds for, and what it does without the CUDA half."""

import os
import re
import runpy
import stat
import sys
import types
from pathlib import Path

import pytest
import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.dist import Distribution

ROOT = Path(__file__).parent.parent
NVCC_12_4 = (50, 52, 60, 61, 70, 75, 80, 86, 87, 89, 90)
NVCC_13 = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)

NVCC = """#!{python}
import os, pathlib, re, sys
known, here = {known}, pathlib.Path({folder!r})
words = sys.argv[1:]
if words == ["--list-gpu-arch"]:
    print("\\n".join(f"compute_{{n}}" for n in known))
elif "--dryrun" in words:
    print(f"#$ TOP={{here}}", file=sys.stderr)
else:
    asked = [int(n) for n in re.findall(r"arch=compute_(\\d+)", " ".join(words))]
    if unknown := [n for n in asked if n not in known]:
        sys.exit(f"nvcc fatal: Unsupported gpu architecture 'compute_{{unknown[0]}}'")
    if {broken}:
        sys.exit("nvcc fatal: no host compiler")
    pathlib.Path(words[words.index("-o") + 1]).write_text("object")
    with open(here / "log", "a") as log:
        print(*words, file=log)
"""


class Helpers(types.ModuleType):
    """The part of pybind11.setup_helpers that setup.py uses; pip installs the real one for a build only."""

    build_ext = build_ext
    ParallelCompile = staticmethod(lambda name: types.SimpleNamespace(install=lambda: None))

    @staticmethod
    def Pybind11Extension(name, sources, cxx_std, **options):  # noqa: N802
        return setuptools.Extension(name, sources, **options)


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Run build_extension under a fake nvcc that knows `known`; the extensions that reached the C++ build."""
    for name in ("CUDA_HOME", "MOVAE_NO_CUDA", "MOVAE_REQUIRE_CUDA", "MOVAE_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "pybind11", types.ModuleType("pybind11"))
    monkeypatch.setitem(sys.modules, "pybind11.setup_helpers", Helpers("pybind11.setup_helpers"))
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))

    def run(known=None, broken=False, links=True, **environment):
        path = ""
        if known is not None:
            nvcc = tmp_path / "bin" / "nvcc"
            nvcc.parent.mkdir(exist_ok=True)
            (tmp_path / "lib64").mkdir(exist_ok=True)
            nvcc.write_text(
                NVCC.format(python=sys.executable, known=known, folder=str(tmp_path), broken=broken)
            )
            nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
            path = str(nvcc.parent)
        monkeypatch.setenv("PATH", path + os.pathsep + "/nowhere")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
        built = []

        def compile_and_link(self, ext):
            built.append({"objects": [*ext.extra_objects], "macros": dict(ext.define_macros)})
            built[-1]["libraries"] = [*ext.libraries]
            built[-1]["files"] = {*ext.sources, *ext.depends}
            assert ext.include_dirs == ["csrc"]
            if ext.extra_objects and not links:
                raise RuntimeError("cannot find -lcudart_static")

        monkeypatch.setattr(build_ext, "build_extension", compile_and_link)
        command = given["cmdclass"]["build_ext"](Distribution())
        command.initialize_options()
        command.build_temp = str(tmp_path / "build")
        command.build_extension(given["ext_modules"][0])
        return built

    return run


def compiled_for(folder: Path) -> list[str]:
    """The code= targets of each nvcc call, which are the same in all."""
    lines = (folder / "log").read_text().splitlines()
    assert len(lines) == len(list((ROOT / "csrc").rglob("*.cu")))
    targets = {
        tuple(w.rpartition("code=")[2] for w in line.split() if w.startswith("-gencode")) for line in lines
    }
    assert len(targets) == 1
    return list(targets.pop())


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (NVCC_12_4, "sm_75 sm_80 sm_86 sm_89 sm_90 compute_90"),
        (NVCC_13, "sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_120"),
    ],
    ids=["12.4", "13"],
)
def test_builds_for_the_architectures_that_nvcc_knows(build, tmp_path, known, expected):
    (extension,) = build(known)
    assert compiled_for(tmp_path) == expected.split()
    assert "MOVAE_WITH_CUDA" in extension["macros"]
    assert extension["macros"]["MOVAE_CUDA_ARCHITECTURES"] == ",".join(
        word[3:] for word in expected.split() if word.startswith("sm_")
    )
    assert "cudart_static" in extension["libraries"]


def test_a_file_of_any_folder_is_built_and_built_anew(build, tmp_path):
    """Sources are compiled; a header that changes has them compiled again; each CUDA source has its object."""
    (extension,) = build(NVCC_13)
    found = {
        str(path.relative_to(ROOT)) for kind in ("cpp", "h") for path in (ROOT / "csrc").rglob(f"*.{kind}")
    }
    assert extension["files"] == found
    assert len({Path(name).name for name in extension["objects"]}) == len(list((ROOT / "csrc").rglob("*.cu")))
    assert all("-Icsrc" in line.split() for line in (tmp_path / "log").read_text().splitlines())


def test_the_environment_restricts_the_architectures(build, tmp_path):
    build(NVCC_13, MOVAE_CUDA_ARCHS="9.0, 80")
    assert compiled_for(tmp_path) == ["sm_80", "sm_90", "compute_90"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "there is no nvcc"),
        ({"known": NVCC_13, "MOVAE_NO_CUDA": "1"}, "MOVAE_NO_CUDA is set"),
        ({"known": NVCC_13, "broken": True}, "returned non-zero exit status"),
        ({"known": (35, 37)}, "knows none of the architectures"),
        ({"known": NVCC_12_4, "MOVAE_CUDA_ARCHS": "120"}, r"names \[120\]"),
        ({"known": NVCC_13, "links": False}, "cannot find -lcudart_static"),
    ],
    ids=["no nvcc", "not wanted", "broken nvcc", "too old", "unknown architecture", "no runtime"],
)
def test_a_cuda_half_that_fails_leaves_the_cpu_half_and_says_so(build, capfd, how, said):
    extension = build(**how)[-1]
    assert not extension["objects"]
    assert "MOVAE_WITH_CUDA" not in extension["macros"]
    assert "cudart_static" not in extension["libraries"]
    err = capfd.readouterr().err
    assert re.search(f"building without the CUDA part.*{said}", err), err
    with pytest.raises(Exception, match=said):
        build(**{**how, "MOVAE_REQUIRE_CUDA": "1"})
