// The inner loops of tc_terms for one instruction set, with vectors of MOVAE_VECTOR_BYTES (common/every_isa.h).
// Nothing here may instantiate a std template: one compiled for AVX-512 could be the copy that the linker keeps.

#include "common/vectors.h"

// Running log-sum-exp in double: `s` is a sum of exp(x - m), merged with the part seen so far.
MOVAE_INLINE void merge(double& m_all, double& s_all, double m, double s) {
    if (m > m_all) {
        s_all = s_all * __builtin_exp(m_all - m) + s;
        m_all = m;
    } else if (m_all == -__builtin_inf()) {
        s_all += s;  // nothing finite yet: 0, or a NaN that must not be lost
    } else {
        s_all += s * __builtin_exp(m - m_all);
    }
}

// Largest value and sum of exp(x - largest) (of 0 where nothing is above -inf) over x[0:n].
template <class T, bool kWeighted>
MOVAE_INLINE void sum_exp(const T* x, const T* w, int64_t n, Vec<T> top, double& m_all, double& s_all) {
    constexpr int W = sizeof(Vec<T>) / sizeof(T);
    T m = top[0];
    for (int k = 1; k < W; ++k) m = top[k] > m ? top[k] : m;
    const T shift = m == -T(__builtin_inf()) ? T(0) : m;
    Vec<T> s0 = {}, s1 = {};  // two chains hide the addition's latency; rows are padded to pairs of vectors
    for (int64_t j = 0; j < n; j += 2 * W) {
        Vec<T> e0 = vexp(load(x + j) - shift), e1 = vexp(load(x + j + W) - shift);
        if (kWeighted) {
            e0 *= load(w + j);
            e1 *= load(w + j + W);
        }
        s0 += e0;
        s1 += e1;
    }
    double s = 0;
    for (int k = 0; k < W; ++k) s += double(s0[k]) + double(s1[k]);
    merge(m_all, s_all, m, s);
}

template <class T, bool kWeighted>
static void forward_rows(const Problem<T>& p, int64_t begin, int64_t end, T* scratch) {
    constexpr int W = sizeof(Vec<T>) / sizeof(T);
    const T ninf = -T(__builtin_inf());
    T *l = scratch, *joint = l + kForwardBlock, *w = joint + kForwardBlock;
    double* running = reinterpret_cast<double*>(w + kForwardBlock);  // (max, sum) of each dimension, then of the joint
    for (int64_t j = 0; kWeighted && j < kForwardBlock; ++j) w[j] = 1;
    for (int64_t i = begin; i < end; ++i) {
        for (int64_t d = 0; d <= p.dims; ++d) running[2 * d] = -__builtin_inf(), running[2 * d + 1] = 0;
        for (int64_t j0 = 0; j0 < p.padded; j0 += kForwardBlock) {
            const int64_t n = p.padded - j0 < kForwardBlock ? p.padded - j0 : kForwardBlock;
            if (kWeighted) p.set_weights(w, i, j0, n);
            for (int64_t d = 0; d < p.dims; ++d) {
                const T *mu = p.mu + d * p.padded + j0, *niv = p.niv + d * p.padded + j0, *c = p.c + d * p.padded + j0;
                const T z = p.z[i * p.dims + d];
                Vec<T> top = Vec<T>{} + ninf;
                for (int64_t j = 0; j < n; j += W) {
                    const Vec<T> diff = z - load(mu + j);
                    const Vec<T> v = (diff * diff) * load(niv + j) + load(c + j);
                    store(joint + j, d ? load(joint + j) + v : v);
                    store(l + j, v);
                    top = v > top ? v : top;
                }
                sum_exp<T, kWeighted>(l, w, n, top, running[2 * d], running[2 * d + 1]);
            }
            Vec<T> top = Vec<T>{} + ninf;
            for (int64_t j = 0; j < n; j += W) {
                const Vec<T> v = load(joint + j);
                top = v > top ? v : top;
            }
            sum_exp<T, kWeighted>(joint, w, n, top, running[2 * p.dims], running[2 * p.dims + 1]);
            if (kWeighted) p.clear_weights(w, i, j0, n);
        }
        double product = 0;
        for (int64_t d = 0; d < p.dims; ++d) {
            product += running[2 * d] + __builtin_log(running[2 * d + 1]) + p.log_w;
        }
        p.log_prod_q_z[i] = T(product);
        p.log_q_z[i] = T(running[2 * p.dims] + __builtin_log(running[2 * p.dims + 1]) + p.log_w);
        for (int64_t d = 0; d <= p.dims; ++d) {
            p.top[i * (p.dims + 1) + d] = T(running[2 * d]);
            p.total[i * (p.dims + 1) + d] = T(running[2 * d + 1]);
        }
    }
}

