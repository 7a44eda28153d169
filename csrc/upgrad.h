// The CUDA half of the Gramian's projection. Everything is enqueued on the stream that comes in; nothing is read on the host.
#pragma once

#include <cstdint>

namespace movae {

constexpr int kMostRows = 64;       // rows of a Jacobian that the tableau in shared memory is laid out for
constexpr int kRowsInOneLaunch = 16;  // up to here the block that finishes the Gramian solves it, too

// Scratch, in doubles.
int64_t project_scratch(int m, int rows);
int64_t upgrad_scratch(int m);

// Device addresses: gramian [m, m], u [rows, m] (or, with `sum`, the preference [m]), out as u, status one int32.
void project_weights_cuda(const double* gramian, int m, const double* u, int rows, bool sum, double norm_eps,
                          double reg_eps, double* out, int32_t* status, double* scratch, void* stream);

// The same from the rows [m, columns] of a Jacobian; the Gramian is written, too. dtype as Dtype in nearest_code.h.
void upgrad_weights_cuda(const void* rows, int dtype, int m, int64_t columns, int64_t stride, const double* pref, bool sum,
                         double norm_eps, double reg_eps, double* weights, double* gramian, int32_t* status,
                         double* scratch, void* stream);

}  // namespace movae
