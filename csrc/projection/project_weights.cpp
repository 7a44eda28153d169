#include "projection/project_weights.h"

#include <cstdint>
#include <limits>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "common/buffer.h"
#include "common/team.h"

namespace movae {
namespace {

constexpr int kRowsTogether = 32;  // rows that start on each other's support
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

#define MOVAE_KERNEL "projection/kernel.h"
#include "common/every_isa.h"

struct Path {
    bool (*prepare)(const Projection&, double*, double*);
    int (*rows)(const Projection&, const double*, const double*, int, int, double*);
};

Path choose(InstructionSet isa) {
#ifdef __x86_64__
    if (vectors_of(isa) == InstructionSet::kAvx512) return {avx512::prepare, avx512::project_rows};
    if (isa == InstructionSet::kAvx2) return {avx2::prepare, avx2::project_rows};
#endif
    return {portable::prepare, portable::project_rows};
}

int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

int project_rows(Projection p, InstructionSet isa, int threads) {
    const Path path = choose(isa);
    p.ld = portable::padded(p.m);
    const size_t matrix = size_t(p.m) * p.ld + p.ld, each = portable::scratch_size(p.m, p.ld) + 2 * p.ld;
    // Groups are the same for any number of threads, and so are the results, to the last bit.
    const int groups = (p.rows + kRowsTogether - 1) / kRowsTogether;
    if (threads > groups) threads = groups;
    if (int64_t(p.m) * p.m * p.rows <= int64_t(40) * 40 * 40 || threads < 1) threads = 1;  // not worth waking another
    const Buffer<double> scratch(matrix + threads * each);
    double *A = scratch.get(), *scales = A + size_t(p.m) * p.ld;
    if (!path.prepare(p, A, scales)) {
        for (size_t k = 0; k < size_t(p.rows) * p.m; ++k) p.out[k] = kNaN;
        return -1;
    }
    int unfinished = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(+ : unfinished) if (threads > 1)
    for (int group = 0; group < groups; ++group) {
        const int first = group * kRowsTogether, last = first + kRowsTogether < p.rows ? first + kRowsTogether : p.rows;
        unfinished += path.rows(p, A, scales, first, last, A + matrix + thread_number() * each);
    }
    return unfinished;
}

int project_sum(Projection p, InstructionSet isa, int threads) {
    const Buffer<double> each(int64_t(p.m) * p.m);
    double* out = p.out;
    p.rows = p.m, p.out = each.get();
    const int status = project_rows(p, isa, threads);
    for (int k = 0; k < p.m; ++k) {
        double sum = 0;
        for (int r = 0; r < p.m; ++r) sum += each[size_t(r) * p.m + k];
        out[k] = sum;
    }
    return status;
}

}  // namespace

int project(Projection p, InstructionSet isa, int threads) {
    return p.mode == ProjectionMode::sum ? project_sum(p, isa, threads) : project_rows(p, isa, threads);
}

}  // namespace movae
