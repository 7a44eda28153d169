"""Find the code nearest to every vector: _nearest_code_kernel, _every_code_kernel, _codebook_kernel and their
launcher.

A code's score is z.c - ||c||^2 / 2; the largest wins. Tensor cores compute it from bfloat16 (or TF32) operands,
with an error of at most

    E_k = eps ||z|| ||c_k||,  eps = 2u + u^2 for the operands' rounding + (D + 16) 2^-22 for the accumulation

(Cauchy-Schwarz; u = 2^-8 for bfloat16, whose significand has 8 bits, 2^-10 for TF32, which the hardware
truncates; 0 where the operands are bfloat16 or float16 already). This first pass, the screening, therefore
keeps upper bounds, score + E_k: a code whose upper bound is below the exact score of another cannot win. Codes
are grouped into lanes: lane l holds every LANES-th code of a tile from the l-th on, PACK of them per tile. Per
row and lane, registers hold the largest upper bound, its tile, and the second largest bound. Afterwards each
row re-scores lanes in float64, largest bound first, until no bound exceeds the best exact score; Gaussian data
need only a few. A row for which a second largest bound, or a lane beyond the 16th, might still win is put on a
list, and a second launch scores it against every code in float64. So is a row whose magnitude is so small or
large that float32 could underflow or overflow. No N x K buffer is made, and nothing is read on the host.
"""

import torch
import triton
import triton.language as tl

from .autotune import Config, best  # noqa: TID251 (the same package, under its one name)
from .devices import on_device  # noqa: TID251

SCAN = {"BN": 16, "BK": 32, "BD": 8}  # the tile of _every_code_kernel


@triton.jit
def _offsets(row, stride_row, stride_position, inner, CHANNEL_FIRST: tl.constexpr):
    """Return the memory offset at which each row of z begins; in channel-first z, row = image * inner +
    position."""
    if CHANNEL_FIRST:
        image = row // inner
        return image * stride_row + (row - image * inner) * stride_position
    return row * stride_row


