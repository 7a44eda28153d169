// Included once per instruction set, in its namespace: the solver for one host thread, and the rows of one call.
#include "projection/solver.h"

// Problems [first, last) of one call, each on the support of the one before; how many did not finish.
int project_rows(const Projection& p, const double* A, const double* scales, int first, int last, double* scratch) {
    const bool sum = p.mode == ProjectionMode::sum, multipliers = p.mode == ProjectionMode::multipliers;
    double *u = scratch, *q = u + p.ld;
    Problem<OneThread> problem(OneThread(), p.m, p.ld, A, q + p.ld);
    bool warm = false;
    int unfinished = 0;
    for (int r = first; r < last; ++r) {
        double* out = p.out + static_cast<long>(r) * p.m;
        const double* given = p.given + (sum ? 0 : static_cast<long>(r) * p.m);
        const double preference = sum ? p.given[r] : 1;
        if (sum && !(preference > 0)) {  // u = preference e_r <= 0: nothing to add (and a NaN stays one)
            for (int k = 0; k < p.m; ++k) out[k] = preference <= 0 ? 0 : preference;
            continue;
        }
        double size = magnitude(preference);
        for (int k = 0; k < p.ld; ++k) {
            const double value = k >= p.m      ? 0
                                 : sum         ? (k == r ? 1 : 0)
                                 : multipliers ? scales[k] * given[k]
                                               : given[k] / scales[k];
            u[k] = multipliers ? 0 : value, q[k] = multipliers ? value : 0;
            size += magnitude(value);
        }
        if (!finite(size)) {
            for (int k = 0; k < p.m; ++k) out[k] = kNaN;
            continue;
        }
        // v_r = 1 exactly: were it larger, y_r = 0 and with it v' A v = 0.
        if (!problem.solve(u, multipliers ? q : nullptr, sum ? r : -1, warm)) ++unfinished;
        warm = true;
        const double factor = sum ? preference / scales[r] : 1;
        for (int k = 0; k < p.m; ++k) out[k] = factor * scales[k] * problem.v[k];
    }
    return unfinished;
}

bool prepare(const Projection& p, double* A, double* scales) {
    const Regulariser by = p.by_diagonal ? kDiagonal : kTrace;
    return prepare(OneThread(), p.gramian, p.m, p.ld, by, p.norm_eps, p.reg_eps, A, scales);
}
