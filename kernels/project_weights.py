"""Project weights onto the dual cone of a Jacobian's rows, exactly, in float64: `project` and `upgrad`.

A problem is min v' A v subject to v >= u over the regularised Gramian A. With v = u + w it means: find w >= 0
with y = A w + q >= 0 and w_i y_i = 0, where q is A u, or, for the multipliers of a step, given. The method is
that of csrc/projection/solver.h, whose comments give the reasons for every tolerance. The tableau T is that of
principal pivoting: on the support (where w > 0 and y = 0) it holds -inv(A_SS), outside it the Schur complement,
so that one index enters or leaves the support by one update of rank one. The tableau only finds the support.
The solution is then refined against the original A, with residuals in twice the precision, and if the refined
solution disagrees with the tableau about the support, the solution is believed.

All functions work on R problems side by side that share one A: matrices are [R, M, M] and vectors [R, M], where
M is m padded to a power of two. `project` has R = 1 and as many programs as problems.

Every kernel must be launched with enable_fp_fusion=False: a fused multiply-add in place of a product and a sum
would make the rounding errors that the refinement computes wrong.
"""

import torch
import triton
import triton.language as tl

from .devices import on_device  # noqa: TID251 (the same package, under its one name)
from .gramian import _load, tile  # noqa: TID251

ULP = tl.constexpr(2.220446049250313e-16)
LARGEST = tl.constexpr(1.7976931348623157e308)
SMALLEST = tl.constexpr(2.2250738585072014e-308)  # of the normal numbers
PATIENCE = tl.constexpr(3)  # exchanges per row before answers are always refined; after twice as many: Murty
SUM, ROWS, MULTIPLIERS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MODES = {"sum": SUM.value, "rows": ROWS.value, "multipliers": MULTIPLIERS.value}

MOST_ROWS = 64
# Up to this m `upgrad` solves in the program that finishes the Gramian, all problems side by side: they are 8 x
# 8 x 8 numbers, a few per thread. The 16 x 16 x 16 numbers of 16 rows already spill registers. Four problems at
# a time do not, but take four times as long as sixteen programs of a second launch, and that launch costs less
# than one such problem.
MOST_FUSED = 8
# Limits on the registers per thread. Without one ptxas chooses fewer and spills a few indices.
REGISTERS, ALL_REGISTERS = 168, 255
# Most programs among which `upgrad` divides the columns: three of them fit one multiprocessor with 168
# registers per thread, so that on an H100 all of these run at once.
PROGRAMS = 384
# Programs of a group: its last program adds up their results, and the last program of all adds up the groups'.
SPAN = 16


@triton.jit
def _any(flags):
    """Return whether any of the flags [R] is set, as a scalar integer that Triton's `if` and `while` accept."""
    return tl.max(flags.to(tl.int32), 0)


@triton.jit
def _power(x):
    """Return the largest power of two that is not above |x| (0 for a number below the normal ones)."""
    return (x.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)


