// The projection of weights onto the dual cone of a Jacobian's rows, on the host; the mathematics is in solver.h.
#pragma once

#include "common/instruction_set.h"

namespace movae {

enum class ProjectionMode {
    rows,         // for each u [m]: min v' A v subject to v >= u
    sum,          // the sum over r of the projections of u_r e_r, for one u [m]: UPGrad
    multipliers,  // for each b [m]: lambda >= 0 with A lambda + b >= 0, complementary
};

struct Projection {
    const double* gramian;  // [m, m]; the upper triangle is read
    int m;
    bool by_diagonal;          // the regulariser: reg_eps of each diagonal entry, else of the trace
    double norm_eps, reg_eps;  // norm_eps: a trace below it counts as zero (by trace only)
    ProjectionMode mode;
    const double* given;  // [rows, m] u or b; [m] for a sum
    int rows;             // m for a sum, once inside
    double* out;          // [rows, m]; [m] for a sum
    int ld = 0;           // filled in
};

// How many problems did not finish (their rows hold the best point reached), -1 where the Gramian is not finite (all NaN).
int project(Projection p, InstructionSet isa, int threads);

}  // namespace movae
