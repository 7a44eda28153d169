// Projection onto the dual cone of a Jacobian's rows: min v' A v subject to v >= u, exactly, in float64.
//
// With v = u + w and y = A v + q it is the complementarity problem w >= 0, y >= 0, w y = 0, which has one solution for
// positive definite A. The projection of weights has q = 0; the multipliers that correct a step s have u = 0 and q = J s. One index at a time moves in or out of the support (where w > 0 and y = 0): the largest
// violation first and, should that take too long, the violation of least index, which cannot cycle (Murty 1974). Of the
// tableau only the support's block, A_SS^-1, is kept; a move updates it by one outer product, and takes the one
// column of the rest that it needs from A itself.
//
// That only finds the support. The answer is refined against the untouched A, with products and sums in twice the
// precision, so that neither the updates' rounding nor A's condition is left in it; what the refined answer says of
// the support is believed over the tableau, and the moves go on until both agree.
//
// Included more than once, each time in a namespace of its own and under another target: no include guard, and no
// includes: common/team.h comes before. One source for host and device: a Team shares the work of one problem among
// the threads of a warp; the host's team is one thread, whose loops the compiler vectorises and whose packs want rows
// padded with zeros to a multiple of eight.

constexpr double kIll = 1e-5;  // a pivot beside its row's diagonal entry, below which rounding is looked after
constexpr double kSmallestNormal = 2.2250738585072014e-308;  // a trace or a squared norm below is taken for zero

// The numbers that one thread works on at once: a vector on the host (of MOVAE_VECTOR_BYTES), one number on the device.
#ifdef __CUDACC__
typedef double Pack;
#else
typedef double Pack __attribute__((vector_size(MOVAE_VECTOR_BYTES)));
#endif
constexpr int kPack = sizeof(Pack) / sizeof(double);

MOVAE_HD Pack load(const double* x) {
    Pack v;
    __builtin_memcpy(&v, x, sizeof v);
    return v;
}
MOVAE_HD void store(double* x, const Pack& v) { __builtin_memcpy(x, &v, sizeof v); }

// a b - p exactly, for p = a b rounded.
MOVAE_HD Pack product_error(const Pack& a, double b, const Pack& p) {
#ifdef __CUDACC__
    return fma(a, b, -p);
#elif MOVAE_VECTOR_BYTES == 64
    return _mm512_fmsub_pd(a, _mm512_set1_pd(b), p);
#elif MOVAE_VECTOR_BYTES == 32
    return _mm256_fmsub_pd(a, _mm256_set1_pd(b), p);
#else  // Veltkamp's split and Dekker's product
    const Pack sa = 134217729.0 * a, ah = sa - (sa - a), al = a - ah;
    const double sb = 134217729.0 * b, bh = sb - (sb - b), bl = b - bh;
    return ((ah * bh - p) + ah * bl + al * bh) + al * bl;
#endif
}

MOVAE_HD Pack magnitudes(const Pack& x) { return x < 0.0 ? -x : x; }
MOVAE_HD Pack larger_of_each(const Pack& a, const Pack& b) { return a > b ? a : b; }

struct Found {
    double value;
    int index;
};
MOVAE_HD Found better(Found a, Found b, bool least_index) {  // the larger value, or the lower index
    if (a.index < 0 || b.index < 0) return a.index < 0 ? b : a;
    return !least_index && a.value != b.value ? (a.value > b.value ? a : b) : (a.index < b.index ? a : b);
}

MOVAE_HD int padded(int m) { return (m + 7) / 8 * 8; }

// Scratch of one problem, in doubles: the inverse, and thirteen vectors.
MOVAE_HD long scratch_size(int m, int ld) { return static_cast<long>(m + 13) * ld; }

template <class Team>
struct Problem {
    static constexpr int W = kPack, kTogether = kPack > 1 ? 4 : 1;  // four sums under way hide the latency of one
    Team team;
    int m, ld;
    const double* A;        // [m, ld], padding zero; entries of at most about 1
    const double* u;        // [ld], padding zero
    const double* q;        // [ld], padding zero, or null for zeros
    int fixed;              // an index that is known to stay out of the support, or -1
    int count = 0;          // how many are in the support
    double* M;              // [m, ld] A_SS^-1 in the order of `member`, zero beyond
    int *member, *place;    // [ld] the support's indices, and the place of an index among them
    double *z, *side;       // [ld] w on the support, y elsewhere; -1 on the support, 1 elsewhere
    double *v, *y, *d;      // [ld]
    double* sums;           // [ld] |A| |v|: what y is summed from, and so what its rounding is relative to
    double* gain;           // [ld] what a violation counts: 1 on the support, 1 / A_kk elsewhere, 0 for one that may not move
    double *score, *g, *h;  // [ld]
    double* kept;           // [ld] the members while the inverse is rebuilt