@triton.jit
def _codebook_kernel(
    codebook_ptr,  # [K, D]
    screen_ptr,  # [K, D] bfloat16 copy, where one is made
    half_ptr,  # [K] float64: ||c||^2 / 2; inf for a code that holds a NaN or an infinity
    base_ptr,  # [K] float32: the same, rounded down by more than any rounding it takes part in
    norm_ptr,  # [K] float32: ||c||, rounded up
    highest_ptr,  # [1] float32, zero at first: the largest norm
    K,
    D,
    COPY: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    total = tl.zeros([BK], tl.float64)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        at = k[:, None].to(tl.int64) * D + d[None, :]
        inside = (k[:, None] < K) & (d[None, :] < D)
        c = tl.load(codebook_ptr + at, mask=inside, other=0.0)
        if COPY:
            tl.store(screen_ptr + at, c.to(tl.float32).to(tl.bfloat16), mask=inside)
        total += tl.sum(_wide(c) * _wide(c), 1)
    finite = total < float("inf")  # false for a NaN
    half = tl.where(finite, total * 0.5, float("inf"))
    norm = tl.where(finite, tl.sqrt(total) * 1.000001, 0.0).to(tl.float32)
    tl.store(half_ptr + k, half, mask=k < K)
    tl.store(base_ptr + k, (half * 0.999999).to(tl.float32), mask=k < K)
    tl.store(norm_ptr + k, norm, mask=k < K)
    tl.atomic_max(highest_ptr, tl.max(tl.where(k < K, norm, 0.0), 0))


@triton.jit
def _load_rows(z_ptr, offset, valid, d, stride_d, D):
    inside = valid[:, None] & (d[None, :] < D)
    return tl.load(z_ptr + offset[:, None] + d[None, :].to(tl.int64) * stride_d, mask=inside, other=0.0)


@triton.jit
def _in_range(norm):
    """Return whether a norm lies in [2^-45, 2^45], where every product and every bound is a normal float32."""
    return (norm > 2.842170943040401e-14) & (norm < 35184372088832.0)


@triton.jit
def _wide(x):
    """Convert x to float64, by way of float32, since bfloat16 converts directly only to float32."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32).to(tl.float64)


@triton.jit
def _as_screened(x, SCREEN: tl.constexpr):
    if SCREEN == "bf16":
        return x.to(tl.float32).to(tl.bfloat16)
    elif SCREEN == "tf32":
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _products(
    z, z_ptr, offset, valid, stride_d, screen_ptr, k, K, D,
    SCREEN: tl.constexpr, ONE_TILE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Return the inner products z.c of a tile of vectors and codes, [BN, BK] float32.

    If D fits a tile (ONE_TILE), z is passed in registers or shared memory; otherwise it is read again.
    """
    acc = tl.zeros([BN, BK], tl.float32)
    row = k.to(tl.int64) * D
    if ONE_TILE:
        d = tl.arange(0, BD)
        c = tl.load(screen_ptr + row[None, :] + d[:, None], mask=(k[None, :] < K) & (d[:, None] < D), other=0.0)
        return tl.dot(z, _as_screened(c, SCREEN), acc, input_precision="tf32")
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        part = _as_screened(_load_rows(z_ptr, offset, valid, d, stride_d, D), SCREEN)
        c = tl.load(screen_ptr + row[None, :] + d[:, None], mask=(k[None, :] < K) & (d[:, None] < D), other=0.0)
        acc = tl.dot(part, _as_screened(c, SCREEN), acc, input_precision="tf32")
    return acc


@triton.jit
def _rescore(
    z_ptr, offset, active, stride_d, codebook_ptr, half_ptr, k, K, D,
    BN: tl.constexpr, PACK: tl.constexpr, DC: tl.constexpr,
):  # fmt: skip
    """Return the exact scores, in float64, of PACK codes k [BN, PACK] for each active row."""
    inside = active[:, None] & (k < K)
    score = tl.zeros([BN, PACK], tl.float64)
    for d0 in range(0, D, DC):
        d = d0 + tl.arange(0, DC)
        z = _wide(_load_rows(z_ptr, offset, active, d, stride_d, D))
        at = k[:, :, None].to(tl.int64) * D + d[None, None, :]
        c = tl.load(codebook_ptr + at, mask=inside[:, :, None] & (d < D)[None, None, :], other=0.0)
        score += tl.sum(z[:, None, :] * _wide(c), 2)
    half = tl.load(half_ptr + k, mask=inside, other=float("inf"))
    return tl.where(half < float("inf"), score - half, float("-inf"))


@triton.jit
def _nearest_code_kernel(
    z_ptr,
    screen_ptr,  # [K, D] what the tensor cores read
    codebook_ptr,  # [K, D]
    half_ptr,
    base_ptr,
    norm_ptr,
    highest_ptr,
    index_ptr,  # [N] int64
    list_ptr,  # [N] rows for _every_code_kernel
    count_ptr,  # [1] int32, zero at first
    N,
    K,
    D,
    inner,
    stride_row,
    stride_position,
    stride_d,
    eps,
    CHANNEL_FIRST: tl.constexpr,
    EXACT: tl.constexpr,
    SCREEN: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    PACK: tl.constexpr,
    DC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    valid = row < N
    offset = _offsets(row, stride_row, stride_position, inner, CHANNEL_FIRST)

    # A row's norm, rounded up, and whether it holds a NaN or an infinity.
    square = tl.zeros([BN], tl.float32)
    largest = tl.zeros([BN], tl.float32)
    finite = valid
    for d0 in range(0, D, BD):
        part = _load_rows(z_ptr, offset, valid, d0 + tl.arange(0, BD), stride_d, D)
        magnitude = tl.abs(part)
        finite = finite & (tl.sum((magnitude < float("inf")).to(tl.int32), 1) == BD)
        # The clamp keeps a float64 beyond float32's range in it: such a row goes on the list.
        wide = tl.minimum(magnitude, 1e30).to(tl.float32)
        square += tl.sum(wide * wide, 1)
        largest = tl.maximum(largest, tl.max(tl.where(magnitude > 0, tl.maximum(wide, 1e-37), 0.0), 1))
    norm = tl.sqrt(square) * 1.00001
    highest = tl.load(highest_ptr)
    in_range = _in_range(highest + tl.zeros([BN], tl.float32)) & ((largest == 0) | _in_range(norm))

    if ONE_TILE:
        z = _as_screened(_load_rows(z_ptr, offset, valid, tl.arange(0, BD), stride_d, D), SCREEN)
    else:
        z = 0

    LANES: tl.constexpr = BK // PACK
    top = tl.full([BN, LANES], float("-inf"), tl.float32)
    second = tl.full([BN, LANES], float("-inf"), tl.float32)
    tile = tl.zeros([BN, LANES], tl.int32)
    for t in range(0, tl.cdiv(K, BK)):
        k = t * BK + tl.arange(0, BK)
        base = tl.load(base_ptr + k, mask=k < K, other=float("inf"))
        upper = _products(
            z, z_ptr, offset, valid, stride_d, screen_ptr, k, K, D, SCREEN, ONE_TILE, BN, BK, BD
        )  # fmt: skip
        # Subtracted, not added: Triton turns a sum of a matrix product and something else into a product whose
        # accumulator begins as the something else. Tensor cores cut what lies 2^-24 below the accumulator: all
        # of the products, where codes are far longer than the row. E_k allows for cuts among products alone.
        if EXACT:
            # 2^-20 of the largest norm stands for what bfloat16 loses of subnormal elements.
            slope = eps * (tl.load(norm_ptr + k, mask=k < K, other=0.0) + highest * 9.5367431640625e-07)
            upper = upper - (base[None, :] - norm[:, None] * slope[None, :])
        else:
            upper = upper - base[None, :]
        # In the layouts of all GPU generations a thread holds every LANES-th column of its rows: no shuffle.
        grouped = tl.max(tl.reshape(upper, [BN, PACK, LANES]), 1)
        rises = grouped > top
        if EXACT:
            second = tl.maximum(second, tl.minimum(top, grouped))
        tile = tl.where(rises, t, tile)
        top = tl.maximum(top, grouped)

    lane = tl.arange(0, LANES)
    if not EXACT:
        # PACK is 1, so that a lane is a column, and its tile the first with that score.
        code = tl.where(top == tl.max(top, 1)[:, None], tile * BK + lane[None, :], 2147483647)
        index = tl.min(code, 1)
        tl.store(index_ptr + row, tl.where(finite & (index < K), index, 0).to(tl.int64), mask=valid)
        return

    best_score = tl.full([BN], float("-inf"), tl.float64)
    index = tl.zeros([BN], tl.int32)
    searched = finite & in_range
    members = tl.arange(0, PACK)
    going = 1
    steps = 0
    while (going > 0) & (steps < 16):
        bound = tl.max(top, 1)
        active = searched & (bound > float("-inf")) & (bound.to(tl.float64) >= best_score)
        here = lane[None, :] == tl.argmax(top, 1)[:, None]
        chosen = tl.sum(tl.where(here, tile * BK + lane[None, :], 0), 1)
        top = tl.where(here & active[:, None], float("-inf"), top)
        k = chosen[:, None] + members[None, :] * LANES
        score = _rescore(
            z_ptr, offset, active, stride_d, codebook_ptr, half_ptr, k, K, D, BN, PACK, DC
        )  # fmt: skip
        score = tl.where(active[:, None], score, float("-inf"))
        of_lane = tl.max(score, 1)
        winner = tl.min(tl.where(score == of_lane[:, None], k, 2147483647), 1)
        better = active & ((of_lane > best_score) | ((of_lane == best_score) & (winner < index)))
        best_score = tl.where(better, of_lane, best_score)
        index = tl.where(better, winner, index)
        going = tl.max(active.to(tl.int32), 0)
        steps += 1

    left = tl.maximum(tl.max(top, 1), tl.max(second, 1))
    # If every code holds a NaN or an infinity, all bounds stay at -inf, and the index is 0.
    undecided = finite & ((~in_range) | ((left > float("-inf")) & (left.to(tl.float64) >= best_score)))
    tl.store(index_ptr + row, tl.where(finite & (index < K), index, 0).to(tl.int64), mask=valid)
    place = tl.atomic_add(count_ptr + tl.zeros([BN], tl.int32), 1, mask=undecided)
    tl.store(list_ptr + place, row, mask=undecided)


@triton.jit
def _every_code_kernel(
    z_ptr,
    codebook_ptr,
    half_ptr,
    index_ptr,
    list_ptr,
    count_ptr,
    K,
    D,
    inner,
    stride_row,
    stride_position,
    stride_d,
    CHANNEL_FIRST: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Score the listed rows against every code in float64.

    The grid has a fixed size, so that the host need not read how many rows are on the list.
    """
    count = tl.load(count_ptr)
    for block in range(tl.program_id(0), tl.cdiv(count, BN), tl.num_programs(0)):
        at = block * BN + tl.arange(0, BN)
        valid = at < count
        row = tl.load(list_ptr + at, mask=valid, other=0).to(tl.int64)
        offset = _offsets(row, stride_row, stride_position, inner, CHANNEL_FIRST)
        best_score = tl.full([BN], float("-inf"), tl.float64)
        index = tl.zeros([BN], tl.int32)
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            score = tl.zeros([BN, BK], tl.float64)
            for d0 in range(0, D, BD):
                d = d0 + tl.arange(0, BD)
                z = _wide(_load_rows(z_ptr, offset, valid, d, stride_d, D))
                inside = (k[:, None] < K) & (d[None, :] < D)
                c = tl.load(codebook_ptr + k[:, None].to(tl.int64) * D + d[None, :], mask=inside, other=0.0)
                score += tl.sum(z[:, None, :] * _wide(c)[None, :, :], 2)
            half = tl.load(half_ptr + k, mask=k < K, other=float("inf"))
            score = tl.where((half < float("inf"))[None, :], score - half[None, :], float("-inf"))
            of_tile = tl.max(score, 1)
            winner = tl.min(tl.where(score == of_tile[:, None], k[None, :], 2147483647), 1)
            better = of_tile > best_score
            index = tl.where(better, winner, index)
            best_score = tl.where(better, of_tile, best_score)
        tl.store(index_ptr + row, index.to(tl.int64), mask=valid)


def candidates(D: int, exact: bool, capability: int, wide: bool = False) -> list[Config]:
    """Return the tile configurations worth timing, the likeliest first; all of them compile without register
    spills (tests/test_kernels_aot.py).

    Up to D = 128 a program keeps its vectors for the whole search. Above, it reads them again with every tile
    of codes, and the addresses of both operands compete for registers. The limit is D = 32 if operands are
    `wide` (loaded as float64 or multiplied as TF32), and before sm_80, where bfloat16 products run without
    tensor cores in the registers of single threads.
    """
    before_ampere = 0 < capability < 80
    held = 32 if (exact and wide) or before_ampere else 128
    depth = max(16, triton.next_power_of_2(D)) if held >= D else 32
    if before_ampere:
        tiles = [(32, 32, 2, 4, 1)]
    elif exact and wide:
        tiles = [(64, 64, 2, 8, 2)]
    elif held < D:
        tiles = [(64, 64, 2, 8, 3)] if exact else [(64, 64, 1, 8, 3)]
    elif not exact:
        tiles = [(128, 64, 1, 8, 3), (64, 64, 1, 8, 3)]
    elif capability >= 100 and D > 64 and D % 16:
        tiles = [(64, 64, 2, 4, 3)]
    elif capability < 100 and D % 16 == 0:
        tiles = [(128, 128, 4, 8, 3), (128, 64, 2, 8, 3)]
    else:
        tiles = [(128, 64, 2, 8, 3), (64, 64, 2, 4, 3)]
    return [
        {"BN": n, "BK": k, "BD": depth, "PACK": pack, "DC": 8, "num_warps": warps, "num_stages": stages}
        for n, k, pack, warps, stages in tiles
    ]


def capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def relative_bound(screen: str, D: int) -> float:
    """Return the factor eps of the error bound E_k in the module's docstring, enlarged for the rounding errors
    made in computing the bound itself."""
    u = {"bf16": 2.0**-8, "tf32": 2.0**-10, "as is": 0.0}[screen]
    return (2 * u + u * u) * 1.02 + (D + 16) * 2.0**-22 + 2.0**-19


def screening(dtype: torch.dtype, precision: str) -> str:
    """Return the precision in which codes are screened: "as is" for half-precision operands, else "bf16"
    (rounded) or "tf32" (truncated)."""
    if dtype in (torch.bfloat16, torch.float16):
        return "as is"
    return "tf32" if precision == "tf32" and dtype == torch.float32 else "bf16"


def is_wide(dtype: torch.dtype, screen: str) -> bool:
    return dtype == torch.float64 or screen == "tf32"


def layout(z: torch.Tensor) -> tuple[torch.Tensor, int, int, int, int, int]:
    """Return z with its spatial dimensions flattened, the number of vectors N, the positions per image, and the
    strides of row, position and dimension.

    z is [N, D] or channel-first [B, D, *spatial].
    """
    if z.ndim == 2:
        return z, z.shape[0], 1, z.stride(0), 0, z.stride(1)
    flat = z.flatten(2)  # a view wherever one stride walks the spatial dimensions, else a copy
    inner = flat.shape[2]
    return flat, flat.shape[0] * inner, inner, flat.stride(0), flat.stride(2), flat.stride(1)


def nearest_code(
    z: torch.Tensor,  # [N, D], any strides, or channel-first [B, D, *spatial]
    codebook: torch.Tensor,  # [K, D], of z's dtype
    exact: bool = True,
    precision: str = "bf16",  # or "tf32", how float32 is screened
    config: Config | None = None,
) -> torch.Tensor:  # [N] or [B, *spatial] int64
    """Return the index of the nearest code for each vector, the lowest on a tie; 0 for a vector that holds a
    NaN or an infinity.

    exact: True gives the answer of float64 scores, False that of the screening in bfloat16, float16 or TF32.
    config: the tile configuration; None takes the fastest one.

    Nothing is read on the host, except while a shape is tuned for the first time.
    """
    shape = (z.shape[0], *z.shape[2:])
    codebook = codebook.contiguous()
    (K, D), device = codebook.shape, z.device
    z, N, inner, *strides = layout(z)
    index = torch.empty(N, dtype=torch.int64, device=device)
    if N == 0:
        return index.view(shape)
    with on_device(z):
        screen = screening(z.dtype, precision)
        copied = torch.empty_like(codebook, dtype=torch.bfloat16) if screen == "bf16" else codebook
        half = torch.empty(K, dtype=torch.float64, device=device)
        base, norm = torch.empty(2, K, dtype=torch.float32, device=device).unbind()
        highest = torch.zeros(1, dtype=torch.float32, device=device)
        _codebook_kernel[(triton.cdiv(K, 32),)](
            codebook, copied, half, base, norm, highest, K, D, COPY=screen == "bf16",
            BK=32, BD=min(max(16, triton.next_power_of_2(D)), 64),
        )  # fmt: skip
        rows = torch.empty(N if exact else 0, dtype=torch.int32 if N < 2**31 else torch.int64, device=device)
        eps = relative_bound(screen, D)

        def screened(config: Config) -> torch.Tensor:
            count = torch.zeros(1, dtype=torch.int32, device=device)
            _nearest_code_kernel[(triton.cdiv(N, config["BN"]),)](
                z, copied, codebook, half, base, norm, highest, index, rows, count, N, K, D, inner,
                *strides, eps, CHANNEL_FIRST=z.ndim == 3, EXACT=exact, SCREEN=screen,
                ONE_TILE=config["BD"] >= D, **config,
            )  # fmt: skip
            return count

        if config is None:
            key = (triton.next_power_of_2(N), K, D, z.dtype, z.ndim, exact, screen)
            tiles = candidates(D, exact, capability(device), is_wide(z.dtype, screen))
            config = best("nearest_code", key, tiles, screened, z)
        count = screened(config)
        if exact:
            _every_code_kernel[(min(triton.cdiv(N, 16), 1024),)](
                z, codebook, half, index, rows, count, K, D, inner, *strides,
                CHANNEL_FIRST=z.ndim == 3, **SCAN, num_warps=4,
            )  # fmt: skip
    return index.view(shape)
