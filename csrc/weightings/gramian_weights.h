// Weights of a Jacobian's rows from their Gramian alone, in float64: Aligned-MTL, CAGrad, IMTL-G, MGDA and PCGrad.
//
// One source for host and device: a Team is one thread, or the threads of a warp, which run the same decisions on the
// same numbers and share the writing of vectors. Between a write and another thread's read, and between a read and the
// next write of the same place, lies a sync. Every loop has a last iteration that depends on m alone.
#pragma once

#include <math.h>

#include <cstdint>

#include "common/team.h"

namespace movae {

enum class Method { kAlignedMin, kAlignedMedian, kAlignedRmse, kCagrad, kImtlG, kMgda, kPcgrad };

struct WeightingTask {
    Method method;
    int m;
    const double* G;       // [m, m], symmetric
    const double* pref;    // [m] for Aligned-MTL; null is 1/m each
    const int64_t* order;  // [m, m] for PCGrad: row i is a permutation, in which the other rows are met
    double a, b;           // CAGrad: c and norm_eps; MGDA: epsilon
    int64_t iterations;    // MGDA: the most
    double* out;           // [m]
};

namespace weightings {

constexpr int kSweeps = 40;  // Jacobi's convergence is quadratic: at most 9 were taken at m = 8, 13 at m = 32

// Doubles of scratch: two matrices and eight vectors.
MOVAE_HD int64_t scratch_size(int m) { return int64_t(2) * m * m + int64_t(8) * m; }

// Eigenvalues on A's diagonal and eigenvectors in the rows of E, by cyclic Jacobi rotations. A is scaled beforehand.
// A pair is turned until its cosine is rounding, not until its product is small beside the largest eigenvalue: the
// small eigenvalues of rows of very different lengths keep their digits (Demmel and Veselic 1992).
template <class Team>
MOVAE_HD void eigen(const Team& team, double* A, double* E, int m) {
    for (int i = team.rank(); i < m * m; i += team.size()) E[i] = i / m == i % m;
    team.sync();
    for (int sweep = 0; sweep < kSweeps; ++sweep) {
        bool turned = false;
        for (int p = 0; p < m; ++p)
            for (int q = p + 1; q < m; ++q) {
                const double app = A[p * m + p], aqq = A[q * m + q], apq = A[p * m + q];
                if (!(magnitude(apq) > kEps * sqrt(magnitude(app)) * sqrt(magnitude(aqq)))) continue;
                turned = true;
                const double theta = (aqq - app) / (2 * apq), root = magnitude(theta) + sqrt(1 + theta * theta);
                const double t = theta < 0 ? -1 / root : 1 / root, c = 1 / sqrt(1 + t * t), s = t * c;
                team.sync();
                for (int k = team.rank(); k < m; k += team.size()) {
                    const double ep = E[p * m + k], eq = E[q * m + k];
                    E[p * m + k] = c * ep - s * eq, E[q * m + k] = s * ep + c * eq;
                    if (k == p) {  // one thread alone writes each place
                        A[p * m + p] = app - t * apq, A[p * m + q] = A[q * m + p] = 0;
                        continue;
                    }
                    if (k == q) {
                        A[q * m + q] = aqq + t * apq;
                        continue;
                    }
                    const double ap = A[p * m + k], aq = A[q * m + k];
                    A[p * m + k] = A[k * m + p] = c * ap - s * aq;
                    A[q * m + k] = A[k * m + q] = s * ap + c * aq;
                }
                team.sync();
            }
        if (!turned) return;
    }
}

// A = G / scale, the scale a power of two, so that nothing overflows and no digit is lost; 0 for a zero Gramian.
template <class Team>
MOVAE_HD double scaled(const Team& team, const double* G, int m, double* A) {
    double most = 0;
    for (int i = 0; i < m; ++i) most = G[i * m + i] > most ? G[i * m + i] : most;
    int exponent;
    frexp(most, &exponent);
    exponent += exponent & 1;  // even: the root of the scale is a power of two, too
    for (int i = team.rank(); i < m * m; i += team.size()) A[i] = ldexp(G[i], -exponent);
    team.sync();
    return most > 0 ? ldexp(1.0, exponent) : 0;
}

template <class Team>
MOVAE_HD void fill(const Team& team, double* out, int m, double value) {
    for (int i = team.rank(); i < m; i += team.size()) out[i] = value;
    team.sync();
}

// Senushkin et al. 2023, algorithm 1: w = sqrt(scale) V L^-1/2 V' pref over the eigenvalues that are not rounding.
template <class Team>
MOVAE_HD void aligned_mtl(const Team& team, const WeightingTask& task, double* scratch) {
    const int m = task.m;
    double *A = scratch, *E = A + m * m, *factor = E + m * m;
    const double share = 1.0 / m;
    if (scaled(team, task.G, m, A) > 0) eigen(team, A, E, m);
    double most = 0;
    for (int k = 0; k < m; ++k) most = A[k * m + k] > most ? A[k * m + k] : most;
    const double tolerance = most * m * kEps;
    int rank = 0;
    double least = most, sum = 0, median = 0;
    for (int k = 0; k < m; ++k) {
        const double value = A[k * m + k];
        if (!(value > tolerance)) continue;
        ++rank, sum += value;
        least = value < least ? value : least;
    }
    if (rank == 0) {
        for (int i = team.rank(); i < m; i += team.size()) task.out[i] = task.pref ? task.pref[i] : share;
        team.sync();
        return;
    }
    for (int k = 0; k < m; ++k) {  // the lower one of an even number, as torch.median has it
        const double value = A[k * m + k];
        int below = 0;
        for (int j = 0; j < m; ++j) {
            const double other = A[j * m + j];
            below += other > tolerance && (other < value || (other == value && j < k));
        }
        if (value > tolerance && below == (rank - 1) / 2) median = value;
    }
    const double scale = task.method == Method::kAlignedMin ? least : task.method == Method::kAlignedRmse ? sum / rank : median;
    for (int k = team.rank(); k < m; k += team.size()) {
        double inner = 0;
        for (int i = 0; i < m; ++i) inner += E[k * m + i] * (task.pref ? task.pref[i] : share);
        factor[k] = A[k * m + k] > tolerance ? sqrt(scale / A[k * m + k]) * inner : 0;
    }
    team.sync();
    for (int i = team.rank(); i < m; i += team.size()) {
        double total = 0;
        for (int k = 0; k < m; ++k) total += factor[k] * E[k * m + i];
        task.out[i] = total;
    }
    team.sync();
}

// Liu et al. 2021, as TorchJD generalises it: w = pinv(G) sqrt(diag G) over its sum; 0 where that sum is below 1e-12.
template <class Team>
MOVAE_HD void imtl_g(const Team& team, const WeightingTask& task, double* scratch) {
    const int m = task.m;
    double *A = scratch, *E = A + m * m, *factor = E + m * m, *lengths = factor + m;
    const double scale = scaled(team, task.G, m, A);
    if (scale == 0) return fill(team, task.out, m, 0);
    for (int i = team.rank(); i < m; i += team.size()) lengths[i] = sqrt(A[i * m + i]);
    team.sync();
    eigen(team, A, E, m);
    double most = 0;
    for (int k = 0; k < m; ++k) most = magnitude(A[k * m + k]) > most ? magnitude(A[k * m + k]) : most;
    for (int k = team.rank(); k < m; k += team.size()) {
        double inner = 0;
        for (int i = 0; i < m; ++i) inner += E[k * m + i] * lengths[i];
        factor[k] = magnitude(A[k * m + k]) > m * kEps * most ? inner / A[k * m + k] : 0;  // pinv's own cut-off
    }
    team.sync();
    for (int i = team.rank(); i < m; i += team.size()) {
        double total = 0;
        for (int k = 0; k < m; ++k) total += factor[k] * E[k * m + i];
        lengths[i] = total;
    }
    team.sync();
    double sum = 0;
    for (int i = 0; i < m; ++i) sum += lengths[i];
    const bool none = magnitude(sum) / sqrt(scale) < 1e-12;
    for (int i = team.rank(); i < m; i += team.size()) task.out[i] = none ? 0 : lengths[i] / sum;
    team.sync();
}

// Frank and Wolfe's steps towards the shortest vector of the rows' hull (Sener and Koltun 2018, algorithm 2).
template <class Team>
MOVAE_HD void mgda(const Team& team, const WeightingTask& task, double* scratch) {
    const int m = task.m;
    double *alpha = task.out, *inner = scratch;
    fill(team, alpha, m, 1.0 / m);
    for (int64_t iteration = 0; iteration < task.iterations; ++iteration) {
        for (int i = team.rank(); i < m; i += team.size()) {
            double sum = 0;
            for (int j = 0; j < m; ++j) sum += task.G[i * m + j] * alpha[j];
            inner[i] = sum;
        }
        team.sync();
        int t = 0;
        double b = 0;
        for (int i = 0; i < m; ++i) {
            t = inner[i] < inner[t] ? i : t;
            b += alpha[i] * inner[i];
        }
        const double a = inner[t], c = task.G[t * m + t];
        const double gamma = c <= a ? 1 : b <= a ? 0 : (b - a) / (b + c - 2 * a);
        team.sync();
        for (int i = team.rank(); i < m; i += team.size()) alpha[i] = (1 - gamma) * alpha[i] + (i == t ? gamma : 0);
        team.sync();
        if (gamma < task.a) return;
    }
}

// Yu et al. 2020, algorithm 1: each row gives up what opposes the others, met in a random order, and all are added.
template <class Team>
MOVAE_HD void pcgrad(const Team& team, const WeightingTask& task, double* scratch) {
    const int m = task.m;
    for (int i = team.rank(); i < m; i += team.size()) {
        double* own = scratch + i * m;
        for (int k = 0; k < m; ++k) own[k] = k == i;
        for (int k = 0; k < m; ++k) {
            const int64_t met = task.order[i * m + k];
            if (met < 0 || met >= m) {  // the host refuses it; a device can only say so in the weights
                own[i] = NAN;
                continue;
            }
            const int j = static_cast<int>(met);
            if (j == i) continue;
            double inner = 0;
            for (int l = 0; l < m; ++l) inner += task.G[j * m + l] * own[l];
            if (inner < 0) own[j] -= inner / task.G[j * m + j];
        }
    }
    team.sync();
    for (int k = team.rank(); k < m; k += team.size()) {
        double sum = 0;
        for (int i = 0; i < m; ++i) sum += scratch[i * m + k];
        task.out[k] = sum;
    }
    team.sync();
}

// min x' A x / 2 - r' x subject to x >= 0, for A of unit diagonal (Lawson and Hanson 1974), by one thread.
struct NonNegative {
    int m;
    double *A, *L;          // [m, m] both; L the Cholesky factor of the support's block
    double *r, *x, *z, *p;  // [m]
    double* place;          // [m] the support's indices
    int count = 0;