    MOVAE_HD Problem(const Team& t, int size, int stride, const double* matrix, double* scratch)
        : team(t), m(size), ld(stride), A(matrix), u(nullptr), q(nullptr), fixed(-1), M(scratch),
          member(reinterpret_cast<int*>(M + static_cast<long>(m) * ld)), place(member + ld),
          z(M + static_cast<long>(m + 1) * ld), side(z + ld), v(side + ld), y(v + ld), d(y + ld), sums(d + ld), gain(sums + ld),
          score(gain + ld), g(score + ld), h(g + ld), kept(h + ld) {}

    MOVAE_HD const double* row(int i) const { return A + static_cast<long>(i) * ld; }
    MOVAE_HD double* inverse(int p) const { return M + static_cast<long>(p) * ld; }
    MOVAE_HD int at(int p) const { return member[p]; }
    MOVAE_HD static int up(int n) { return (n + W - 1) / W * W; }
    MOVAE_HD double lanes(const Pack& x) const {  // the largest of all threads' lanes
        double most[W];
        __builtin_memcpy(most, &x, sizeof x);
        for (int k = 1; k < W; ++k) most[0] = larger(most[0], most[k]);
        return team.most(most[0]);
    }
    MOVAE_HD double largest(const double* x) const {
        Pack most = {};
        for (int i = team.rank() * W; i < ld; i += team.size() * W) most = larger_of_each(most, magnitudes(load(x + i)));
        return lanes(most);
    }

    // out[i] = sum over the support's places p of c[p] x_p[i], for n rows x_p: of A by `kOfA`, else of the inverse.
    template <bool kOfA, int kPacks>
    MOVAE_HD void sum_of_rows(const double* c, int i, double* out) {
        Pack sum[kPacks] = {};
        for (int p = 0; p < count; ++p) {
            const double x = c[p], *from = (kOfA ? row(at(p)) : inverse(p)) + i;
            for (int b = 0; b < kPacks; ++b) sum[b] += x * load(from + b * W);
        }
        for (int b = 0; b < kPacks; ++b) store(out + i + b * W, sum[b]);
    }
    template <bool kOfA>
    MOVAE_HD void sum_of_rows(const double* c, int n, double* out) {
        constexpr int kMany = kTogether * W;
        const int many = n / kMany * kMany;
        for (int i = team.rank() * kMany; i < many; i += team.size() * kMany) sum_of_rows<kOfA, kTogether>(c, i, out);
        for (int i = many + team.rank() * W; i < n; i += team.size() * W) sum_of_rows<kOfA, 1>(c, i, out);
        team.sync();
    }

    // h = c' A_S, all columns.
    MOVAE_HD void spread(const double* c) { sum_of_rows<true>(c, ld, h); }

    // out = M x in the order of `member`, zero beyond.
    MOVAE_HD void solve_support(const double* x, double* out) { sum_of_rows<false>(x, up(count + 1), out); }

    // M += factor g g' over the first n places.
    MOVAE_HD void outer(double factor, int n) {
        for (int p = team.row(); p < n; p += team.rows()) {
            const double x = factor * g[p];
            double* to = inverse(p);
            for (int q = team.column() * W; q < up(n); q += team.columns() * W) store(to + q, load(to + q) + x * load(g + q));
        }
        team.sync();
    }

    // Adds `step` times a direction: h on the y's, g on the w's.
    MOVAE_HD void move(double step) {
        for (int i = team.rank() * W; i < ld; i += team.size() * W)
            store(z + i, load(z + i) + (load(side + i) > 0.0 ? step * load(h + i) : Pack{}));
        team.sync();
        for (int p = team.rank(); p < count; p += team.size()) z[at(p)] += step * g[p];
        team.sync();
    }

