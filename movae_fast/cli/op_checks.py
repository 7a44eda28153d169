"""Compare every op on a device with the same op on the CPU: the checks of `movae doctor --gpu` that need no
process of their own.

Each check is a function that returns a note to print beside "ok", and raises an exception if a result is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast, get_args

import torch
from torch import Tensor

from movae_fast import ops, reference
from movae_fast.ops import extension
from movae_fast.ops import rows as rows_of
from movae_fast.ops.gramian_weights import METHODS
from movae_fast.ops.project_weights import Mode
from movae_fast.ops.quantize import Gradient
from movae_fast.ops.registration import triton_kernels

Check = Callable[[], str]  # what it returns is printed beside "ok"
CPU = torch.device("cpu")
# The relative step of each dtype.
ROUNDING = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


# --- comparing and timing -----------------------------------------------------------------------------------


def error_of(actual: Tensor, expected: Tensor) -> float:
    """Return the relative error ||actual - expected|| / ||expected||; it is NaN if `actual` has values that are
    not finite."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    if actual.shape != expected.shape:
        raise AssertionError(f"the shape is {list(actual.shape)}, not {list(expected.shape)}")
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def close(pairs: Iterable[tuple[Tensor, Tensor]], limit: float) -> float:
    """Return the largest relative error of pairs (actual, expected). Raises AssertionError above `limit`."""
    errors = [error_of(actual, expected) for actual, expected in pairs]
    for number, error in enumerate(errors):
        if not error <= limit:  # so that a NaN fails
            raise AssertionError(f"result {number} is off by {error:.1e}, more than {limit:.1e}")
    return max(errors)


def same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raise AssertionError, beginning with `what`, unless the two tensors are equal in every bit."""
    if not torch.equal(actual.cpu(), expected.cpu()):
        different = int((actual.cpu() != expected.cpu()).sum())
        raise AssertionError(f"{what}: {different} of {expected.numel()} differ")


def milliseconds(call: Callable[[], Any], device: torch.device, rounds: int = 20) -> str:
    """Return the mean time of a call on the device, as text such as "0.123 ms".

    One call before the timing, which may compile kernels, does not count.
    """
    if device.type != "cuda":
        return "not timed"
    with torch.cuda.device(device):
        call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(rounds):
            call()
        end.record()
        end.synchronize()
    return f"{start.elapsed_time(end) / rounds:.3f} ms"


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normally distributed numbers of the given shape on the CPU; the seed makes them the same on every
    machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def conflicting(m: int, P: int = 3000) -> Tensor:  # [m, P]
    """Return m rows of P numbers that conflict pairwise: most of their inner products are negative."""
    rows = random(m, P, seed=m)
    return rows - 0.9 * rows.mean(0)


# --- the ops ------------------------------------------------------------------------------------------------


def op_checks(device: torch.device) -> Iterator[tuple[str, Check]]:
    """Yield (name, check) for each op, in every dtype and implementation that it has on the device."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        yield f"nearest_code {name_of(dtype)}", partial(nearest_code, device, dtype)
    if device.type == "cuda":
        yield "nearest_code tiles, TF32, screening alone", partial(nearest_code_variants, device)
    for gradient in get_args(Gradient):
        yield f"quantize {gradient}", partial(quantize, device, gradient)
    yield "code_error", partial(code_error, device)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        yield f"gramian, combine {name_of(dtype)}", partial(gramian_combine, device, dtype)
        yield f"linear_cross_entropy {name_of(dtype)}", partial(linear_cross_entropy, device, dtype)
    for estimator in get_args(reference.TCEstimator):
        for dtype in (torch.float32, torch.float64):
            name = f"tc_terms {estimator} {name_of(dtype)}"
            yield name, partial(tc_terms, device, estimator, dtype)
    for dtype in (torch.float32, torch.float64):
        yield f"norm_swish {name_of(dtype)}", partial(norm_swish, device, dtype)
    for path in ("triton", *(() if extension.cuda_missing() else ("cuda",))):
        for regularizer in get_args(reference.Regularizer):
            label = f"{regularizer}, {'Triton' if path == 'triton' else 'CUDA C++'}"
            yield f"project {label}", partial(projections, device, regularizer, path)
            yield f"upgrad_weights {label}", partial(upgrad_weights, device, regularizer, path)
    yield "gramian_weights", partial(gramian_weights, device)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def nearest_code(device: torch.device, dtype: torch.dtype) -> str:
    """Check the indices of `ops.nearest_code` against float64 on the CPU, and return a note with its time.

    The shapes include images, and depths D that do and do not fill a kernel's tiles.
    """
    for shape, K in (((1000, 64), 512), ((2, 64, 12, 9), 512), ((300, 20), 33)):
        z, codebook = random(*shape, dtype=dtype), random(K, shape[1], seed=1, dtype=dtype)
        expected = reference.nearest_code(extension.as_rows(z).double(), codebook.double())
        z, codebook = z.to(device), codebook.to(device)
        same(ops.nearest_code(z, codebook).flatten(), expected, f"the indices of {list(shape)}")
    z, codebook = random(32768, 64, dtype=dtype).to(device), random(1024, 64, seed=1, dtype=dtype).to(device)
    ops.nearest_code(z, codebook)
    return (
        f"indices equal; N 32768, K 1024, D 64: {milliseconds(lambda: ops.nearest_code(z, codebook), device)}"
    )