// One block of posteriors j against all samples i. The weight of l_ijd in the loss is
//     r = g1_i / total_i exp(sum_d l_ijd - top_i) + g2_i / total_id exp(l_ijd - top_id),
// both exponentials times W_ij; the rest is the derivative of a Gaussian's log density. The maxima and sums are the forward's:
// l is computed here by the same operations, so that l - top is exact where it matters; with log q, rounded at its own
// magnitude, in the place of top, the error is several times larger.
template <class T, bool kWeighted>
static void backward_block(const Problem<T>& p, const TcGradients<T>& g, int64_t j0, int64_t n, double* grad_z, T* scratch) {
    constexpr int W = sizeof(Vec<T>) / sizeof(T);
    const int64_t D = p.dims;
    T *joint = scratch, *w = joint + n, *part_mu = w + n, *part_lv = part_mu + D * n;
    double *sum_mu = reinterpret_cast<double*>(part_lv + D * n), *sum_lv = sum_mu + D * n;
    for (int64_t k = 0; k < D * n; ++k) sum_mu[k] = sum_lv[k] = 0;
    for (int64_t j = 0; kWeighted && j < n; ++j) w[j] = 1;
    // Sums over i are taken in T over 64 samples and in double over those parts: the error does not grow with B.
    for (int64_t i0 = 0; i0 < p.batch; i0 += 64) {
        for (int64_t k = 0; k < D * n; ++k) part_mu[k] = part_lv[k] = 0;
        const int64_t i1 = i0 + 64 < p.batch ? i0 + 64 : p.batch;
        for (int64_t i = i0; i < i1; ++i) {
            if (kWeighted) p.set_weights(w, i, j0, n);
            for (int64_t d = 0; d < D; ++d) {
                const T *mu = p.mu + d * p.padded + j0, *niv = p.niv + d * p.padded + j0, *c = p.c + d * p.padded + j0;
                const T z = p.z[i * D + d];
                for (int64_t j = 0; j < n; j += W) {
                    const Vec<T> diff = z - load(mu + j);
                    const Vec<T> v = (diff * diff) * load(niv + j) + load(c + j);
                    store(joint + j, d ? load(joint + j) + v : v);
                }
            }
            const T *top = p.top + i * (D + 1), *total = p.total + i * (D + 1);
            const T g1 = over(g.log_q_z[i], total[D]), top_joint = finite_or_zero(top[D]);
            for (int64_t j = 0; j < n; j += W) {
                Vec<T> e = g1 * vexp(load(joint + j) - top_joint);
                if (kWeighted) e *= load(w + j);
                store(joint + j, e);
            }
            for (int64_t d = 0; d < D; ++d) {
                const T *mu = p.mu + d * p.padded + j0, *niv = p.niv + d * p.padded + j0, *c = p.c + d * p.padded + j0;
                T *gm = part_mu + d * n, *gl = part_lv + d * n;
                const T z = p.z[i * D + d], top_d = finite_or_zero(top[d]), g2 = over(g.log_prod_q_z[i], total[d]);
                Vec<T> gz = {};
                for (int64_t j = 0; j < n; j += W) {
                    const Vec<T> diff = z - load(mu + j), ni = load(niv + j);
                    const Vec<T> a = (diff * diff) * ni;
                    Vec<T> q = g2 * vexp(a + load(c + j) - top_d);
                    if (kWeighted) q *= load(w + j);
                    const Vec<T> r = load(joint + j) + q;
                    const Vec<T> t = r * diff;
                    gz += t * ni;
                    store(gm + j, load(gm + j) + t);
                    store(gl + j, load(gl + j) + r + (a + a) * r);
                }
                double s = 0;
                for (int k = 0; k < W; ++k) s += double(gz[k]);
                grad_z[i * D + d] += 2 * s;
            }
            if (kWeighted) p.clear_weights(w, i, j0, n);
        }
        for (int64_t k = 0; k < D * n; ++k) sum_mu[k] += part_mu[k], sum_lv[k] += part_lv[k];
    }
    for (int64_t j = 0; j < n && j0 + j < p.batch; ++j)
        for (int64_t d = 0; d < D; ++d) {
            g.mu[(j0 + j) * D + d] = T(-2 * double(p.niv[d * p.padded + j0 + j]) * sum_mu[d * n + j]);
            g.logvar[(j0 + j) * D + d] = T(-0.5 * sum_lv[d * n + j]);
        }
}

#undef MOVAE_INLINE
