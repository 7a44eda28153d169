"""Write a trained model as programs of torch.export or ONNX, compared with the model."""

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
    """Hold what became of a program: its file, and how far its outputs are from the model's."""

    path: Path
    difference: float | None  # None where nothing here can run it
    by: str  # what ran it, or what would


def export_programs(model: LoadedModel, folder: Path, kind: ExportFormat) -> list[Written]:
    """Write a model's programs into a new folder as `.pt2` (torch_export) or `.onnx`, and compare each with the
    model.

    Raises ArgumentError for a model that cannot be exported, naming the part, and for a program whose outputs
    are not the model's to TOLERANCE; nothing is then written.
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
    """Raise ArgumentError where what writes ONNX is missing."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ArgumentError(f"format onnx needs {' and '.join(missing)}: pip install 'movae-fast[onnx]'")


def traced(program: Program) -> torch.export.ExportedProgram:
    """Return a program as torch.export sees it, with a batch of any size."""
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
    """Put the beta of a multi-rate model back after the block, which traces it as an input."""
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
    """Write a program by torch.export, load it again, and compare."""
    torch.export.save(traced(program), path)
    loaded = torch.export.load(path).module()
    return Written(path, largest_difference(program, lambda inputs: loaded(**inputs)), "torch.export")


def write_onnx(program: Program, path: Path) -> Written:
    """Write a program as ONNX, and compare where onnxruntime is installed."""
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
    """Return how far the outputs of `run` are from the module's, for batches of 1, 2 and 5.

    Absolute where outputs are within [-1, 1], else relative to the largest. Infinite for another shape, type or
    index.
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
    """Return an input with `size` entries along its batch, repeated."""
    for axis, word in axes.items():
        if word == "batch":
            rows = torch.arange(size, device=x.device) % x.shape[axis]
            x = x.index_select(axis, rows)
    return x


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two outputs, as `largest_difference` counts it."""
    if a.shape != b.shape or a.dtype != b.dtype or (not a.is_floating_point() and not torch.equal(a, b)):
        return float("inf")
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1))


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    """Return one output or several as a tuple."""
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
