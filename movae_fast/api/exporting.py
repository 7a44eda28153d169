"""Write a trained model as programs of torch.export or ONNX, and check their outputs against the model's."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from movae_fast.api.programs import Program, programs_of
from movae_fast.api.trained_model import LoadedModel
from movae_fast.api.weights_folder import whole_folder, write_files
from movae_fast.names import ArgumentError, first_line

ExportFormat = Literal["safetensors", "torch_export", "onnx"]
TOLERANCE = 1e-5  # by which a program may differ from the model, relative to outputs beyond 1


@dataclass(frozen=True)
class Written:
    """Hold the result of writing one program: its file, and how far its outputs are from the model's."""

    path: Path
    difference: float | None  # as of `largest_difference`; None where no runtime for it is installed
    by: str  # the runtime that computed its outputs, or that is missing


def export_programs(model: LoadedModel, folder: Path, kind: ExportFormat) -> list[Written]:
    """Write a model's programs (encoder, decoder, ...) into a new folder, and return one `Written` for each.

    kind: "torch_export" writes .pt2 files, "onnx" .onnx files; the folder also has what `export_weights`
    writes. Each program is run and compared with the model. Raises ArgumentError for a model that cannot be
    exported, naming the part, and for a program whose outputs differ from the model's by more than TOLERANCE;
    no folder is then left behind.
    """
    if kind == "onnx":
        require_onnx()
    write: Callable[[Program, Path], Written] = {"torch_export": write_pt2, "onnx": write_onnx}[kind]
    suffix = {"torch_export": ".pt2", "onnx": ".onnx"}[kind]
    written = []
    with whole_folder(folder) as inside, torch.no_grad():
        for program in programs_of(model):
            made = write(program, inside / f"{program.name}{suffix}")
            if made.difference is not None and not made.difference <= TOLERANCE:
                raise ArgumentError(
                    f"part {program.name}: its outputs differ by {made.difference:.2g} from the model's "
                    f"({made.by}), and may by {TOLERANCE:g}: nothing was written"
                )
            written.append(Written(folder / made.path.name, made.difference, made.by))
        write_files(model, inside)
    return written


def require_onnx() -> None:
    """Raise ArgumentError, with the install command, if a package that writes ONNX is not installed."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ArgumentError(f"format onnx needs {' and '.join(missing)}: pip install 'movae-fast[onnx]'")


def traced(program: Program) -> torch.export.ExportedProgram:
    """Trace a program by torch.export so that it takes batches of any size. Raises ArgumentError, which names
    the part, where that fails."""
    dimensions: dict[str, torch.export.Dim] = {}
    shapes = {
        name: {axis: dimensions.setdefault(word, torch.export.Dim(word)) for axis, word in axes.items()}
        for name, axes in program.dynamic.items()
    }
    try:
        with rates_kept(program):
            return torch.export.export(
                program.module, (), kwargs=dict(program.inputs), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        raise ArgumentError(f"part {program.name} cannot be exported: {first_line(error)[:300]}") from error


@contextmanager
def rates_kept(program: Program) -> Iterator[None]:
    """Restore the beta of a multi-rate model after the block; tracing in the block sets it to a program's
    input."""
    network: Any = getattr(program.module, "network", None)
    rates = getattr(network, "rates", None)
    if rates is None:
        yield
        return
    before = rates.evaluated
    try:
        yield
    finally:
        rates.evaluated = before


def write_pt2(program: Program, path: Path) -> Written:
    """Write a program as a .pt2 file of torch.export, load it again, and compare its outputs with the
    model's."""
    torch.export.save(traced(program), path)
    loaded = torch.export.load(path).module()
    return Written(path, largest_difference(program, lambda inputs: loaded(**inputs)), "torch.export")


def write_onnx(program: Program, path: Path) -> Written:
    """Write a program as an ONNX file, and compare its outputs with the model's if onnxruntime is installed."""
    graph = torch.onnx.export(
        traced(program),
        input_names=list(program.inputs),
        output_names=list(program.outputs),
        dynamo=True,
        verbose=False,
    )
    assert graph is not None
    graph.save(path, external_data=False)
    if importlib.util.find_spec("onnxruntime") is None:
        return Written(path, None, "onnxruntime, which is not installed")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}

    def run(inputs: dict[str, Tensor]) -> Any:
        return session.run(None, {k: v.cpu().numpy() for k, v in inputs.items() if k in names})

    return Written(path, largest_difference(program, run), "onnxruntime")


def largest_difference(program: Program, run: Callable[[dict[str, Tensor]], Any]) -> float:
    """Return the largest difference between the outputs of `run` and those of the program's module, on batches
    of 1, 2 and 5 images or sentences.

    run: takes the inputs by name, and returns the outputs as the module does. See `difference`.
    """
    worst = 0.0
    with rates_kept(program):
        for size in (1, EXAMPLE_BATCH, 5):
            inputs = {name: resized(x, program.dynamic[name], size) for name, x in program.inputs.items()}
            wanted, given = as_tuple(program.module(**inputs)), as_tuple(run(inputs))
            for a, b in zip(wanted, given, strict=True):
                worst = max(worst, difference(a.cpu(), torch.as_tensor(np.asarray(b))))
    return worst


EXAMPLE_BATCH = 2


def resized(x: Tensor, axes: dict[int, str], size: int) -> Tensor:
    """Return an input with `size` entries along its batch dimension, which repeat those that it has."""
    for axis, word in axes.items():
        if word == "batch":
            rows = torch.arange(size, device=x.device) % x.shape[axis]
            x = x.index_select(axis, rows)
    return x


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors, divided by the largest absolute value of `a` if that is
    above 1.

    It is infinite if shapes or dtypes differ, or if integers (such as codes) are not all equal.
    """
    if a.shape != b.shape or a.dtype != b.dtype or (not a.is_floating_point() and not torch.equal(a, b)):
        return float("inf")
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1))


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    """Return a module's output as a tuple, also if it is a single tensor."""
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
