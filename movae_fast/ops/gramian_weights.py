"""Compute the weights of a Jacobian's rows from their Gramian alone: `movae::gramian_weights`.

The methods are Aligned-MTL (Senushkin et al. 2023), CAGrad (Liu et al. 2021), IMTL-G (Liu et al. 2021), MGDA
(Sener & Koltun 2018) and PCGrad (Yu et al. 2020), as TorchJD defines them. Each is a small serial computation
in float64, so it runs in C++ on a CPU and in one warp on CUDA, both from csrc/weightings/gramian_weights.h. If
the extension has no usable CUDA code, the weights of a CUDA Gramian are computed on the host: m x m numbers are
copied, and a warning says so once.
"""

import math
import warnings
from functools import cache
from typing import NoReturn, get_args

import torch
from torch import Tensor

from movae_fast import reference
from movae_fast.ops import extension
from movae_fast.ops.extension import csrc
from movae_fast.ops.registration import library, refuse_vmap
from movae_fast.reference import Method

# In the order of `Method` in csrc/weightings/gramian_weights.h.
METHODS: tuple[Method, ...] = get_args(Method)


def gramian_weights(
    gramian: Tensor,  # [m, m]
    method: Method,
    pref: Tensor | None = None,  # [m]
    *,
    order: Tensor | None = None,  # [m, m] int64
    c: float = 0.5,
    norm_eps: float = 1e-4,
    epsilon: float = 1e-3,
    max_iters: int = 100,
) -> Tensor:  # [m] float64
    """Return the weights w [m] with which the aggregator `method` combines the rows of a Jacobian J to the
    update w' J.

    gramian: J J', symmetric, of any floating dtype; computed with in float64.
    method:
        "aligned_mtl_min", "aligned_mtl_median", "aligned_mtl_rmse": makes the singular values of J equal, to
            the smallest, the (lower) median or the root mean square of those above rounding (eigenvalues of
            the Gramian above m eps times the largest). The rows are then weighted by `pref`; None is 1/m each.
        "cagrad": the update within a distance of c |mean| from the rows' mean whose smallest inner product
            with a row is largest, exact to rounding. Computed with the Gramian over its trace. The weights
            are 0 if the trace, or the length of the optimal convex combination of the rows, is below
            norm_eps, or if the mean is zero to rounding.
        "imtl_g": the update whose projections onto the directions of all rows are equal, by the
            pseudoinverse; 0 if the weights before their normalisation add up to less than 1e-12.
        "mgda": Frank-Wolfe steps towards the shortest vector in the convex hull of the rows, until a step is
            shorter than `epsilon` or `max_iters` were made.
        "pcgrad": each row without its components against other rows. Row i is projected against the other
            rows in the order order[i], a permutation of 0..m-1; None draws the orders on the Gramian's device
            from torch's generator. On CUDA, a row whose order has an index outside 0..m-1 gets the weight NaN.

    Returns NaN for a Gramian or a preference with a NaN or an infinity. Nothing is read on the host, except on
    CUDA where the extension was built without nvcc. Not differentiable; vmap is refused.

    Raises ValueError (shapes, m = 0, parameters, a preference or an order that the method does not take, on a
    CPU an order that is no permutation) or TypeError (dtype).
    """
    m = _check(gramian)
    check_parameters(method, c, norm_eps, epsilon, max_iters)
    if pref is not None:
        if not method.startswith("aligned_mtl"):
            raise ValueError(f"gramian_weights: {method} takes no preference")
        if pref.dim() != 1 or pref.shape[0] != m or pref.device != gramian.device:
            _refuse(f"pref must be [m]; got {list(pref.shape)} on {pref.device}", gramian)
    if method == "pcgrad":
        if order is None:
            order = torch.rand(m, m, dtype=torch.float64, device=gramian.device).argsort(1)
        if order.shape != (m, m) or order.dtype != torch.int64 or order.device != gramian.device:
            _refuse(f"order must be [m, m] int64; got {list(order.shape)} {order.dtype}", gramian)
    elif order is not None:
        raise ValueError(f"gramian_weights: {method} takes no order")
    a, b = (c, norm_eps) if method == "cagrad" else (epsilon, 0.0)
    return torch.ops.movae.gramian_weights(gramian, METHODS.index(method), pref, order, a, b, max_iters)


def check_parameters(
    method: str, c: float = 0.5, norm_eps: float = 1e-4, epsilon: float = 1e-3, max_iters: int = 100
) -> None:
    """Raise ValueError for an unknown method of `gramian_weights`, or for a parameter of one outside its
    range."""
    if method not in METHODS:
        raise ValueError(f"gramian_weights: method must be one of {METHODS}; got {method!r}")
    # Written so that a NaN is refused, too.
    if not (0 <= c < math.inf and 0 <= norm_eps < math.inf):
        raise ValueError(f"gramian_weights: c and norm_eps must be >= 0 and finite; got {c}, {norm_eps}")
    if not (0 < epsilon < math.inf and max_iters > 0):
        raise ValueError(f"gramian_weights: epsilon and max_iters must be > 0; got {epsilon}, {max_iters}")
    if max_iters != int(max_iters) or max_iters >= 1 << 63:
        raise ValueError(f"gramian_weights: max_iters must be a whole number below 2^63; got {max_iters}")


