"""Define every op in plain torch.

These functions read like the papers and are the truth that tests and benchmarks compare the fast paths with.
They are differentiable where the op is, run on any device and in any floating dtype, and take no short cuts;
several build the buffers that the fast paths exist to avoid.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from movae_fast.choices import Regularizer

TCEstimator = Literal["mws", "mss"]
Method = Literal[
    "aligned_mtl_min", "aligned_mtl_median", "aligned_mtl_rmse", "cagrad", "imtl_g", "mgda", "pcgrad"
]


def nearest_code(
    z: Tensor,  # [N, D]
    codebook: Tensor,  # [K, D]
) -> Tensor:  # [N] int64
    """Return the index of the codeword nearest to each row in Euclidean distance; the lowest index on a
    tie.

    Scores are ||c||^2 / 2 - z.c: the ||z||^2 of the expanded square is the same for every code, and carrying
    it along loses the answer to rounding on small codebooks. A row that holds a NaN gets index 0.
    """
    scores = codebook.square().sum(1) / 2 - z @ codebook.T  # [N, K]
    return torch.where(z.isnan().any(1), 0, scores.argmin(1))


def quantize(
    z: Tensor,  # [N, D]
    codebook: Tensor,  # [K, D]
    index: Tensor | None = None,  # [N] int64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the forward pass of a vector-quantisation layer (van den Oord et al. 2017, eq. 1-2).

    Returns z_q [N, D], the chosen codes; index [N] int64 (the given one, else the nearest code's); sq_err [N] =
    ||z - z_q||^2; count [K], how many rows chose each code; and code_sum [K, D], the sum of the rows that chose
    each code, which an exponential moving average of the codebook needs.
    """
    index = nearest_code(z, codebook) if index is None else index
    z_q = codebook[index]
    sq_err = code_error(z, codebook, index)
    count = torch.zeros(codebook.shape[0], dtype=z.dtype, device=z.device).index_add_(
        0, index, torch.ones_like(z[:, 0])
    )
    code_sum = torch.zeros_like(codebook).index_add_(0, index, z.to(codebook.dtype))
    return z_q, index, sq_err, count, code_sum


def gramian(
    rows: Tensor,  # [m, P]
) -> Tensor:  # [m, m] float64
    """Return the inner products of a Jacobian's rows, accumulated in float64 whatever the dtype of the
    rows."""
    rows = rows.double()
    return rows @ rows.T


def combine(
    rows: Tensor,  # [m, P]
    weights: Tensor,  # [m]
) -> Tensor:  # [P]
    """Return the weighted sum of a Jacobian's rows, in the rows' dtype."""
    return weights.to(rows.dtype) @ rows


def regularized_gramian(
    gramian: Tensor,  # [m, m]
    regularizer: Regularizer,
    norm_eps: float,
    reg_eps: float,
) -> tuple[Tensor, Tensor]:  # [m, m], [m]
    """Return the matrix A [m, m] with which UPGrad projects, and the scales S [m] of its rows and columns.

    "trace" (TorchJD): A = G / tr G + reg_eps I, with zero for G / tr G where tr G < norm_eps; the scales are 1.
    "diagonal": A = S (G + reg_eps diag(G)) S with S = diag(G)^(-1/2), which is the correlation matrix plus
    reg_eps I. Rescaling a Jacobian row changes only S, just as it leaves the cone { v : G v >= 0 } unchanged.
    For a row of norm zero, A has the row and column of the identity, and the scale is 1.
    """
    diagonal = gramian.diagonal()
    eye = torch.eye(len(gramian), dtype=gramian.dtype, device=gramian.device)
    if regularizer == "trace":
        trace = diagonal.sum()
        usable = trace >= max(norm_eps, torch.finfo(gramian.dtype).tiny)
        return torch.where(usable, gramian / trace, 0.0) + reg_eps * eye, torch.ones_like(diagonal)
    some = diagonal >= torch.finfo(gramian.dtype).tiny
    scales = torch.where(some, diagonal, 1.0).rsqrt()
    correlation = torch.where(some[:, None] & some, scales[:, None] * gramian * scales, 0.0)
    correlation = torch.where(eye > 0, some.to(gramian.dtype), correlation)
    return torch.where((eye > 0) & ~some, 1.0, correlation + reg_eps * eye * correlation), scales


