// What Python and the sanitizers' driver call: csrc's CUDA functions by plain arguments. 0, or 1 for an exception.
#include "entry.h"

#include <cstdio>
#include <exception>

#include "emulation.h"
#include "weightings/gramian_weights_cuda.h"
#include "projection/upgrad.h"

using namespace movae;

namespace {

template <class Call>
int tried(Call call) {
    try {
        call();
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}

}  // namespace

void set_order(int order) { emulated::order = static_cast<emulated::Order>(order); }
void set_most_bytes(long bytes) { emulated::most_bytes = bytes; }

int64_t scratch_of_projection(int m, int rows) { return project_scratch(m, rows); }
int64_t scratch_of_upgrad(int m) { return upgrad_scratch(m); }
int64_t scratch_of_weightings(int m) { return weightings::scratch_size(m); }

int project(const double* gramian, int m, const double* given, int rows, int mode, int by_diagonal, double norm_eps,
            double reg_eps, double* out, int32_t* status, double* scratch) {
    return tried([&] {
        const Projection p = {gramian, m, by_diagonal != 0, norm_eps, reg_eps, static_cast<ProjectionMode>(mode), given, rows, out};
        project_weights_cuda(p, status, scratch, nullptr);
    });
}

int upgrad(const void* rows, int dtype, int m, int64_t columns, int64_t stride, const double* pref, int sum, int by_diagonal,
           double norm_eps, double reg_eps, double* weights, double* gramian, int32_t* status, double* scratch) {
    return tried([&] {
        const ProjectionMode mode = sum ? ProjectionMode::sum : ProjectionMode::rows;
        const Projection p = {gramian, m, by_diagonal != 0, norm_eps, reg_eps, mode, pref, 1, weights};
        upgrad_weights_cuda(rows, dtype, columns, stride, p, gramian, status, scratch, nullptr);
    });
}

int weigh(int method, int m, const double* gramian, const double* pref, const int64_t* order, double a, double b,
          int64_t iterations, double* out, double* scratch) {
    return tried([&] {
        const WeightingTask task = {static_cast<Method>(method), m, gramian, pref, order, a, b, iterations, out};
        gramian_weights_cuda(task, scratch, nullptr);
    });
}