    MOVAE_HD void enter(int k) {
        const double* own = row(k);
        for (int p = team.rank(); p < up(count + 1); p += team.size()) d[p] = p < count ? own[at(p)] : 0;
        team.sync();
        solve_support(d, g);
        double pivot = own[k];
        for (int p = 0; p < count; ++p) pivot -= d[p] * g[p];
        // What is left of row k beside the support's is small: g's rounding, as large as the inverse is, would be all of it.
        for (int round = 0; round < 2 && pivot < kIll * own[k]; ++round) {
            team.sync();
            spread(g);
            for (int p = team.rank(); p < up(count + 1); p += team.size()) d[p] = p < count ? own[at(p)] - h[at(p)] : 0;
            team.sync();
            solve_support(d, score);
            for (int p = team.rank(); p < count; p += team.size()) g[p] += score[p];
            team.sync();
            pivot = own[k];
            for (int p = 0; p < count; ++p) pivot -= own[at(p)] * g[p];
            if (round == 1) break;
        }
        team.sync();
        if (!(pivot > 4 * m * kEps * own[k])) {  // row k depends on the support's, as an unregularised A allows
            if (team.rank() == 0) gain[k] = 0;
            team.sync();
            return;
        }
        spread(g);
        for (int i = team.rank(); i < ld; i += team.size()) h[i] = own[i] - h[i];
        for (int p = team.rank(); p < up(count + 1); p += team.size()) g[p] = p < count ? -g[p] : p == count;
        team.sync();
        const double step = -z[k] / pivot;
        team.sync();
        move(step);
        ++count;
        outer(1 / pivot, count);
        if (team.rank() == 0) z[k] = step, side[k] = -1, gain[k] = 1, place[k] = count - 1, member[count - 1] = k;
        team.sync();
    }

    MOVAE_HD void leave(int k) {
        const int t = place[k], last = count - 1, moved = at(last);
        for (int p = team.rank(); p < up(count); p += team.size()) g[p] = inverse(t)[p];
        team.sync();
        spread(g);
        const double pivot = g[t], step = -z[k] / pivot;
        suspect = suspect || pivot * row(k)[k] * kIll > 1;  // little is left of the digits of an inverse so large
        team.sync();
        move(step);
        outer(-1 / pivot, count);
        for (int p = team.rank(); p < count; p += team.size()) g[p] = inverse(last)[p];
        team.sync();
        for (int p = team.rank(); p < count; p += team.size()) {  // the last place moves into the empty one
            const double value = p == last ? 0 : p == t ? g[last] : g[p];
            inverse(t)[p] = value;
            if (p != last) inverse(p)[t] = value;
        }
        team.sync();
        for (int p = team.rank(); p < count; p += team.size()) inverse(last)[p] = inverse(p)[last] = 0;
        if (team.rank() == 0) {
            member[t] = moved, place[moved] = t;
            z[k] = step, side[k] = 1, gain[k] = k == fixed ? 0 : 1 / row(k)[k];
        }
        --count;
        team.sync();
    }

    MOVAE_HD void empty() {
        for (int i = team.row(); i < m; i += team.rows())
            for (int j = team.column(); j < ld; j += team.columns()) inverse(i)[j] = 0;
        for (int i = team.rank(); i < ld; i += team.size()) member[i] = place[i] = z[i] = v[i] = d[i] = g[i] = 0, side[i] = 1;
        count = 0;
        team.sync();
    }

    // The inverse of the present support from A, member by member: for when updates have cost it too many digits.
    MOVAE_HD void rebuild() {
        const int members = count;
        for (int p = team.rank(); p < members; p += team.size()) score[p] = at(p);
        empty();
        for (int p = team.rank(); p < ld; p += team.size()) kept[p] = p < members ? score[p] : 0;
        team.sync();
        for (int p = 0; p < members; ++p) enter(static_cast<int>(kept[p]));
        restart();
        suspect = false;
    }

    // z for this u on the present support.
    MOVAE_HD void restart() {
        for (int i = team.rank(); i < ld; i += team.size()) {
            gain[i] = i >= m || i == fixed ? 0 : side[i] < 0 ? 1 : 1 / row(i)[i];
            v[i] = u[i];
        }
        team.sync();
        multiply();
        for (int p = team.rank(); p < up(count); p += team.size()) d[p] = p < count ? -y[at(p)] : 0;
        team.sync();
        solve_support(d, g);
        spread(g);
        for (int i = team.rank(); i < ld; i += team.size()) z[i] = y[i] + h[i];
        team.sync();
        for (int p = team.rank(); p < count; p += team.size()) z[at(p)] = g[p];
        team.sync();
    }

    MOVAE_HD double length() const {  // the largest |v|, |u| and |q|
        Pack most = {};
        for (int i = team.rank() * W; i < ld; i += team.size() * W) {
            const Pack below = load(u + i), w = load(side + i) < 0.0 ? load(z + i) : Pack{};
            most = larger_of_each(most, larger_of_each(magnitudes(below), magnitudes(w + below)));
            if (q) most = larger_of_each(most, magnitudes(load(q + i)));
        }
        return lanes(most);
    }