def complementary(
    matrix: Tensor,  # [m, m]
    offset: Tensor,  # [m]
) -> Tensor:  # [m]
    """Solve a linear complementarity problem: return the w >= 0 [m] with y = A w + q >= 0 and w_i y_i = 0 for
    all i.

    `matrix` is A, symmetric positive definite; `offset` is q. The method is principal pivoting (Judice & Pires
    1994): all entries of the wrong sign change sides at once as long as their number falls, else only the one
    of greatest index, which cannot cycle (Murty 1974). A sign counts as wrong only beyond the rounding error
    that the condition of A implies. Raises ArithmeticError if no solution is reached.
    """
    m = len(offset)
    values = torch.linalg.eigvalsh(matrix)
    condition = float(values[-1] / values[0].clamp_min(values[-1] * 1e-16))
    of_w, of_y = 2e-16 * m * condition, 2e-16 * m * math.sqrt(condition)
    inside = torch.zeros(m, dtype=torch.bool)
    least, patience = m + 1, 3
    for _ in range(100 * m + 100):
        w = torch.zeros_like(offset)
        if bool(inside.any()):
            solved = torch.linalg.lstsq(matrix[inside][:, inside], -offset[inside, None], driver="gelsd")
            w[inside] = solved.solution[:, 0]
        terms = torch.cat([matrix * w, offset[:, None]], 1)
        y, size = terms.sum(1), terms.abs().sum(1)
        wrong = torch.where(inside, w < -of_w * w.abs().max(), y < -of_y * size)
        count = int(wrong.sum())
        if count == 0:
            return w.clamp_min(0)
        if count < least:
            least, patience = count, 3
        else:
            patience -= 1
        if patience >= 0:
            inside = inside ^ wrong
        else:
            inside[wrong.nonzero().max()] ^= True
    raise ArithmeticError(f"complementary: no solution found for a matrix of condition {condition:.1g}")


def project_rows(
    u: Tensor,  # [rows, m]
    gramian: Tensor,  # [m, m]
    norm_eps: float,
    reg_eps: float,
    regularizer: Regularizer,
) -> Tensor:  # [rows, m]
    """Return, for each row of u, the v that minimises v' A v subject to v >= u (Quinton & Rey 2024, eq. 5).

    A is the regularized Gramian. This is the dual of projecting the weighted sum of gradients, with weights u,
    onto the dual cone.
    """
    matrix, scales = regularized_gramian(gramian, regularizer, norm_eps, reg_eps)
    least = [x / scales for x in u]
    return torch.stack([scales * (x + complementary(matrix, matrix @ x)) for x in least])


def project_weights(
    gramian: Tensor,  # [m, m]
    pref: Tensor,  # [m]
    norm_eps: float,
    reg_eps: float,
    regularizer: Regularizer,
) -> Tensor:  # [m]
    """Return UPGrad's weights (Quinton & Rey 2024, section 3): each objective's gradient, times its preference,
    is projected onto the dual cone on its own, and the results are added."""
    return project_rows(pref.clamp_min(0).diag(), gramian, norm_eps, reg_eps, regularizer).sum(0)


def step_multipliers(
    gramian: Tensor,  # [m, m] J D J'
    slopes: Tensor,  # [m] J s
    reg_eps: float,
) -> Tensor:  # [m]
    """Return the multipliers lambda >= 0 [m] for which s + D J' lambda is the step closest to s that worsens no
    objective.

    Distance is measured in the inverse of the metric D: min (x - s)' D^-1 (x - s) subject to J x >= 0, whose
    dual is min 1/2 lambda' J D J' lambda + lambda' J s over lambda >= 0. `gramian` is J D J', `slopes` is J s.
    """
    matrix, scales = regularized_gramian(gramian, "diagonal", 0.0, reg_eps)
    return scales * complementary(matrix, scales * slopes)


