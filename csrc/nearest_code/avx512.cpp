// The float32 kernels for AVX-512: 6 rows x 64 codes in twenty-four registers.
#include "nearest_code/kernels.h"

#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>

// GCC 12's own header passes a deliberately undefined register to the unmasked forms.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define MOVAE_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#include "common/target_begin.h"

namespace {

struct V {
    typedef __m512 type;
    static constexpr int width = 16, vectors = 4, rows = 6;
    static type load(const float* x) { return _mm512_loadu_ps(x); }
    static void store(float* x, type v) { _mm512_storeu_ps(x, v); }
    static type broadcast(float x) { return _mm512_set1_ps(x); }
    static type fma(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
    static type min(type a, type b) { return _mm512_min_ps(a, b); }
    static unsigned not_greater(type a, type b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
};

}  // namespace

#include "nearest_code/float_kernels.h"
#include "common/target_end.h"

const movae::FloatKernels* movae::avx512_kernels() { return &kKernels; }
#endif
