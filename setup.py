"""Builds movae_fast._csrc: C++ behind pybind11 and, where nvcc is found, CUDA.

No torch header is included anywhere in csrc/: raw pointers, sizes and a stream come in, so one build serves
every torch. The CUDA half is a second path beside Triton's: where it cannot be built, for whatever reason, the
CPU half is built without it, and the reason is printed.

Environment: MOVAE_NO_CUDA=1 leaves the CUDA half out; MOVAE_REQUIRE_CUDA=1 makes its failure an error;
MOVAE_CUDA_ARCHS="80 90" builds for these architectures alone; CUDA_HOME names the toolkit.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

CSRC = Path("csrc")
# Turing, Ampere (data centre, desktop), Ada, Hopper, Blackwell (data centre, desktop). A binary runs on later
# GPUs of the same generation, too, and the PTX of the newest is compiled by the driver of any later GPU.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


def say(message: str) -> None:
    print(f"movae-fast: {message}", file=sys.stderr)


def find_nvcc() -> str | None:
    """Return nvcc of CUDA_HOME, else the one on PATH, else None."""
    home = os.environ.get("CUDA_HOME")
    candidate = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    return candidate


def architectures(nvcc: str) -> list[int]:
    """Return the architectures to build for: those of ours, or of MOVAE_CUDA_ARCHS, that this nvcc knows.

    An nvcc ends the whole compilation at the first architecture that it does not know: one of CUDA 12.4 at
    compute_100, one of CUDA 13 at anything before compute_75.
    """
    said = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {int(number) for number in re.findall(r"^compute_(\d+)\s*$", said, re.MULTILINE)}
    asked = os.environ.get("MOVAE_CUDA_ARCHS", "")
    if not asked.strip():
        chosen = [number for number in ARCHITECTURES if number in known]
        if not chosen:
            raise RuntimeError(f"{nvcc} knows none of the architectures {ARCHITECTURES}")
        return chosen
    chosen = sorted({int(number.replace(".", "")) for number in re.split(r"[\s,;]+", asked.strip())})
    if unknown := [number for number in chosen if number not in known]:
        raise RuntimeError(f"MOVAE_CUDA_ARCHS names {unknown}; {nvcc} knows {sorted(known)}")
    return chosen


def library_folders(nvcc: str, source: str) -> list[str]:
    """Return where the static CUDA runtime of nvcc's toolkit may lie."""
    # nvcc may be a script that calls another: it says itself where its toolkit is.
    said = subprocess.run([nvcc, "--dryrun", source], capture_output=True, text=True, check=False).stderr
    top = [line.split("TOP=")[1].strip() for line in said.splitlines() if "TOP=" in line]
    toolkit = Path(top[0]) if top else Path(os.path.realpath(nvcc)).parent.parent
    target = "sbsa-linux" if platform.machine() == "aarch64" else "x86_64-linux"
    folders = [toolkit / "lib64", toolkit / "lib", toolkit / "targets" / target / "lib"]
    return [str(folder) for folder in folders if folder.is_dir()]


class Build(build_ext):
    """build_ext that compiles csrc/**/*.cu with nvcc and links them in, or does without and says why."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        required = bool(os.environ.get("MOVAE_REQUIRE_CUDA"))
        without_cuda = {
            name: list(getattr(ext, name))
            for name in ("extra_objects", "library_dirs", "libraries", "define_macros")
        }
        try:
            self.add_cuda(ext)
            super().build_extension(ext)  # the CUDA half may fail to link, too
            return
        except Exception as error:
            if required:
                say("MOVAE_REQUIRE_CUDA is set, and the CUDA part cannot be built")
                raise
            say(f"building without the CUDA part, which Triton replaces on a GPU: {error}")
        for name, value in without_cuda.items():
            setattr(ext, name, value)
        super().build_extension(ext)

    def add_cuda(self, ext: Pybind11Extension) -> None:
        """Compile csrc/**/*.cu and add them to the extension. Raises whatever keeps it from doing so."""
        if os.environ.get("MOVAE_NO_CUDA"):
            raise RuntimeError("MOVAE_NO_CUDA is set")
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("there is no nvcc (set CUDA_HOME to the toolkit)")
        build = Path(self.build_temp)
        build.mkdir(parents=True, exist_ok=True)
        chosen = architectures(nvcc)
        say(f"CUDA for the architectures {chosen}, and PTX of the last")
        arches = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chosen]
        arches.append(f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")
        sources = sorted(str(path) for path in CSRC.rglob("*.cu"))
        commands = []
        for source in sources:
            target = build / f"{Path(source).parent.name}-{Path(source).stem}.cu.o"
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
                f"-I{CSRC}",
                "-c",
                source,
                "-o",
                str(target),
            ]
            print(" ".join(command), file=sys.stderr)
            commands.append(command)
            ext.extra_objects.append(str(target))
        with ThreadPoolExecutor() as pool:  # each waits for a compiler of its own
            list(pool.map(lambda command: subprocess.run(command, check=True), commands))
        ext.library_dirs += library_folders(nvcc, sources[0])
        # The static runtime shares the primary context with torch's, and needs no libcudart at run time.
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        ext.define_macros.append(("MOVAE_WITH_CUDA", "1"))
        # What `extension.cuda_missing` compares the GPUs with.
        ext.define_macros.append(("MOVAE_CUDA_ARCHITECTURES", ",".join(map(str, chosen))))


ParallelCompile("MOVAE_BUILD_JOBS").install()  # as many source files at once as there are cores
setup(
    ext_modules=[
        Pybind11Extension(
            "movae_fast._csrc",
            sorted(str(path) for path in CSRC.rglob("*.cpp")),
            include_dirs=[str(CSRC)],
            # A header that changes has all of them compiled again.
            depends=sorted(str(path) for path in CSRC.rglob("*.h")),
            cxx_std=17,
            # libgomp has one soname: with torch imported first, the loader gives us torch's own thread pool.
            extra_compile_args=["-O3", "-fopenmp", "-fvisibility=hidden", "-Wall"],
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": Build},
)
