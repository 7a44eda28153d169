// Screening in bfloat16 with AMX tiles: 16 rows x 64 codes in four accumulators. It reads the operands that
// AVX512_BF16 reads: a panel's [depth / 2][64][2] is four tiles side by side.
#include "nearest_code/kernels.h"

#ifdef __x86_64__
#include <immintrin.h>

// GCC 12's own header passes a deliberately undefined register to the unmasked forms.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// The tests run this file's logic on any CPU with the tile instructions written out in plain C++.
#ifdef MOVAE_EMULATE_AMX
#include MOVAE_EMULATE_AMX
#define MOVAE_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#else
#define MOVAE_TARGET "amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#endif
#include "common/target_begin.h"

namespace movae {
namespace {

constexpr int kRows = 16;
constexpr int kPanelBytes = kPanel * 4;  // one pair of depths of a panel

void screen(const uint16_t* z, int64_t z_stride, int rows, const uint16_t* panel, const float* half_norms, float norm_scale,
            int depth, float* minima, int64_t stride) {
    alignas(64) float norms[kPanel], scores[kGroup][kRows][kLanes];
    for (int v = 0; v < kGroup; ++v)
        _mm512_store_ps(norms + v * kLanes,
                        _mm512_mul_ps(_mm512_loadu_ps(half_norms + v * kLanes), _mm512_set1_ps(norm_scale)));
    for (int r = 0; r < rows; r += kRows) {
        // Stride 0: every row of an accumulator starts as the same sixteen norms.
        _tile_loadd(0, norms, 0);
        _tile_loadd(1, norms + kLanes, 0);
        _tile_loadd(2, norms + 2 * kLanes, 0);
        _tile_loadd(3, norms + 3 * kLanes, 0);
        const uint16_t* row = z + r * z_stride;
        const uint16_t* codes = panel;
        for (int k = 0; k < depth; k += kDepthStep, row += kDepthStep, codes += kDepthStep * kPanel) {
            _tile_loadd(4, row, z_stride * 2);
            _tile_loadd(5, codes, kPanelBytes);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, codes + 2 * kLanes, kPanelBytes);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, codes + 4 * kLanes, kPanelBytes);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, codes + 6 * kLanes, kPanelBytes);
            _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(0, scores[0], kLanes * 4);
        _tile_stored(1, scores[1], kLanes * 4);
        _tile_stored(2, scores[2], kLanes * 4);
        _tile_stored(3, scores[3], kLanes * 4);
        for (int i = 0; i < kRows; ++i) {
            const __m512 a = _mm512_min_ps(_mm512_load_ps(scores[0][i]), _mm512_load_ps(scores[1][i]));
            const __m512 b = _mm512_min_ps(_mm512_load_ps(scores[2][i]), _mm512_load_ps(scores[3][i]));
            _mm512_storeu_ps(minima + (r + i) * stride, _mm512_min_ps(a, b));
        }
    }
}

}  // namespace

void amx_configure() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
}

void amx_release() { _tile_release(); }

}  // namespace movae

#include "common/target_end.h"

const movae::BfloatKernels* movae::amx_kernels() {
    static const BfloatKernels kernels = {kRows, &screen, avx512_bf16_kernels()->round_row};
    return &kernels;
}
#endif
