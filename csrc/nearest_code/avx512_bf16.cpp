// Screening in bfloat16 with AVX512_BF16: twice the products per instruction, 6 rows x 64 codes in registers.
#include "nearest_code/kernels.h"

#include <cmath>

#ifdef __x86_64__
#include <immintrin.h>

// GCC 12's own header passes a deliberately undefined register to the unmasked forms.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define MOVAE_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"
#include "common/target_begin.h"

namespace movae {
namespace {

constexpr int kRows = 6;

inline __m512bh as_pairs(__m512i v) { return reinterpret_cast<__m512bh>(v); }

inline void screen_tile(const uint16_t* z, int64_t z_stride, const uint16_t* panel, const float* half_norms, float norm_scale,
                        int pairs, float* minima, int64_t stride) {
    __m512 score[kRows][kGroup];
    MOVAE_UNROLL
    for (int v = 0; v < kGroup; ++v) {
        const __m512 norm = _mm512_mul_ps(_mm512_loadu_ps(half_norms + v * kLanes), _mm512_set1_ps(norm_scale));
        MOVAE_UNROLL
        for (int r = 0; r < kRows; ++r) score[r][v] = norm;
    }
    for (int k = 0; k < pairs; ++k, panel += 2 * kPanel) {
        __m512bh code[kGroup];
        MOVAE_UNROLL
        for (int v = 0; v < kGroup; ++v) code[v] = as_pairs(_mm512_loadu_si512(panel + v * 2 * kLanes));
        MOVAE_UNROLL
        for (int r = 0; r < kRows; ++r) {
            int pair;
            __builtin_memcpy(&pair, z + r * z_stride + 2 * k, sizeof pair);
            const __m512bh x = as_pairs(_mm512_set1_epi32(pair));
            MOVAE_UNROLL
            for (int v = 0; v < kGroup; ++v) score[r][v] = _mm512_dpbf16_ps(score[r][v], x, code[v]);
        }
    }
    MOVAE_UNROLL
    for (int r = 0; r < kRows; ++r)
        _mm512_storeu_ps(minima + r * stride,
                         _mm512_min_ps(_mm512_min_ps(score[r][0], score[r][1]), _mm512_min_ps(score[r][2], score[r][3])));
}

void screen(const uint16_t* z, int64_t z_stride, int rows, const uint16_t* panel, const float* half_norms, float norm_scale,
            int depth, float* minima, int64_t stride) {
    for (int r = 0; r < rows; r += kRows)
        screen_tile(z + r * z_stride, z_stride, panel, half_norms, norm_scale, (depth + 1) / 2, minima + r * stride, stride);
}

// The instruction rounds to nearest even like to_bfloat16, but flushes subnormals; so does the product that will
// read the result. Both losses are part of what is measured here or of the certificate's absolute term.
void round_row(const float* x, int depth, uint16_t* out, float* dropped, float* kept) {
    __m512 dropped2 = _mm512_setzero_ps(), kept2 = _mm512_setzero_ps();
    const int padded = (depth + kDepthStep - 1) / kDepthStep * kDepthStep;
    for (int k = 0; k < padded; k += 16) {
        const int left = depth - k;
        const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? static_cast<__mmask16>((1u << left) - 1) : 0;
        const __m512 v = _mm512_maskz_loadu_ps(mask, x + (left > 0 ? k : 0));
        const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k), rounded);
        const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
        const __m512 lost = _mm512_sub_ps(v, back);
        dropped2 = _mm512_fmadd_ps(lost, lost, dropped2);
        kept2 = _mm512_fmadd_ps(back, back, kept2);
    }
    *dropped = std::sqrt(_mm512_reduce_add_ps(dropped2));
    *kept = std::sqrt(_mm512_reduce_add_ps(kept2));
}

const BfloatKernels kKernels = {kRows, &screen, &round_row};

}  // namespace
}  // namespace movae

#include "common/target_end.h"

const movae::BfloatKernels* movae::avx512_bf16_kernels() { return &kKernels; }
#endif