def pcgrad(
    gramian: Tensor,  # [m, m]
    order: Tensor,  # [m, m] int64
) -> Tensor:  # [m]
    """Return the weights of gradient surgery (PCGrad, Yu et al. 2020, algorithm 1).

    Gradient i is projected against the other gradients in the order given by `order[i]`, a permutation of the
    objectives' numbers.
    """
    weights = torch.eye(len(gramian), dtype=gramian.dtype, device=gramian.device)
    for i, met in enumerate(order.tolist()):
        for j in met:
            inner = gramian[j] @ weights[i]
            if j != i and inner < 0:
                weights[i, j] -= inner / gramian[j, j]
    return weights.sum(0)


def gramian_weights(
    gramian: Tensor,  # [m, m]
    method: Method,
    pref: Tensor | None = None,  # [m]
    order: Tensor | None = None,  # [m, m] int64
    *,
    c: float = 0.5,
    norm_eps: float = 1e-4,
    epsilon: float = 1e-3,
    max_iters: int = 100,
) -> Tensor:  # [m]
    """Return the weights of an aggregator that needs the Gramian alone, as TorchJD's own classes compute them.

    They serve as the definition of Aligned-MTL (Senushkin et al. 2023), CAGrad (Liu et al. 2021), IMTL-G (Liu
    et al. 2021) and MGDA (Sener & Koltun 2018). PCGrad is written out in `pcgrad`, since TorchJD's class draws
    its order at random. Arguments by method: `pref` for Aligned-MTL, `order` for PCGrad, `c` and `norm_eps` for
    CAGrad, `epsilon` and `max_iters` for MGDA.
    """
    import torchjd.aggregation as jd  # the other functions here do without TorchJD

    if method == "pcgrad":
        assert order is not None
        return pcgrad(gramian, order)
    if method == "cagrad":
        weighting = jd.CAGradWeighting(c, norm_eps=norm_eps)
    elif method == "imtl_g":
        weighting = jd.IMTLGWeighting()
    elif method == "mgda":
        weighting = jd.MGDAWeighting(epsilon, max_iters)
    else:
        pref = None if pref is None else pref.to(gramian.dtype)
        weighting = jd.AlignedMTLWeighting(pref, scale_mode=method.removeprefix("aligned_mtl_"))
    return weighting(gramian).detach()


