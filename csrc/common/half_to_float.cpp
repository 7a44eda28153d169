#include "common/half_to_float.h"

#include <cstring>

#include "common/dtype.h"

#ifdef __x86_64__
#include <immintrin.h>

// GCC 12's own header passes a deliberately undefined register to the unmasked forms.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace movae {
namespace {

void portable(const uint16_t* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = from_half(x[i]);
}

#ifdef __x86_64__
#define MOVAE_TARGET "avx2,fma,f16c"
#include "common/target_begin.h"
void avx2(const uint16_t* x, float* out, int64_t n) {
    constexpr int kWidth = 8;
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
    if (i == n) return;
    uint16_t rest[kWidth] = {};
    float wide[kWidth];
    std::memcpy(rest, x + i, (n - i) * sizeof *x);
    _mm256_storeu_ps(wide, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rest))));
    std::memcpy(out + i, wide, (n - i) * sizeof *out);
}
#include "common/target_end.h"

#define MOVAE_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#include "common/target_begin.h"
void avx512(const uint16_t* x, float* out, int64_t n) {
    constexpr int kWidth = 16;
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth)
        _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
    if (i == n) return;
    uint16_t rest[kWidth] = {};
    float wide[kWidth];
    std::memcpy(rest, x + i, (n - i) * sizeof *x);
    _mm512_storeu_ps(wide, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rest))));
    std::memcpy(out + i, wide, (n - i) * sizeof *out);
}
#include "common/target_end.h"
#endif

}  // namespace

HalfToFloat half_to_float(InstructionSet isa) {
#ifdef __x86_64__
    if (vectors_of(isa) == InstructionSet::kAvx512) return &avx512;
    if (isa == InstructionSet::kAvx2) return &avx2;
#endif
    return &portable;
}

}  // namespace movae