def _check(gramian: Tensor) -> int:
    if gramian.dim() != 2 or gramian.shape[0] != gramian.shape[1] or gramian.shape[0] == 0:
        raise ValueError(f"gramian_weights: the Gramian must be [m, m] with m >= 1, got {list(gramian.shape)}")
    if not gramian.is_floating_point():
        raise TypeError(f"gramian_weights: the Gramian must be floating point, got {str(gramian.dtype)[6:]}")
    return gramian.shape[0]


def _refuse(problem: str, gramian: Tensor) -> NoReturn:
    raise ValueError(f"gramian_weights: {problem}; the Gramian is {list(gramian.shape)} on {gramian.device}")


# --- dispatch -------------------------------------------------------------------------------------------------


library.define(
    "gramian_weights(Tensor gramian, int method, Tensor? pref, Tensor? order, float a, float b, int iterations)"
    " -> Tensor"
)


def _as_taken(
    gramian: Tensor, pref: Tensor | None, order: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return Gramian and preference as contiguous float64 tensors, and `order` as a contiguous one.

    C++ and CUDA read them by address, so the caller must keep the returned tensors alive during the call.
    """
    pref = None if pref is None else pref.double().contiguous()
    return gramian.double().contiguous(), pref, None if order is None else order.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# --- CPU ------------------------------------------------------------------------------------------------------


@torch.library.impl(library, "gramian_weights", "CPU")
def _gramian_weights(
    gramian: Tensor, method: int, pref: Tensor | None, order: Tensor | None, a: float, b: float, iterations: int
) -> Tensor:
    if extension.missing(gramian):
        return weigh_in_torch(gramian.double(), METHODS[method], pref, order, a, b, iterations)
    given = _as_taken(gramian, pref, order)
    out = given[0].new_empty(len(gramian))
    csrc.gramian_weights(method, len(gramian), *map(_address, given), a, b, iterations, out.data_ptr())
    return out


def weigh_in_torch(
    gramian: Tensor,
    method: Method,
    pref: Tensor | None,
    order: Tensor | None,
    a: float,
    b: float,
    iterations: int,
) -> Tensor:
    """Compute the weights by movae_fast.reference, where the extension was not built, with the extension's
    behaviour at the edges: NaN for a Gramian that is not finite, ValueError for an order that is no
    permutation."""
    if not gramian.isfinite().all():
        return torch.full_like(gramian[0], torch.nan)
    m = len(gramian)
    if order is not None and not torch.equal(order.sort(1).values, torch.arange(m).expand_as(order)):
        raise ValueError(f"gramian_weights: each row of order must be a permutation of 0..{m - 1}")
    return reference.gramian_weights(
        gramian, method, pref, order, c=a, norm_eps=b, epsilon=a, max_iters=iterations
    )


# --- CUDA -----------------------------------------------------------------------------------------------------


@torch.library.impl(library, "gramian_weights", "CUDA")
def _gramian_weights_cuda(
    gramian: Tensor, method: int, pref: Tensor | None, order: Tensor | None, a: float, b: float, iterations: int
) -> Tensor:
    if reason := extension.cuda_missing():
        _warn_of_the_host(reason)
        # Copy the m x m numbers to the host, run the CPU's C++ there, and copy back; the device waits for it.
        pref, order = None if pref is None else pref.cpu(), None if order is None else order.cpu()
        return _gramian_weights(gramian.cpu(), method, pref, order, a, b, iterations).to(gramian.device)
    given, m = _as_taken(gramian, pref, order), len(gramian)
    with torch.cuda.device(gramian.device):
        out = given[0].new_empty(m)
        scratch = given[0].new_empty(csrc.gramian_weights_scratch_cuda(m))
        stream = torch.cuda.current_stream().cuda_stream
        addresses = map(_address, given)
        csrc.gramian_weights_cuda(
            method, m, *addresses, a, b, iterations, out.data_ptr(), scratch.data_ptr(), stream
        )
    return out


@cache
def _warn_of_the_host(reason: str) -> None:
    """Warn once per process that the weights are computed on the host, for which each step waits."""
    warnings.warn(
        "gramian_weights on CUDA: the weights are computed on the host, so that a step waits for it and is not "
        f"one CUDA graph ({reason}). UPGrad and DualProj run on the device everywhere; these do once the "
        "extension is built with a CUDA toolkit (CUDA_HOME, or nvcc on PATH) that the driver serves.",
        RuntimeWarning,
        stacklevel=4,
    )


# --- fake -----------------------------------------------------------------------------------------------------


@torch.library.register_fake("movae::gramian_weights")
def _gramian_weights_fake(
    gramian: Tensor, method: int, pref: Tensor | None, order: Tensor | None, a: float, b: float, iterations: int
) -> Tensor:
    return gramian.new_empty(gramian.shape[0], dtype=torch.float64)


# --- autograd -------------------------------------------------------------------------------------------------


refuse_vmap("gramian_weights", "call it once per Gramian")