    // The index to exchange, or -1. Of a refined v the signs are trusted to the last digits, each y against the sum that it
    // comes from (against the largest v, a violation of a row with a small diagonal would pass); of the tableau's to 1e-12.
    MOVAE_HD int violation(bool refined, bool least_index) const {
        const double scale = length(), least_w = (refined ? -16 * kEps : -1e-12) * scale;
        const double of_sums = refined ? -4 * kEps : 0, of_scale = refined ? 0 : -8 * kEps * scale;
        for (int i = team.rank() * W; i < ld; i += team.size() * W) {
            const Pack value = load(z + i), inside = load(side + i);
            const Pack least = inside < 0.0 ? Pack{} + least_w : of_sums * load(sums + i) + of_scale;
            store(score + i, value < least ? -value * load(gain + i) : Pack{});
        }
        team.sync();
        Found found = {0, -1};
        for (int k = team.rank(); k < m; k += team.size()) {
            if (!(score[k] > (least_index ? 0 : found.value))) continue;
            found = {score[k], k};
            if (least_index) break;
        }
        const int index = team.best(found, least_index).index;
        team.sync();
        return index;
    }

    // y = A v + q, each sum in twice the precision (Ogita, Rump & Oishi 2005, Dot2). A is symmetric: row j is column j.
    MOVAE_HD void multiply() {
        for (int i = team.rank() * W; i < ld; i += team.size() * W) {
            Pack high = q ? load(q + i) : Pack{}, low = {}, size = magnitudes(high);
            for (int j = 0; j < m; ++j) {
                const double x = v[j];
                if (x == 0) continue;
                const Pack a = load(row(j) + i), p = a * x, s = high + p, b = s - high;
                low += ((high - (s - b)) + (p - b)) + product_error(a, x, p);
                high = s;
                size += magnitudes(p);
            }
            store(y + i, high + low);
            store(sums + i, size);
        }
        team.sync();
    }

    // Whether y is zero on the support, as far as v's own rounding lets it.
    MOVAE_HD bool converged() const {
        double excess = 0;
        for (int p = team.rank(); p < count; p += team.size())
            excess = larger(excess, magnitude(y[at(p)]) - 8 * kEps * sums[at(p)]);
        return !(team.most(excess) > 0);
    }

    // v -= A_SS^-1 y on the support, and y with it; how large the change was beside v.
    MOVAE_HD double correct() {
        for (int p = team.rank(); p < up(count); p += team.size()) d[p] = p < count ? -y[at(p)] : 0;
        team.sync();
        solve_support(d, g);
        for (int p = team.rank(); p < count; p += team.size()) {
            const int i = at(p);
            const double corrected = v[i] + g[p];
            g[p] = corrected - v[i];
            v[i] = corrected;
        }
        team.sync();
        spread(g);
        for (int i = team.rank(); i < ld; i += team.size()) y[i] += h[i];
        team.sync();
        const double change = largest(g), most = largest(v);
        return change / most;
    }

    // v on the present support from the untouched A, to the last digits; y = A v beside it, and z from both. Whether the
    // tableau was good to half the digits.
    MOVAE_HD bool refine() {
        for (int i = team.rank(); i < ld; i += team.size()) v[i] = side[i] < 0 ? z[i] + u[i] : u[i];
        for (int p = team.rank(); p < ld; p += team.size()) g[p] = 0;
        team.sync();
        double before = 1, first = 0;
        for (int round = 0; round < 12; ++round) {
            multiply();
            const double change = correct();
            if (round == 0) first = change;
            // A correction's error is to it as it is to the one before (the first: as it is to v).
            const double ratio = change / before;
            before = change;
            if (!(ratio < 0.5) || !(ratio * change > 0.5 * kEps)) break;
        }
        for (int i = team.rank(); i < ld; i += team.size()) z[i] = side[i] < 0 ? v[i] - u[i] : y[i];
        team.sync();
        return first <= 1e-8;
    }