@triton.jit
def _inverse_power(x):
    """Return 1 / _power(x), exact and without a division. Divisions in a loop make ptxas spill."""
    bits = 0x7FE0000000000000 - (x.to(tl.int64, bitcast=True) & 0x7FF0000000000000)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def _regularised(gramian_ptr, m, norm_eps, reg_eps, DIAGONAL: tl.constexpr, M: tl.constexpr):
    """Return the regularised Gramian A [1, M, M] with zeros in the padding, the scales [1, M] of its rows, and
    whether the Gramian is finite."""
    i = tl.arange(0, M)[None, :, None]
    j = tl.arange(0, M)[None, None, :]
    low, high = tl.minimum(i, j), tl.maximum(i, j)  # only the upper triangle is read
    G = tl.load(gramian_ptr + low * m + high, mask=high < m, other=0.0)
    finite = tl.min(tl.min(tl.min((tl.abs(G) <= LARGEST).to(tl.int32), 2), 1), 0) > 0
    if DIAGONAL:
        diagonal = tl.sum(tl.where(i == j, G, 0.0), 2)
        zero = diagonal < SMALLEST  # the padding, too
        # s is 2^k with G_ii s^2 in [1/4, 1): k is half of -1 - the exponent, rounded down.
        exponent = (diagonal.to(tl.int64, bitcast=True) >> 52) - 1023
        power = (((-1 - exponent) >> 1) + 1023) << 52
        scale = tl.where(zero, 1.0, power.to(tl.float64, bitcast=True))
        # Multiply by the larger scale first: |G_ij| <= sqrt(G_ii G_jj), so no product overflows, and one
        # underflows only if the final result does.
        down, across = scale[:, :, None], scale[:, None, :]
        A = (G * tl.maximum(down, across)) * tl.minimum(down, across)
        A = tl.where(i == j, A + reg_eps * A, A)
        # A row of norm zero keeps its preference and touches no other row.
        none = zero[:, :, None] | zero[:, None, :]
        A = tl.where(none, tl.where((i == j) & (high < m), 1.0, 0.0), A)
    else:
        # In order, as csrc/projection/solver.h adds: the same A to the last bit.
        trace = tl.full([], 0, tl.float64)
        for k in tl.static_range(M):
            trace += tl.load(gramian_ptr + k * (m + 1), mask=k < m, other=0.0)
        finite = finite & (trace <= LARGEST)
        zero = (trace < norm_eps) | (trace < SMALLEST)
        A = tl.where(zero, 0.0, G / tl.where(zero, 1.0, trace))
        A = tl.where((i == j) & (high < m), A + reg_eps, A)
        scale = tl.full([1, M], 1, tl.float64)
    return A, scale, finite


@triton.jit
def _multiply(A, v, b):
    """Return y = A v + b [R, M], with each sum in twice the precision, and |A| |v| + |b| [R, M].

    The second result bounds the rounding: y is exact to a few units in the last place of it, and the signs of y
    are to be judged against it.

    The products' errors are computed as Dekker does. Their sum is split in two (Rump, Ogita & Oishi 2008):
    added to a power of two that is larger than all of a row's products together, a product loses its low
    digits; the high parts then add up without any rounding, in whatever order a reduction adds, and the low
    digits are added separately.
    """
    M: tl.constexpr = A.shape[2]
    x = v[:, None, :]
    p = A * x
    split = 134217729.0 * A
    a_high = split - (split - A)
    a_low = A - a_high
    split = 134217729.0 * v
    v_high = split - (split - v)
    v_low = v - v_high
    x_high, x_low = v_high[:, None, :], v_low[:, None, :]
    error = ((a_high * x_high - p) + a_high * x_low + a_low * x_high) + a_low * x_low
    top = tl.max(tl.abs(p), 2)
    above = (_power(top) * (4 * M))[:, :, None]
    coarse = (above + p) - above
    high = tl.sum(coarse, 2)
    low = tl.sum((p - coarse) + error, 2)
    y = high + b
    part = y - high
    low += (high - (y - part)) + (b - part)
    return y + low, tl.sum(tl.abs(p), 2) + tl.abs(b)