    MOVAE_HD int at(int k) const { return static_cast<int>(place[k]); }
    MOVAE_HD void factorise() {
        for (int i = 0; i < count; ++i)
            for (int j = 0; j <= i; ++j) {
                double sum = A[at(i) * m + at(j)];
                for (int k = 0; k < j; ++k) sum -= L[i * m + k] * L[j * m + k];
                L[i * m + j] = i == j ? sqrt(sum > kEps ? sum : kEps) : sum / L[j * m + j];
            }
    }
    // y = A_SS^-1 y in the support's order.
    MOVAE_HD void solve_support(double* y) const {
        for (int i = 0; i < count; ++i) {
            for (int k = 0; k < i; ++k) y[i] -= L[i * m + k] * y[k];
            y[i] /= L[i * m + i];
        }
        for (int i = count - 1; i >= 0; --i) {
            for (int k = i + 1; k < count; ++k) y[i] -= L[k * m + i] * y[k];
            y[i] /= L[i * m + i];
        }
    }
    MOVAE_HD bool inside(int i) const {
        for (int k = 0; k < count; ++k)
            if (at(k) == i) return true;
        return false;
    }
    MOVAE_HD void remove(int k) {
        x[at(k)] = 0;
        for (--count; k < count; ++k) place[k] = place[k + 1];
    }
    MOVAE_HD void solve() {
        count = 0;
        for (int i = 0; i < m; ++i) x[i] = 0;
        int refused = -1;  // an index that rounding let in and that came out at once
        for (int round = 0; round < 3 * m + 32; ++round) {
            int best = -1;
            double most = 0;
            for (int i = 0; i < m; ++i) {
                if (i == refused || inside(i)) continue;
                double slack = r[i], size = magnitude(r[i]);
                for (int k = 0; k < count; ++k) {
                    const double term = A[i * m + at(k)] * x[at(k)];
                    slack -= term, size += magnitude(term);
                }
                if (slack > most && slack > 4 * m * kEps * size) most = slack, best = i;
            }
            if (best < 0) return;
            place[count++] = best;
            refused = -1;
            while (count > 0) {
                factorise();
                for (int k = 0; k < count; ++k) z[k] = r[at(k)];
                solve_support(z);
                double step = 1;
                int leaving = -1;
                for (int k = 0; k < count; ++k) {
                    if (z[k] > 0) continue;
                    const double here = x[at(k)], way = here > 0 ? here / (here - z[k]) : 0;
                    if (leaving < 0 || way < step) step = way, leaving = k;
                }
                for (int k = 0; k < count; ++k) x[at(k)] += step * (z[k] - x[at(k)]);
                if (leaving < 0) break;
                if (at(leaving) == best) refused = best;
                remove(leaving);
            }
        }
    }
};

// The larger root of a x^2 - 2 b x + c; NaN if there is none.
MOVAE_HD double root_of(double a, double b, double c) { return (b + sqrt(b * b - a * c)) / a; }

// Liu et al. 2021, algorithm 1: the update d within c |g0| of the mean g0 whose least inner product with a row is largest.
//
// That product is the level l for which the shortest change of g0 that brings every row's product to l has the length
// phi = c |g0|. For a given l the change is x' J, x >= 0 of min x' G x / 2 - (l - G u)' x; its length grows with l, and on
// one support it is known in closed form. So the level is found by going from support to support (Newton's method on a
// convex function, kept in a bracket), which ends, with the solution itself. One thread; the Gramian is over its trace.
MOVAE_HD void cagrad(const WeightingTask& task, double* scratch) {
    const int m = task.m;
    const double c = task.a, norm_eps = task.b, *G = task.G;
    double* v = scratch + 2 * m * m;
    NonNegative problem{m, scratch, scratch + m * m, v, v + m, v + 2 * m, v + 3 * m, v + 4 * m};
    double *b = v + 5 * m, *length = v + 6 * m, *q = v + 7 * m, *p = problem.p;
    for (int i = 0; i < m; ++i) task.out[i] = 0;
    double trace = 0, mean = 0, most = 0;
    for (int i = 0; i < m; ++i) trace += G[i * m + i], most = G[i * m + i] > most ? G[i * m + i] : most;
    if (!(trace > 0) || trace < norm_eps) return;
    for (int i = 0; i < m; ++i) {
        b[i] = 0;
        for (int j = 0; j < m; ++j) b[i] += G[i * m + j] / trace / m;
        mean += b[i] / m;
    }
    if (!(mean > 4 * m * kEps)) return;  // the mean is zero as far as the Gramian can tell: nothing to improve on
    const double g0 = sqrt(mean), phi = c * g0;
    double low = b[0], high = mean + phi * g0;
    int least = 0;
    for (int i = 0; i < m; ++i) {
        length[i] = sqrt(G[i * m + i] / trace);
        if (b[i] < low) low = b[i], least = i;
        if (length[i] * (g0 + phi) < high) high = length[i] * (g0 + phi);
    }
    if (phi == 0) {  // the mean itself, unless the row that it helps least is zero
        for (int i = 0; i < m; ++i) task.out[i] = length[least] >= norm_eps ? 1.0 / m : 0;
        return;
    }
    for (int i = 0; i < m; ++i) {  // rows of unit length; those of length zero ask for nothing, and have no unit
        length[i] = length[i] > 0 ? length[i] : 1;
        b[i] /= length[i];
    }
    const double ridge = 16 * m * kEps;  // what rounding leaves of a singular matrix is no longer negative
    for (int i = 0; i < m; ++i)
        for (int j = 0; j < m; ++j) problem.A[i * m + j] = G[i * m + j] / trace / length[i] / length[j] + (i == j ? ridge : 0);
    double level = high, polished = high;
    for (int round = 0; round < 200; ++round) {
        for (int i = 0; i < m; ++i) problem.r[i] = level / length[i] - b[i];
        problem.solve();
        double square = 0, pp = 0, pq = 0, qq = 0, rp = 0, rq = 0, sq = 0;
        for (int k = 0; k < problem.count; ++k) {
            const int i = problem.at(k);
            square += problem.r[i] * problem.x[i];
            p[k] = 1 / length[i], q[k] = b[i];
        }
        // A row of zeros keeps the level from rising above 0: where all the others reach it with less than phi, that
        // row is the worst off, and the hull holds zero.
        if (round == 0 && high == 0 && square <= phi * phi) return;
        (square > phi * phi ? high : low) = level;
        problem.solve_support(p);
        problem.solve_support(q);
        for (int k = 0; k < problem.count; ++k) {  // x = level p - q on this support, and x' A x = phi^2
            const int i = problem.at(k);
            pp += p[k] / length[i], pq += p[k] * b[i], qq += q[k] * b[i];
            rp += ridge * p[k] * p[k], rq += ridge * p[k] * q[k], sq += ridge * q[k] * q[k];
        }
        // The ridge keeps the length growing where a level is out of reach, and is left out of it at the end.
        polished = root_of(pp - rp, pq - rq, qq - sq - phi * phi);
        double next = root_of(pp, pq, qq - phi * phi);
        if (next == level) break;
        if (!(next > low && next < high)) next = low + (high - low) / 2;
        if (!(next > low && next < high)) break;
        level = next;
    }
    if (magnitude(polished - level) <= 1e-6 * magnitude(level))
        for (int k = 0; k < problem.count; ++k) {
            const double value = polished * p[k] - q[k];
            problem.x[problem.at(k)] = value > 0 ? value : 0;
        }
    double total = 0, square = 0;
    for (int i = 0; i < m; ++i) total += problem.x[i] /= length[i];
    for (int i = 0; i < m; ++i)
        for (int j = 0; j < m; ++j) square += problem.x[i] * (G[i * m + j] / trace) * problem.x[j];
    const double reached = sqrt(square > 0 ? square : 0);
    if (!(total > 0) || !(reached > 0) || reached / total < norm_eps) return;  // the hull all but holds zero
    for (int i = 0; i < m; ++i) task.out[i] = 1.0 / m + phi / reached * problem.x[i];
}

// NaN weights for a Gramian or a preference with a NaN or an infinity.
template <class Team>
MOVAE_HD void weigh(const Team& team, const WeightingTask& task, double* scratch) {
    const int m = task.m;
    double total = 0;  // not finite as soon as one term is not: x - x is NaN for an infinite x
    for (int i = 0; i < m * m; ++i) total += task.G[i] - task.G[i];
    for (int i = 0; task.pref && i < m; ++i) total += task.pref[i] - task.pref[i];
    if (!(total == 0)) return fill(team, task.out, m, total);
    switch (task.method) {
        case Method::kCagrad:
            if (team.rank() == 0) cagrad(task, scratch);
            return team.sync();
        case Method::kImtlG: return imtl_g(team, task, scratch);
        case Method::kMgda: return mgda(team, task, scratch);
        case Method::kPcgrad: return pcgrad(team, task, scratch);
        default: return aligned_mtl(team, task, scratch);
    }
}

}  // namespace weightings
}  // namespace movae
