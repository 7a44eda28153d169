"""Gramians on which a projection can go wrong, and an independent judge of its answers."""

import mpmath
import numpy as np

FAMILIES = (
    "gaussian",
    "rank 1",
    "rank m/2",
    "zero row",
    "equal rows",
    "opposite rows",
    "near-parallel",
    "row norms 1e-6 to 1e6",
    "scales 1e-30 to 1e30",
    "stationary",
    "conflicting",
)


def jacobian(rng: np.random.Generator, family: str, m: int) -> np.ndarray:  # [m, P]
    P = max(2 * m, 8)
    J = rng.standard_normal((m, P))
    if family == "rank 1":
        J = rng.standard_normal((m, 1)) * rng.standard_normal((1, P))
    elif family == "rank m/2":
        J = rng.standard_normal((m, (m + 1) // 2)) @ rng.standard_normal(((m + 1) // 2, P))
    elif family == "zero row":
        J[rng.integers(m)] = 0
    elif family == "equal rows":
        J[0] = J[-1]
    elif family == "opposite rows" and m > 1:
        J[0] = -J[-1]
    elif family == "near-parallel":
        J = np.sign(rng.standard_normal((m, 1))) * rng.standard_normal((1, P)) + 1e-6 * J
    elif family == "row norms 1e-6 to 1e6":
        J *= 10.0 ** rng.uniform(-6, 6, (m, 1))
    elif family == "scales 1e-30 to 1e30":
        J *= 10.0 ** rng.uniform(-30, 30)
    elif family == "stationary":
        J -= J.mean(0)
    elif family == "conflicting":
        J -= 0.9 * J.mean(0)
    return J


def gramian(rng: np.random.Generator, family: str, m: int) -> np.ndarray:  # [m, m]
    J = jacobian(rng, family, m)
    G = J @ J.T
    return (G + G.T) / 2


def regularised(G: np.ndarray, norm_eps: float, reg_eps: float) -> np.ndarray:
    """What TorchJD solves: the Gramian over its trace (zero where that is below norm_eps), plus reg_eps I."""
    trace = sum(np.diagonal(G).tolist())  # in order, as the solver adds: the same A to the last bit
    scaled = np.zeros_like(G) if trace < norm_eps or trace == 0 else G / trace
    return scaled + reg_eps * np.eye(len(G))


def size(u: np.ndarray, v: np.ndarray) -> float:
    return float(max(np.abs(u).max(), np.abs(v).max()))


def kkt_residual(A: np.ndarray, u: np.ndarray, v: np.ndarray) -> float:
    """max |min(v - u, A v)| beside |v|: 0 at the solution of min v' A v, v >= u, and nowhere else.

    In extended precision, so that it measures v and not its own rounding.
    """
    y = A.astype(np.longdouble) @ v.astype(np.longdouble)
    return float(np.abs(np.minimum(v.astype(np.longdouble) - u, y)).max()) / size(u, v)


def solution(A: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray | None:
    """The exact solution with the support of v, in 50 digits; None if that support is not the solution's."""
    with mpmath.workdps(50):
        exact = mpmath.matrix(A.tolist())
        x = mpmath.matrix(u.tolist())
        support = [k for k in range(len(u)) if v[k] > u[k]]
        if support:
            right = -(exact * x)
            part = mpmath.matrix([[exact[i, j] for j in support] for i in support])
            for i, w in zip(
                support, mpmath.lu_solve(part, mpmath.matrix([right[i] for i in support])), strict=True
            ):
                x[i] += w
        y = exact * x
        # A y or w of zero is either side's: what a float64 A cannot tell is not counted.
        slack = 1e-15 * size(u, v)
        kept = all(x[k] - u[k] >= -slack for k in support)
        kept &= all(y[k] >= -slack * mpmath.sqrt(exact[k, k]) for k in range(len(u)) if k not in support)
        return np.array([float(value) for value in x]) if kept else None