@triton.jit
def _solve(A, u, b, allowed, active, m):
    """Solve R complementarity problems that share A: return v [R, M], and which problems [R] reached their
    solution.

    A [1, M, M]; u [R, M], the lower bound of v; b [R, M], which is added to A v; `allowed` [R, M]: the indices
    that may be in the support; `active` [R]: the problems to solve (the others return v = u).
    """
    R: tl.constexpr = u.shape[0]
    M: tl.constexpr = u.shape[1]
    index = tl.arange(0, M)[None, :]
    eye = tl.arange(0, M)[None, :, None] == tl.arange(0, M)[None, None, :]
    diagonal = tl.sum(tl.where(eye, A, 0.0), 2)
    gain = 1 / tl.where(diagonal > 0, diagonal, 1.0)  # the scale of a violation outside the support
    largest_b = tl.max(tl.abs(b), 1)
    limit = 10 * m + 64

    q, sums = _multiply(A, u, b)
    T = A + tl.zeros([R, M, M], tl.float64)
    z = q  # w on the support, y elsewhere
    v = u
    inside = tl.zeros([R, M], tl.int32) > 0  # the support
    barred = inside  # rows that depend on the support's, as an unregularised A allows
    todo = inside  # what is still to enter a tableau that is being rebuilt
    nowhere = tl.zeros([R], tl.int32) > 0
    running, refined, rebuilding, tight, solved = active, nowhere, nowhere, nowhere, nowhere
    exchanges = tl.zeros([R], tl.int32)
    going = _any(running)
    while going > 0:
        # The index to exchange, M for none. Signs of a refined v are trusted up to rounding (those of y
        # relative to the terms of its sum), signs from the tableau up to 1e-12. The largest violation is taken
        # first and, should that take too long, the violation of least index, which cannot cycle (Murty 1974).
        size = tl.max(tl.maximum(tl.abs(u), tl.where(inside, tl.abs(z + u), 0.0)), 1)
        least_w = tl.where(refined, size * (-16 * ULP), size * -1e-12)
        least_y = tl.where(
            refined[:, None], sums * (-4 * ULP), (tl.maximum(size, largest_b) * (-8 * ULP))[:, None]
        )
        violated = (z < tl.where(inside, least_w[:, None], least_y)) & allowed & (barred == 0)
        score = tl.where(violated, -z * tl.where(inside, 1.0, gain), 0.0)
        first = (exchanges >= m * (2 * PATIENCE))[:, None] | (score == tl.max(score, 1)[:, None])
        worst = tl.min(tl.where(violated & first, index, M), 1)
        k = tl.where(rebuilding, tl.min(tl.where(todo, index, M), 1), worst)
        # After many exchanges the tableau is inaccurate: every answer is refined before it is judged.
        late = (rebuilding == 0) & (exchanges >= m * PATIENCE)
        settling = running & (refined == 0) & (late | (k == M))
        done = running & refined & ((worst == M) | (exchanges >= limit))
        solved = solved | (done & (worst == M) & tight)
        running = running & (done == 0)
        moving = running & (settling == 0)

        if _any(settling) > 0:
            # Solve for v on the present support from the original A, by iterative refinement to full precision.
            v = tl.where(settling[:, None], tl.where(inside, z + u, u), v)
            y = z
            correcting = settling
            before = tl.full([R], 1, tl.float64)
            change_at_first = tl.zeros([R], tl.float64)
            rounds = tl.full([], 0, tl.int32)
            more = tl.full([], 1, tl.int32)
            while more > 0:
                y_next, sums_next = _multiply(A, v, b)
                wrong = tl.where(inside, y_next, 0.0)
                v_next = v + tl.where(inside, tl.sum(T * wrong[:, None, :], 2), 0.0)
                step = v_next - v
                y_next += tl.sum(A * step[:, None, :], 2)
                # How large the change is beside v, within a factor of two.
                change = tl.max(tl.abs(step), 1) * _inverse_power(tl.max(tl.abs(v_next), 1))
                v = tl.where(correcting[:, None], v_next, v)
                y = tl.where(correcting[:, None], y_next, y)
                sums = tl.where(correcting[:, None], sums_next, sums)
                change_at_first = tl.where(rounds == 0, change, change_at_first)
                # The relative error of a correction is about its ratio to the one before (of the first: to v).
                rounds += 1
                correcting = correcting & (change < 0.5 * before) & (change * change > before * (0.5 * ULP))
                correcting = correcting & (rounds < 12)
                before = change
                more = _any(correcting)
            poor = settling & (rebuilding == 0) & ((change_at_first <= 1e-8) == 0)
            good = settling & (poor == 0)
            z = tl.where(good[:, None], tl.where(inside, v - u, y), z)
            # Solved means: y is zero on the support up to the rounding of v, and y >= 0 for the rows that may
            # not enter (where A is singular and multipliers are wanted, there may be no solution).
            excess = tl.where(inside, tl.abs(y) - sums * (8 * ULP), tl.where(barred, -y - sums * 1e-6, 0.0))
            excess = tl.max(excess, 1)
            tight = tl.where(good, excess <= 0, tight)
            refined = refined | good
            # A tableau that was correct to fewer than half its digits is rebuilt from A, index by index.
            again = poor[:, None]
            todo = tl.where(again, inside, todo)
            T = tl.where(again[:, :, None], A, T)
            z = tl.where(again, q, z)
            inside = inside & (again == 0)
            barred = barred & (again == 0)
            rebuilding = (rebuilding | poor) & (good == 0)

        if _any(moving) > 0:
            at = (index == k[:, None]) & moving[:, None]
            column = tl.sum(tl.where(at[:, None, :], T, 0.0), 2)
            pivot = tl.sum(tl.where(at, column, 0.0), 1)
            own = tl.sum(tl.where(at, diagonal, 0.0), 1)
            leaving = tl.max((at & inside).to(tl.int32), 1) > 0
            moves = moving & (leaving | (pivot > own * (4 * ULP) * m))
            hit = at & moves[:, None]
            # On the support the column has the other sign; the row and column of k itself become column /
            # |pivot| and -1 / pivot, for which +-1 in the place of the pivot and zeros in T's do.
            vector = tl.where(at, tl.where(leaving, 1.0, -1.0)[:, None], column)
            factor = tl.where(moves, 1 / tl.where(moves, pivot, 1.0), 0.0)
            T = tl.where(hit[:, :, None] | hit[:, None, :], 0.0, T)
            T -= (vector[:, :, None] * vector[:, None, :]) * factor[:, None, None]
            step = -tl.sum(tl.where(hit, z, 0.0), 1) * tl.abs(factor)
            z = tl.where(hit, step[:, None], z + tl.where(inside, -column, column) * step[:, None])
            barred = barred | (at & (moves == 0)[:, None])
            inside = inside != hit
            todo = todo & (at == 0)
            exchanges += (moving & (rebuilding == 0)).to(tl.int32)
            refined = refined & (moving == 0)

        going = _any(running)
    return tl.maximum(v, u), solved


