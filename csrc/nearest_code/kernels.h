// The inner loops of the codebook search, one table per instruction set.
//
// The codebook is packed in panels of 64 codes. A screening kernel scores some rows against one panel and keeps,
// for each row and each of 16 lanes, the least of the scores of the four codes lane, lane + 16, lane + 32 and
// lane + 48: the minimum over a group of four costs one instruction per vector of scores, needs no index in a
// register, and is all that the certificate in nearest_code.cpp asks for.
#pragma once

#include <cstdint>

#include "common/half_to_float.h"
#include "common/instruction_set.h"

namespace movae {

constexpr int kPanel = 64;      // codes per panel
constexpr int kLanes = 16;      // groups per panel
constexpr int kGroup = 4;       // codes per group
constexpr int kDepthStep = 32;  // bfloat16 rows and panels are padded to the depth of one AMX tile

struct FloatKernels {
    int row_step;  // rows per micro-tile; row buffers are padded to a multiple of it

    // minima[row * stride + lane] = min over the group of norm_scale * half_norms[code] + z[row] . panel[., code],
    // panel holding the negated codes as [depth][64].
    void (*screen)(const float* z, int64_t z_stride, int rows, const float* panel, const float* half_norms, float norm_scale,
                   int depth, float* minima, int64_t stride);

    // Groups whose minimum less its panel's bound does not exceed the least of `best` and every minimum plus its
    // bound: all others are certainly worse. Returns how many; group = panel * 16 + lane.
    int (*candidates)(const float* minima, const float* bound, int panels, float best, uint16_t* groups);

    // Four inner products in float64, in one fixed order on every instruction set.
    void (*dot4)(const float* z, const float* const* codes, int depth, double* out);
    void (*dot4_double)(const double* z, const double* const* codes, int depth, double* out);

    float (*sum_squares)(const float* x, int depth);
    double (*squared_distance)(const float* x, const float* y, int depth);
};

struct BfloatKernels {
    int row_step;

    // As above in bfloat16 products and float32 sums; rows as [row][padded depth], panel as [depth / 2][64][2].
    void (*screen)(const uint16_t* z, int64_t z_stride, int rows, const uint16_t* panel, const float* half_norms,
                   float norm_scale, int depth, float* minima, int64_t stride);

    // Rounds a row to bfloat16, zero-padded to the depth step; the norms of what was dropped and of what is kept.
    void (*round_row)(const float* x, int depth, uint16_t* out, float* dropped, float* kept);
};

const FloatKernels* portable_kernels();
#ifdef __x86_64__  // only for a CPU that has them
const FloatKernels* avx2_kernels();
const FloatKernels* avx512_kernels();
const BfloatKernels* avx512_bf16_kernels();
const BfloatKernels* amx_kernels();
#endif

// Gives the calling thread's tiles their shapes, and takes them back; only around calls of amx_kernels()->screen.
void amx_configure();
void amx_release();

// What a search calls.
struct Kernels {
    const FloatKernels* exact;       // never null
    const BfloatKernels* screening;  // null: float32 screens
    bool tiles;                      // AMX: each thread configures its tiles
    HalfToFloat half_to_float;
};
Kernels kernels_of(InstructionSet isa);

}  // namespace movae
