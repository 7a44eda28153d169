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
    static constexpr const char* name = "avx2";
    static constexpr int width = 8, vectors = 2, rows = 6, half_width = 8;
    static type load(const float* x) { return _mm256_loadu_ps(x); }
    static void store(float* x, type v) { _mm256_storeu_ps(x, v); }
    static type broadcast(float x) { return _mm256_set1_ps(x); }
    static type fma(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
    static type min(type a, type b) { return _mm256_min_ps(a, b); }
    static unsigned not_greater(type a, type b) {
        return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)));
    }
    static void widen_half(const uint16_t* x, float* out) {
        store(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
    }
};

}  // namespace

#include "nearest_code/float_kernels.h"
#include "common/target_end.h"

const movae::FloatKernels* movae::avx2_kernels() {
    static const bool here =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return here ? &kKernels : nullptr;
}
#else
const movae::FloatKernels* movae::avx2_kernels() { return nullptr; }
#endif