@triton.jit
def _answers(
    A,  # [1, M, M]
    scale,  # [1, M]
    finite,
    given_ptr,  # [rows] preferences, or [rows, m]
    r,  # [R] problems, all that are not below `rows` are none
    rows,
    m,
    MODE: tl.constexpr,
    M: tl.constexpr,
):
    """Return the solutions of problems r [R, M] in the units of the original Gramian, and how many of them were
    not solved."""
    R: tl.constexpr = r.shape[0]
    index = tl.arange(0, M)[None, :]
    live = r < rows
    none = tl.zeros([R, M], tl.float64)
    allowed = (index < m) & live[:, None]
    if MODE == SUM:
        x = tl.load(given_ptr + r, mask=live, other=0.0)
        own = index == r[:, None]
        u, b = tl.where(own, 1.0, none), none
        # v_r = 1 exactly: were it larger, y_r = 0 and with it v' A v = 0.
        allowed = allowed & (own == 0)
        known = (x <= LARGEST) & finite
        asked = x > 0
        of_own = tl.sum(tl.where(own & live[:, None], scale, 0.0), 1)
        unit = scale * _inverse_power(tl.where(live, of_own, 1.0))[:, None]
    else:
        at = r[:, None].to(tl.int64) * m + index
        x = tl.load(given_ptr + at, mask=allowed, other=0.0)
        known = (tl.min((tl.abs(x) <= LARGEST).to(tl.int32), 1) > 0) & finite
        unit = scale + none
        if MODE == ROWS:
            u, b = x * _inverse_power(scale), none
            asked = tl.max(x, 1) > 0  # otherwise v = 0 is the solution
        else:
            u, b = none, x * scale
            asked = live
    active = live & known & asked
    u = tl.where(active[:, None], u, 0.0)
    b = tl.where(active[:, None], b, 0.0)
    v, solved = _solve(A, u, b, allowed, active, m)
    result = tl.where(active[:, None], unit * v, 0.0)
    if MODE == SUM:
        # A preference of zero or less adds nothing, not even minus infinity.
        result = tl.where(active[:, None], x[:, None] * result, 0.0)
    result = tl.where(known[:, None], result, float("nan"))
    return result, tl.sum((active & (solved == 0)).to(tl.int32), 0)


