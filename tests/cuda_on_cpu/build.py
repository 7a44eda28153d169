"""Compile csrc/**/*.cu for a CPU: a library for Python, or the sanitizers' driver."""

import os
import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
LAUNCH = re.compile(r"([\w:]+(?:<\w+>)?)<<<(.+?)>>>\((.*?)\);", re.DOTALL)


def top_level(text: str) -> list[str]:
    """Split at the commas that are in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def on_cpu(source: str) -> str:
    """A CUDA source as C++ for emulation.h. Raises ValueError for what it does not know."""

    def launch(match: re.Match[str]) -> str:
        kernel, how, arguments = match.groups()
        grid, block, bytes_, _ = top_level(how)
        return f"emulated::launch({grid}, {block}, {bytes_}, [=]() mutable {{ {kernel}({arguments}); }});"

    text, launches = LAUNCH.subn(launch, source)
    text = text.replace("extern __shared__ double shared[];", "double* shared = emulated::dynamic_shared();")
    if launches == 0 or "<<<" in text or "extern __shared__" in text:
        raise ValueError("a launch or a shared array is written in a way that the emulation does not know")
    return text


def build(out: Path, *flags: str, driver: bool = False, csrc: Path = CSRC) -> Path | None:
    """Compile the folder `csrc` into `out`; the library or the driver, None without a C++ compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    files = [HERE / "emulation.cpp", HERE / "entry.cpp"]
    for source in sorted(csrc.rglob("*.cu")):
        target = out / f"{source.parent.name}-{source.stem}.cpp"
        target.write_text(f'#include "emulation.h"\n#line 1 "{source}"\n{on_cpu(source.read_text())}')
        files.append(target)
    if driver:
        files.append(HERE / "sanitized.cpp")
    made = out / ("driver" if driver else "library.so")
    # Contraction would make the results depend on the compiler's mood rather than on the order of the threads.
    options = ["-std=c++17", "-O1", "-g", "-w", "-pthread", "-ffp-contract=off", f"-I{HERE}", f"-I{csrc}"]
    options += [] if driver else ["-fPIC", "-shared"]
    subprocess.run([compiler, *options, *flags, *map(str, files), "-o", str(made)], check=True)
    return made