def nearest_code_variants(device: torch.device) -> str:
    """Check `nearest_code` with every tile shape that may be chosen for this GPU, with TF32, and without its
    exact step.

    In the last case the kernel takes the nearest code of the reduced-precision search without verifying it;
    then 90 percent of the indices have to agree. Returns a note.
    """
    kernels = triton_kernels("nearest_code")
    z, codebook = random(700, 64), random(300, 64, seed=1)
    expected = reference.nearest_code(z.double(), codebook.double())
    z, codebook = z.to(device), codebook.to(device)
    tiles = kernels.candidates(64, True, kernels.capability(device), False)
    for tile in tiles:
        same(kernels.nearest_code(z, codebook, config=tile), expected, f"the indices by tile {tile}")
    same(kernels.nearest_code(z, codebook, precision="tf32"), expected, "the indices by TF32")
    agree = float((kernels.nearest_code(z, codebook, exact=False).cpu() == expected).double().mean())
    if agree < 0.9:
        raise AssertionError(f"screening alone agrees in {agree:.0%} of the rows")
    return f"{len(tiles)} tiles and TF32 equal; screening alone agrees in {agree:.1%}"


def quantize(device: torch.device, gradient: Gradient) -> str:
    """Check the outputs and gradients of `ops.quantize` against the CPU, with and without deterministic
    summation."""

    def results(where: torch.device, z: Tensor, deterministic: bool) -> list[Tensor]:
        leaves = [t.clone().to(where).requires_grad_() for t in (z, random(64, 32, seed=1))]
        out = ops.quantize(*leaves, gradient=gradient, deterministic=deterministic)
        loss = (out[0] * random(*z.shape, seed=2).to(where)).sum() + out[2].sum()
        return [*out, *torch.autograd.grad(loss, leaves)]

    worst = 0.0
    for z in (random(500, 32), random(3, 32, 7, 5), random(3, 32, 5, 7).transpose(2, 3)):
        for deterministic in (False, True):
            actual, expected = results(device, z, deterministic), results(CPU, z, deterministic)
            same(actual[1], expected[1], "the indices")
            same(actual[0], expected[0], "the codes")
            same(actual[3], expected[3], "the counts")
            if actual[0].stride() != z.stride():
                raise AssertionError(f"the codes' strides are {actual[0].stride()}, not {z.stride()}")
            worst = max(worst, close(zip(actual[2:], expected[2:], strict=True), 1e-5))
    z, codebook = random(32, 64, 32, 32).to(device), random(512, 64, seed=1).to(device)
    ops.quantize(z, codebook, gradient=gradient)
    took = milliseconds(lambda: ops.quantize(z, codebook, gradient=gradient), device)
    return f"error {worst:.1e}; N 32768, K 512, D 64: {took}"


def code_error(device: torch.device) -> str:
    """Check the output and gradients of `ops.code_error` against the CPU, and return the largest error as a
    note."""

    def results(where: torch.device, z: Tensor) -> list[Tensor]:
        leaves = [t.clone().to(where).requires_grad_() for t in (z, random(64, 40, seed=1))]
        error = ops.code_error(leaves[0], leaves[1], index.to(where))
        return [error, *torch.autograd.grad(error.sum(), leaves)]

    worst = 0.0
    for z in (random(500, 40), random(3, 40, 7, 5), random(3, 40, 5, 7).transpose(2, 3)):
        index = torch.randint(64, (z.shape[0], *z.shape[2:]), generator=torch.Generator().manual_seed(3))
        worst = max(worst, close(zip(results(device, z), results(CPU, z), strict=True), 1e-5))
    return f"error {worst:.1e}"


