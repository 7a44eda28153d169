// The float32 kernels for any CPU: four-wide vectors of the compiler's own.
#include "nearest_code/kernels.h"

#include <cstring>

namespace {

struct V {
    typedef float type __attribute__((vector_size(16)));
    static constexpr int width = 4, vectors = 4, rows = 2;
    static type load(const float* x) {
        type v;
        std::memcpy(&v, x, sizeof v);
        return v;
    }
    static void store(float* x, type v) { std::memcpy(x, &v, sizeof v); }
    static type broadcast(float x) { return type{x, x, x, x}; }
    static type fma(type a, type b, type c) { return a * b + c; }
    static type min(type a, type b) { return a < b ? a : b; }
    static unsigned not_greater(type a, type b) {
        unsigned mask = 0;
        for (int i = 0; i < width; ++i) mask |= static_cast<unsigned>(a[i] <= b[i]) << i;
        return mask;
    }
};

}  // namespace

#include "nearest_code/float_kernels.h"

const movae::FloatKernels* movae::portable_kernels() { return &kKernels; }