@triton.jit
def _add_up(each_ptr, out_ptr, rows, m, M: tl.constexpr):
    """Write the sum of the rows of each_ptr [rows, m] to out_ptr [m], added in the rows' order.

    All loads are issued before the first addition.
    """
    index = tl.arange(0, M)
    total = tl.zeros([M], tl.float64)
    for r in tl.static_range(M):
        inside = (index < m) & (r < rows)
        total += tl.load(each_ptr + r * m + index, mask=inside, other=0.0, cache_modifier=".cg")
    tl.store(out_ptr + index, total, mask=index < m)


@triton.jit
def _arrive(counter_ptr):
    """Increment a counter for this program and return how many programs came before; what they wrote is visible
    afterwards.

    Only one thread of the program increments the counter; the barriers make the others wait.
    """
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return before


@triton.jit
def _project_kernel(
    gramian_ptr,  # [m, m]
    given_ptr,  # [m] preferences, or [rows, m]
    each_ptr,  # [rows, m]
    out_ptr,  # [m] if the mode is "sum"
    status_ptr,  # [2] zeros: the status, and how many programs are done
    m,
    rows,
    norm_eps: tl.float64,
    reg_eps: tl.float64,
    MODE: tl.constexpr,
    DIAGONAL: tl.constexpr,
    M: tl.constexpr,
):
    A, scale, finite = _regularised(gramian_ptr, m, norm_eps, reg_eps, DIAGONAL, M)
    r = tl.program_id(0) + tl.zeros([1], tl.int32)
    result, unfinished = _answers(A, scale, finite, given_ptr, r, rows, m, MODE, M)
    index = tl.arange(0, M)[None, :]
    at = r[:, None].to(tl.int64) * m + index
    tl.store(each_ptr + at, result, mask=(r < rows)[:, None] & (index < m))
    if finite:
        tl.atomic_add(status_ptr, unfinished)
    else:
        tl.store(status_ptr, -1)
    if MODE == SUM:  # noqa: SIM102 (the compiler knows this, and not the next)
        if _arrive(status_ptr + 1) == rows - 1:
            _add_up(each_ptr, out_ptr, rows, m, M)


@triton.jit
def _partial_gramian(rows_ptr, part_ptr, m, P, stride, PRODUCT: tl.constexpr, S: tl.constexpr, B: tl.constexpr):
    """Write the Gramian of this program's columns to part_ptr, computed as in kernels/gramian.py.

    The multiply-adds are written as tl.fma, since automatic fusion is turned off in these kernels.
    """
    i = tl.arange(0, S)
    first = tl.program_id(0).to(tl.int64) * B
    step = tl.num_programs(0).to(tl.int64) * B
    if PRODUCT:
        total = tl.zeros([S, S], tl.float64)
        for start in range(first, P, step):
            for column in range(start, start + B):
                left = _load(rows_ptr, stride, i[:, None], column, m, P)
                right = _load(rows_ptr, stride, i[None, :], column, m, P)
                left, right = tl.broadcast(left, right)
                total = tl.fma(left, right, total)
    else:
        lanes = tl.zeros([S, S, B], tl.float64)
        for start in range(first, P, step):
            column = start + tl.arange(0, B)[None, None, :]
            left = _load(rows_ptr, stride, i[:, None, None], column, m, P)
            right = _load(rows_ptr, stride, i[None, :, None], column, m, P)
            left, right = tl.broadcast(left, right)
            lanes = tl.fma(left, right, lanes)
        total = tl.sum(lanes, 2)
    at = tl.program_id(0) * m * m + i[:, None] * m + i[None, :]
    tl.store(part_ptr + at, total, mask=(i[:, None] < m) & (i[None, :] < m))