    // Leaves the solution in v; whether it was reached within the allowed number of exchanges. Starts on the support of the
    // problem before, with `warm`, where the tableau is still good.
    MOVAE_HD bool solve(const double* bound, const double* offset, int stays_out, bool warm) {
        u = bound, q = offset, fixed = stays_out;
        double highest = 0;
        for (int i = team.rank(); i < m; i += team.size()) highest = larger(highest, u[i]);
        if (!warm || !good) empty();
        if (!q && team.most(highest) == 0) {  // nothing above zero is asked for
            for (int i = team.rank(); i < m; i += team.size()) v[i] = 0;
            team.sync();
            return true;
        }
        if (fixed >= 0 && side[fixed] < 0) leave(fixed);
        restart();
        const int patience = 3 * m, limit = 10 * m + 64;
        bool refined = false;
        for (int exchanges = 0;;) {
            // After many moves the tableau is not to be trusted: every answer is refined before it is judged.
            if (exchanges >= patience && !refined) refined = settle();
            const int k = violation(refined, exchanges >= 2 * patience);
            if (k >= 0 && exchanges < limit) {
                if (side[k] < 0)
                    leave(k);
                else
                    enter(k);
                if (suspect) rebuild();
                ++exchanges;
                refined = false;
            } else if (k < 0 && !refined) {
                refined = settle();
            } else {
                for (int i = team.rank(); i < m; i += team.size()) v[i] = larger(v[i], u[i]);
                team.sync();
                good = good && k < 0;
                return k < 0 && converged();
            }
        }
    }

    MOVAE_HD bool settle() {
        good = refine();
        if (!good) {
            rebuild();
            good = refine();
        }
        return true;
    }

    bool good = true, suspect = false;
};

// What the Gramian is regularised by: a part of its trace, or the same part of each diagonal entry.
enum Regulariser { kTrace = 0, kDiagonal = 1 };

// A power of two p with x p^2 in [1/4, 1), for a normal x > 0: products with it are exact.
MOVAE_HD double inverse_root(double x) {
    unsigned long long bits;
    __builtin_memcpy(&bits, &x, sizeof x);
    const int exponent = static_cast<int>(bits >> 52) - 1023, half = (exponent + 2) >> 1;
    bits = static_cast<unsigned long long>(1023 - half) << 52;
    double root;
    __builtin_memcpy(&root, &bits, sizeof root);
    return root;
}

// The matrix A of the problem and the rows' scales [ld]. Only G's upper triangle is read. False, and no A, where G is not
// finite.
//
// kTrace: A = G / trace + reg_eps I, the zero matrix in place of G / trace where the trace is below norm_eps; scales 1.
// kDiagonal: A = S (G + reg_eps diag(G)) S, S = diag(scales). The cone { v : G v >= 0 } does not change when a row is
// rescaled, and neither does this regulariser. S is of powers of two, so that A is as exact as G; it makes all rows about
// as long. A row of norm zero (and one whose square is below the normal numbers) meets no other row.
template <class Team>
MOVAE_HD bool prepare(const Team& team, const double* G, int m, int ld, Regulariser regulariser, double norm_eps,
                      double reg_eps, double* A, double* scales) {
    double trace = 0, total = 0;
    bool all_finite = true;
    for (int i = 0; i < m; ++i) {
        trace += G[static_cast<long>(i) * m + i];
        for (int j = i; j < m; ++j) {
            const double size = magnitude(G[static_cast<long>(i) * m + j]);
            total += size, all_finite = all_finite && finite(size);
        }
    }
    const bool by_diagonal = regulariser == kDiagonal;
    if (!all_finite || (!by_diagonal && !finite(total))) return false;
    const bool zero = trace < norm_eps || trace < kSmallestNormal;
    for (int i = team.rank(); i < ld; i += team.size()) {
        const double own = i < m && by_diagonal ? G[static_cast<long>(i) * m + i] : 0;
        scales[i] = own >= kSmallestNormal ? inverse_root(own) : 1;
    }
    team.sync();
    for (int i = team.row(); i < m; i += team.rows())
        for (int j = team.column(); j < ld; j += team.columns()) {
            double value = 0;
            const double given = j < m ? G[i < j ? static_cast<long>(i) * m + j : static_cast<long>(j) * m + i] : 0;
            if (by_diagonal) {
                const bool met = j < m && G[static_cast<long>(i) * m + i] >= kSmallestNormal &&
                                 G[static_cast<long>(j) * m + j] >= kSmallestNormal;
                value = met ? given * scales[i < j ? i : j] * scales[i < j ? j : i] : i == j;
                if (i == j) value += reg_eps * value;
            } else {
                if (j < m && !zero) value = given / trace;
                if (i == j) value += reg_eps;
            }
            A[static_cast<long>(i) * ld + j] = value;
        }
    team.sync();
    return true;
}
