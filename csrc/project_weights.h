// The projection of weights onto the dual cone of a Jacobian's rows, on the host; the mathematics is in solver.h.
#pragma once

#include <string>

namespace movae {

struct Projection {
    const double* gramian;  // [m, m]; the upper triangle is read
    int m;
    double norm_eps, reg_eps;  // relative to nothing and to the trace
    const double* u;           // [rows, m]; or, if diagonal, the m diagonal entries of as many rows
    int rows;
    bool diagonal;
    double* out;  // [rows, m]
    int ld = 0;   // filled in
};

// How many rows did not finish (their rows hold the best point reached), -1 where the Gramian is not finite (all NaN).
int project_rows(Projection p, const std::string& isa, int threads);

// UPGrad: out [m] = the sum over i of the projection of u_i e_i. Returns as project_rows.
int project_sum(Projection p, const std::string& isa, int threads);

}  // namespace movae