@triton.jit
def _sum_of_parts(part_ptr, step, count, m, Q: tl.constexpr, M: tl.constexpr):
    """Return the sum [M, M] of `count` matrices [m, m] that lie `step` numbers apart, added in a fixed order, Q
    at a time."""
    i = tl.arange(0, M)[None, :, None]
    j = tl.arange(0, M)[None, None, :]
    part = tl.arange(0, Q)[:, None, None]
    lanes = tl.zeros([Q, M, M], tl.float64)
    for start in range(0, count, Q):
        inside = (start + part < count) & (i < m) & (j < m)
        at = (start + part) * step + i * m + j
        lanes += tl.load(part_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(lanes, 0)


@triton.jit
def _upgrad_kernel(
    rows_ptr,  # [m, P], columns contiguous
    given_ptr,  # [problems] preferences, or [problems, m]
    part_ptr,  # [programs + groups, m, m]
    gramian_ptr,  # [m, m]
    each_ptr,  # [problems, m]
    out_ptr,  # [m] if the mode is "sum"
    status_ptr,  # []
    counter_ptr,  # [1 + groups] zeros
    m,
    P,
    stride,
    problems,
    norm_eps: tl.float64,
    reg_eps: tl.float64,
    PRODUCT: tl.constexpr,
    S: tl.constexpr,
    B: tl.constexpr,
    SPAN: tl.constexpr,
    Q: tl.constexpr,
    SOLVE: tl.constexpr,
    MODE: tl.constexpr,
    DIAGONAL: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
):
    _partial_gramian(rows_ptr, part_ptr, m, P, stride, PRODUCT, S, B)
    programs = tl.num_programs(0)
    group = tl.program_id(0) // SPAN
    members = tl.minimum(SPAN, programs - group * SPAN)
    groups = tl.cdiv(programs, SPAN)
    i, j = tl.arange(0, M)[:, None], tl.arange(0, M)[None, :]
    inside = (i < m) & (j < m)
    if _arrive(counter_ptr + 1 + group) != members - 1:
        return
    total = _sum_of_parts(part_ptr + group * SPAN * m * m, m * m, members, m, Q, M)
    tl.store(part_ptr + (programs + group) * m * m + i * m + j, total, mask=inside)
    if _arrive(counter_ptr) != groups - 1:
        return
    total = _sum_of_parts(part_ptr + programs * m * m, m * m, groups, m, Q, M)
    tl.store(gramian_ptr + i * m + j, total, mask=inside)
    if SOLVE:
        tl.debug_barrier()  # threads read what other threads of the program wrote
        A, scale, finite = _regularised(gramian_ptr, m, norm_eps, reg_eps, DIAGONAL, M)
        r = tl.arange(0, R)
        result, unfinished = _answers(A, scale, finite, given_ptr, r, problems, m, MODE, M)
        index = tl.arange(0, M)[None, :]
        tl.store(each_ptr + r[:, None] * m + index, result, mask=(r < problems)[:, None] & (index < m))
        tl.store(status_ptr, tl.where(finite, unfinished, -1))
        if MODE == SUM:
            tl.debug_barrier()
            _add_up(each_ptr, out_ptr, problems, m, M)


def padded(m: int) -> int:
    """Return M, the power of two that m is padded to, at least 8: smaller problems run the code for eight rows,
    which costs them nothing."""
    return max(8, triton.next_power_of_2(m))


def warps(M: int) -> int:
    """Return the number of warps of a program that solves one problem of size M, such that a thread holds 2 to
    16 entries of a matrix."""
    return {8: 1, 16: 4, 32: 4, 64: 8}[M]


def project(
    gramian: torch.Tensor,  # [m, m]
    given: torch.Tensor,  # [m] preferences if the mode is "sum", else [rows, m]
    norm_eps: float,
    reg_eps: float,
    mode: str,
    diagonal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # as `given`, float64; [] int32
    """Solve one problem per program, in one launch.

    mode: "sum" solves for v >= e_r for every r and adds the solutions weighted by the preferences given (by the
        last program to finish); "rows" solves for v >= u for each row u given; "multipliers" minimises l' A l /
        2 + l' b over l >= 0 for each row b given.
    diagonal: regularise each row by its own norm (reg_eps times it) instead of by the trace.

    Returns the solutions, and the number of problems that were not solved (-1 if the Gramian is not finite).
    """
    m = gramian.shape[0]
    gramian, given = gramian.double().contiguous(), given.double().contiguous()
    total, problems = mode == "sum", given.numel() // m if mode != "sum" else m
    out = torch.empty_like(given)
    each = out.new_empty(m, m) if total else out
    status = torch.zeros(2, dtype=torch.int32, device=given.device)
    M = padded(m)
    with on_device(given):
        _project_kernel[(max(1, problems),)](
            gramian, given, each, out, status, m, problems, float(norm_eps), float(reg_eps),
            MODE=MODES[mode], DIAGONAL=diagonal, M=M, num_warps=warps(M), maxnreg=ALL_REGISTERS,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out, status[0]


def layout(m: int, problems: int) -> dict[str, int | bool]:
    """Return the compile-time constants and launch options of `_upgrad_kernel` for m rows and a number of
    problems."""
    tiling, M = tile(m), padded(m)
    solve = max(m, problems) <= MOST_FUSED
    return {
        "PRODUCT": tiling["PRODUCT"],
        "S": tiling["M"],
        "B": tiling["B"],
        "SPAN": SPAN,
        "Q": min(SPAN, max(1, 4096 // (M * M))),
        "SOLVE": solve,
        "R": triton.next_power_of_2(max(1, problems)) if solve else 1,
        "M": M,
        "num_warps": 4 if M <= 8 else 8,
        "maxnreg": REGISTERS,
    }


def upgrad(
    rows: torch.Tensor,  # [m, P], any floating dtype
    pref: torch.Tensor,  # [m], or [problems, m] unless the mode is "sum"
    norm_eps: float,
    reg_eps: float,
    mode: str,
    diagonal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # as `pref`, float64; [m, m] float64; [] int32
    """Compute the Gramian of the rows and solve the problems of `project` with it; up to 8 rows, all in one
    launch.

    Each program computes the Gramian of its part of the columns; the number of programs depends on the shape
    alone. The last of every 16 programs to finish adds up their Gramians, and the last of all adds up those
    sums, so that no program reads more than a few dozen matrices, and the order of the additions is always the
    same.

    Returns the solutions, the Gramian, and the status of `project`.
    """
    m, P = rows.shape
    if P == 0 or rows.stride(1) != 1:
        rows = rows.contiguous()
    given = pref.double().contiguous()
    total, problems = mode == "sum", given.numel() // m if mode != "sum" else m
    constants = layout(m, problems)
    programs = max(1, min(PROGRAMS, triton.cdiv(P, constants["B"])))
    groups = triton.cdiv(programs, SPAN)
    gramian = torch.empty(m, m, dtype=torch.float64, device=rows.device)
    part = gramian.new_empty(programs + groups, m, m)
    out = torch.empty_like(given)
    each = out.new_empty(problems, m) if total else out
    status = torch.empty((), dtype=torch.int32, device=rows.device)
    counters = torch.zeros(1 + groups, dtype=torch.int32, device=rows.device)
    with on_device(rows):
        _upgrad_kernel[(programs,)](
            rows, given, part, gramian, each, out, status, counters, m, P, rows.stride(0), problems,
            float(norm_eps), float(reg_eps), MODE=MODES[mode], DIAGONAL=diagonal, **constants,
            enable_fp_fusion=False,
        )  # fmt: skip
    if not constants["SOLVE"]:
        # See MOST_FUSED for why this is a launch of its own.
        out, status = project(gramian, given, norm_eps, reg_eps, mode, diagonal)
    return out, gramian, status