def gaussian_log_density(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
) -> Tensor:
    """Return log N(z; mu, exp(logvar)) elementwise, in nats."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu).square() * torch.exp(-logvar))


def log_importance_weights(
    batch: int,
    n_data: int,
    estimator: TCEstimator,
    like: Tensor,
) -> Tensor:  # [B, B]
    """Return log W[i, j], the weight of posterior q(.|x_j) in the estimate of q(z_i) (Chen et al. 2018,
    appendix C).

    With a batch of M and a training set of N examples (`n_data`):

    "mws", minibatch-weighted sampling: 1 / (N M) everywhere, biased.
    "mss", minibatch-stratified sampling: 1/N for the example itself, (N - M + 1) / (N (M - 1)) for one other
        fixed position, 1 / (M - 1) elsewhere; each row sums to one, unbiased.

    Published code that fills a column instead of the diagonal gives the example's own posterior the wrong
    weight in every row but the first.

    Raises ValueError for "mss" with a batch of 1. `like` sets dtype and device.
    """
    if estimator == "mws":
        return torch.full((batch, batch), -math.log(n_data * batch), dtype=like.dtype, device=like.device)
    if batch < 2:
        raise ValueError("minibatch-stratified sampling needs a batch of at least 2")
    weights = torch.full((batch, batch), 1 / (batch - 1), dtype=like.dtype, device=like.device)
    position = torch.arange(batch, device=like.device)
    weights[position, (position + 1) % batch] = (n_data - batch + 1) / (n_data * (batch - 1))
    weights[position, position] = 1 / n_data
    return weights.log()


def tc_terms(
    z: Tensor,  # [B, D] samples of the posteriors
    mu: Tensor,  # [B, D]
    logvar: Tensor,  # [B, D]
    n_data: int,
    estimator: TCEstimator = "mws",
) -> tuple[Tensor, Tensor]:  # [B], [B]
    """Return log q(z_i) and sum_d log q(z_id) of the aggregate posterior, in nats (Chen et al. 2018, eq.
    S3-S6).

    With log q(z|x) and log p(z) they give the parts of the KL: mutual information E[log q(z|x) - log q(z)],
    total correlation E[log q(z) - sum_d log q(z_d)] and dimension-wise KL E[sum_d log q(z_d) - log p(z)].
    """
    log_q = gaussian_log_density(z[:, None], mu[None], logvar[None])  # [B, B, D]
    log_w = log_importance_weights(len(z), n_data, estimator, like=z)  # [B, B]
    log_q_z = torch.logsumexp(log_q.sum(2) + log_w, dim=1)
    log_prod_q_z = torch.logsumexp(log_q + log_w[:, :, None], dim=1).sum(1)
    return log_q_z, log_prod_q_z


def code_error(
    z: Tensor,  # [N, D]
    codebook: Tensor,  # [K, D]
    index: Tensor,  # [N] int64
) -> Tensor:  # [N]
    """Return ||z - codebook[index]||^2 [N], differentiable with respect to both z and the codebook."""
    return (z - codebook[index]).square().sum(1)


def straight_through(
    z: Tensor,  # [N, D]
    z_q: Tensor,  # [N, D]
) -> Tensor:  # [N, D]
    """Return z_q, with its gradient passed to z unchanged (van den Oord et al. 2017, section 3.2)."""
    return z + (z_q - z).detach()


def rotation_trick(
    z: Tensor,  # [N, D]
    z_q: Tensor,  # [N, D]
) -> Tensor:  # [N, D]
    """Return z_q, computed as z times a rotation and a scale through which no gradient flows, so that z
    receives the gradient of z_q rotated back and rescaled (Fifty et al. 2024).

    With e = z / |z|, q = z_q / |z_q| and r = (e + q) / |e + q|: z_q = |z_q| / |z| (I - 2 r r' + 2 q e') z.
    """
    length_z, length_q = z.norm(dim=1, keepdim=True).detach(), z_q.norm(dim=1, keepdim=True).detach()
    e, q = z.detach() / length_z, z_q.detach() / length_q
    r = torch.nn.functional.normalize(e + q, dim=1)
    turned = z - 2 * (z * r).sum(1, keepdim=True) * r + 2 * (z * e).sum(1, keepdim=True) * q
    return length_q / length_z * turned


def linear_cross_entropy(
    hidden: Tensor,  # [B, T, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [B, T] int64
    sample_weight: Tensor | None = None,  # [B]
    ignored: int = 0,
) -> tuple[Tensor, Tensor]:  # [], [B]
    """Return the cross-entropy of softmax(hidden weight') in nats: its sum over the batch, and that of each
    sentence [B].

    A sentence's cross-entropy is the sum over those tokens whose target is not `ignored`. In the batch's sum
    sentence b counts `sample_weight[b]` times. The values by sentence carry no gradient.
    """
    log_p = torch.log_softmax(hidden @ weight.T, dim=2)  # [B, T, V]
    kept = target != ignored
    right = log_p.gather(2, torch.where(kept, target, 0)[:, :, None])[:, :, 0]
    losses = -torch.where(kept, right, 0.0).sum(1)
    counted = losses if sample_weight is None else losses * sample_weight.to(losses)
    return counted.sum(), losses.detach()


def norm_swish(
    y: Tensor,  # [B, C, h, w]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    gate: Tensor | None = None,  # [B, C] or [1, C]
    eps: float = 1e-5,
    swish: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, C, h, w], [C], [C]
    """Return x sigmoid(x), or without `swish` x; and mean and var.

    x = weight (z - mean) / sqrt(var + eps) + bias with z = gate y; mean and biased variance are those of a
    channel over the batch and the pixels.
    """
    z = y if gate is None else y * gate[:, :, None, None]
    var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    per_channel = (slice(None), None, None)
    x = (z - mean[per_channel]) / (var[per_channel] + eps).sqrt() * weight[per_channel] + bias[per_channel]
    return x * torch.sigmoid(x) if swish else x, mean.detach(), var.detach()
