"""Builds movae_fast._csrc: C++ behind pybind11 and, where nvcc is found, CUDA.

No torch header is included anywhere in csrc/: raw pointers, sizes and a stream come in, so one build serves
every torch. A machine without nvcc builds the CPU half and says so.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

CSRC = Path("csrc")
CUDA_ARCHITECTURES = ("80", "90", "100")


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else the one on PATH, else None."""
    home = os.environ.get("CUDA_HOME")
    candidate = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    return candidate


class Build(build_ext):
    """build_ext that compiles csrc/*.cu with nvcc and links them in."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        sources = sorted(str(path) for path in CSRC.glob("*.cu"))
        nvcc = find_nvcc()
        if os.environ.get("MOVAE_NO_CUDA"):
            print("movae-fast: MOVAE_NO_CUDA is set; building without the CUDA part", file=sys.stderr)
        elif sources and nvcc is None:
            print(
                "movae-fast: no nvcc (set CUDA_HOME to the toolkit); building without the CUDA part",
                file=sys.stderr,
            )
        elif sources:
            self.add_cuda(ext, str(nvcc), sources)
        super().build_extension(ext)

    def add_cuda(self, ext: Pybind11Extension, nvcc: str, sources: list[str]) -> None:
        build = Path(self.build_temp)
        build.mkdir(parents=True, exist_ok=True)
        arches = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
        arches.append(f"-gencode=arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}")
        for source in sources:
            target = build / (Path(source).stem + ".cu.o")
            command = [
                nvcc,
                "--threads=0",  # the architectures side by side
                "-O3",
                "-std=c++17",
                "-lineinfo",
                "--fmad=true",
                "-Xcompiler",
                "-fPIC",
                "-cudart",
                "static",
                *arches,
                "-c",
                source,
                "-o",
                str(target),
            ]
            print(" ".join(command), file=sys.stderr)
            subprocess.run(command, check=True)
            ext.extra_objects.append(str(target))
        # nvcc may be a script that calls another: it says itself where its toolkit is.
        said = subprocess.run(
            [nvcc, "--dryrun", sources[0]], capture_output=True, text=True, check=False
        ).stderr
        top = [line.split("TOP=")[1].strip() for line in said.splitlines() if "TOP=" in line]
        toolkit = Path(top[0]) if top else Path(os.path.realpath(nvcc)).parent.parent
        folders = [toolkit / "lib64", toolkit / "lib", toolkit / "targets" / "x86_64-linux" / "lib"]
        ext.library_dirs += [str(folder) for folder in folders if folder.is_dir()]
        # The static runtime shares the primary context with torch's, and needs no libcudart at run time.
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        ext.define_macros.append(("MOVAE_WITH_CUDA", "1"))


ParallelCompile("MOVAE_BUILD_JOBS").install()  # as many source files at once as there are cores
setup(
    ext_modules=[
        Pybind11Extension(
            "movae_fast._csrc",
            sorted(str(path) for path in CSRC.glob("*.cpp")),
            cxx_std=17,
            # libgomp has one soname: with torch imported first, the loader gives us torch's own thread pool.
            extra_compile_args=["-O3", "-fopenmp", "-fvisibility=hidden", "-Wall"],
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": Build},
)