def gramian_combine(device: torch.device, dtype: torch.dtype) -> str:
    """Check `ops.gramian` and `ops.combine` for m of 1, 4 and 20 rows against float64 on the CPU; return a
    note."""
    worst = 0.0
    for m in (1, 4, 20):
        rows, weights = conflicting(m).to(dtype), random(m, seed=1).double()
        on_gpu = rows.to(device)
        worst = max(worst, close([(ops.gramian(on_gpu), reference.gramian(rows))], 1e-12))
        expected = reference.combine(rows.double(), weights)
        close([(ops.combine(on_gpu, weights.to(device)), expected)], 4 * m * ROUNDING[dtype])
    rows, weights = random(4, 2**22, dtype=dtype).to(device), random(4).double().to(device)
    times = [
        milliseconds(call, device) for call in (lambda: ops.gramian(rows), lambda: ops.combine(rows, weights))
    ]
    return f"error {worst:.1e}; 4 x 4194304: {times[0]}, {times[1]}"


def linear_cross_entropy(device: torch.device, dtype: torch.dtype) -> str:
    leaves = [(random(4, 30, 64, seed=k) if k == 0 else random(3000, 64, seed=k)).to(dtype) for k in range(2)]
    target = torch.randint(0, 3000, (4, 30), generator=torch.Generator().manual_seed(0))

    def results(where: torch.device, kind: torch.dtype, op: Callable[..., Any]) -> list[Tensor]:
        moved = [t.to(where, kind).requires_grad_() for t in leaves]
        total, losses = op(*moved, target.to(where))
        return [losses, *torch.autograd.grad(total, moved)]

    expected = results(CPU, torch.float64, reference.linear_cross_entropy)
    got = results(device, dtype, ops.linear_cross_entropy)
    error = close(zip(got, expected, strict=True), 64 * ROUNDING[dtype])
    return f"error {error:.0e}"


def tc_terms(device: torch.device, estimator: reference.TCEstimator, dtype: torch.dtype) -> str:
    """Check the outputs and gradients of `ops.tc_terms` against float64 on the CPU, and return the error as a
    note."""

    def results(where: torch.device, kind: torch.dtype, op: Callable[..., Any]) -> list[Tensor]:
        leaves = [random(100, 10, seed=s, dtype=dtype).to(where, kind).requires_grad_() for s in range(3)]
        terms = op(*leaves, 5000, estimator)
        loss = sum((t * random(100, seed=7).to(where, kind)).sum() for t in terms)
        return [*terms, *torch.autograd.grad(loss, leaves)]

    expected = results(CPU, torch.float64, reference.tc_terms)
    pairs = zip(results(device, dtype, ops.tc_terms), expected, strict=True)
    return f"error {close(pairs, 1e-4 if dtype == torch.float32 else 1e-11):.1e}"


def norm_swish(device: torch.device, dtype: torch.dtype) -> str:
    """Compare the map, its statistics and the gradients with float64 on the CPU."""

    def results(where: torch.device, kind: torch.dtype, op: Callable[..., Any]) -> list[Tensor]:
        shapes = ((8, 20, 9, 9), (20,), (20,), (8, 20))
        leaves = [random(*shape, seed=k).to(where, kind).requires_grad_() for k, shape in enumerate(shapes)]
        out, mean, var = op(*leaves)
        upstream = random(*out.shape, seed=7).to(where, kind)
        return [out, mean, var, *torch.autograd.grad(out, leaves, upstream)]

    expected = results(CPU, torch.float64, reference.norm_swish)
    pairs = zip(results(device, dtype, ops.norm_swish), expected, strict=True)
    return f"error {close(pairs, 1e-4 if dtype == torch.float32 else 1e-11):.1e}"


@contextmanager
def projected_by(path: str) -> Iterator[None]:
    """Make the ops that project gradients use "triton" or "cuda" on CUDA inside a `with` block."""
    before, rows_of.cuda_path = rows_of.cuda_path, path
    try:
        yield
    finally:
        rows_of.cuda_path = before


