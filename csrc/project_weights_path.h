// Included once an instruction set, in its namespace: the solver for one host thread, and the rows of one call.
#include "solver.h"

// Rows [first, last) of one call, each on the support of the one before; how many did not finish.
int project_rows(const Projection& p, const double* A, int first, int last, double* scratch) {
    double* u = scratch;
    Problem<Single> problem(Single(), p.m, p.ld, A, u + p.ld);
    bool warm = false;
    int unfinished = 0;
    for (int r = first; r < last; ++r) {
        double* out = p.out + static_cast<long>(r) * p.m;
        const double* given = p.u + static_cast<long>(r) * p.m;
        const double preference = p.diagonal ? p.u[r] : 1;
        if (p.diagonal && !(preference > 0)) {  // u = preference e_r <= 0: nothing to add (and a NaN stays one)
            for (int k = 0; k < p.m; ++k) out[k] = preference <= 0 ? 0 : preference;
            continue;
        }
        double sum = magnitude(preference);
        for (int k = 0; k < p.ld; ++k) {
            u[k] = k >= p.m ? 0 : p.diagonal ? (k == r ? 1 : 0) : given[k];
            sum += magnitude(u[k]);
        }
        if (!finite(sum)) {
            for (int k = 0; k < p.m; ++k) out[k] = kNaN;
            continue;
        }
        // v_r = 1 exactly: were it larger, y_r = 0 and with it v' A v = 0.
        if (!problem.solve(u, p.diagonal ? r : -1, warm)) ++unfinished;
        warm = true;
        for (int k = 0; k < p.m; ++k) out[k] = preference * problem.v[k];
    }
    return unfinished;
}

bool prepare(const Projection& p, double* A) {
    return normalise(Single(), p.gramian, p.m, p.ld, p.norm_eps, p.reg_eps, A);
}
