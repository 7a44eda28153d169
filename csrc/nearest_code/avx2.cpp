// The float32 kernels for AVX2, FMA and F16C: 6 rows x 16 codes in twelve registers.
#include "nearest_code/kernels.h"

#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>

#define MOVAE_TARGET "avx2,fma,f16c"
#include "common/target_begin.h"

namespace {

struct V {
    typedef __m256 type;
    static constexpr int width = 8, vectors = 2, rows = 6;
    static type load(const float* x) { return _mm256_loadu_ps(x); }
    static void store(float* x, type v) { _mm256_storeu_ps(x, v); }
    static type broadcast(float x) { return _mm256_set1_ps(x); }
    static type fma(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
    static type min(type a, type b) { return _mm256_min_ps(a, b); }
    static unsigned not_greater(type a, type b) {
        return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)));
    }
};

}  // namespace

#include "nearest_code/float_kernels.h"
#include "common/target_end.h"

const movae::FloatKernels* movae::avx2_kernels() { return &kKernels; }
#endif