def strict(regularizer: reference.Regularizer) -> dict[str, Any]:
    """Return the options of a projection for a regularizer: its name and epsilons.

    For "diagonal" these are the trainer's epsilons, for "trace" TorchJD's.
    """
    if regularizer == "diagonal":
        return {"norm_eps": 0.0, "reg_eps": 1e-6, "regularizer": "diagonal"}
    return {"norm_eps": 1e-4, "reg_eps": 1e-4, "regularizer": "trace"}


def projected(kind: str, G: Tensor, u: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the result and the status of the projection that `kind` names: upgrad, dualproj, rows or
    multipliers.

    G [m, m] is a Gramian and u [5, m] holds vectors, for the kinds that project given ones.
    """
    if kind == "rows":
        return ops.project_rows(u, G, **options)
    if kind == "multipliers":
        return ops.step_multipliers(G, G @ u[0])
    return ops.project_weights(G, mode=cast(Mode, kind), **options)


def projections(device: torch.device, regularizer: reference.Regularizer, path: str) -> str:
    """Check all projection ops of m = 1 to 64 objectives against the CPU, with one implementation; return a
    note.

    path: "triton" or "cuda". A Gramian with a NaN has to give NaN weights and the status -1.
    """
    worst, options = 0.0, strict(regularizer)
    with projected_by(path):
        for m in (1, 2, 4, 9, 20, 64):
            rows = conflicting(m)
            rows[0] *= 1e-2  # a row that is far shorter than the longest
            G, u = ops.gramian(rows), random(5, m, seed=1).double()
            for kind in ("upgrad", "dualproj", "rows", "multipliers"):
                mine, status = projected(kind, G.to(device), u.to(device), options)
                theirs, _ = projected(kind, G, u, options)
                if int(status) != 0:
                    raise AssertionError(f"m = {m}: the status is {int(status)}")
                # A multiplier of zero in exact arithmetic may come out as rounding beside the slopes.
                limit = 1e-7 * max(1.0, float(theirs.norm()))
                if not float((mine.cpu() - theirs).norm()) <= limit:
                    raise AssertionError(f"m = {m}: off by {float((mine.cpu() - theirs).norm()):.1e}")
                worst = max(worst, float((mine.cpu() - theirs).norm()) / max(1.0, float(theirs.norm())))
            broken = G.to(device, copy=True)
            broken[0, 0] = float("nan")
            weights, status = ops.project_weights(broken, **options)
            if not (bool(weights.isnan().all()) and int(status) == -1):
                raise AssertionError(f"m = {m}: a NaN in the Gramian gives {weights.tolist()}, {int(status)}")
        G = ops.gramian(conflicting(4)).to(device)
        took = milliseconds(lambda: ops.project_weights(G, **options), device)
    return f"error {worst:.1e}; m 4: {took}"


def upgrad_weights(device: torch.device, regularizer: reference.Regularizer, path: str) -> str:
    """Check `ops.upgrad_weights`, which starts from the rows of a Jacobian, against the CPU; return a note.

    path: the implementation, "triton" or "cuda".
    """
    worst, options = 0.0, strict(regularizer)
    with projected_by(path):
        for m in (2, 4, 16, 20):
            rows = conflicting(m)
            weights, gramian, status = ops.upgrad_weights(rows.to(device), **options)
            expected = ops.upgrad_weights(rows, **options)
            if int(status) != 0:
                raise AssertionError(f"m = {m}: the status is {int(status)}")
            close([(gramian, expected[1])], 1e-12)
            worst = max(worst, close([(weights, expected[0])], 1e-6))  # Gramians that differ by rounding
        rows = random(4, 2**20).to(device)
        ops.upgrad_weights(rows, **options)
        took = milliseconds(lambda: ops.upgrad_weights(rows, **options), device)
    return f"error {worst:.1e}; 4 x 1048576: {took}"


def gramian_weights(device: torch.device) -> str:
    """Check `ops.gramian_weights` for every method against the CPU, and return the largest error as a note.

    Raises AssertionError above 1e-7.
    """
    worst = 0.0
    for m in (1, 3, 8, 20):
        G = ops.gramian(conflicting(m))
        order = random(m, m, seed=1).argsort(1)
        for method in METHODS:
            met = order if method == "pcgrad" else None
            expected = ops.gramian_weights(G, method, order=met)
            actual = ops.gramian_weights(G.to(device), method, order=None if met is None else met.to(device))
            worst = max(worst, close([(actual, expected)], 1e-7))
    reason = extension.cuda_missing()
    return f"error {worst:.1e}" + (f"; on the host: {reason}" if reason else "")
