// Runs the codebook search and quantize, forward and backward, over odd shapes, layouts, dtypes and paths, in
// buffers of exactly the size they need, and compares with a brute force in float64. Meant for the sanitizers.
#include "quantize/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

using namespace movae;

namespace {

int failures = 0;
std::mt19937 generator(0);

struct Tensor {  // of n items, on the heap, with red zones right behind the last one
    Dtype dtype;
    std::unique_ptr<unsigned char[]> bytes;
    Tensor(int64_t n, Dtype type) : dtype(type), bytes(new unsigned char[n * item_size(type)]()) {}

    void set(int64_t i, double value) {
        unsigned char* to = bytes.get() + i * item_size(dtype);
        const float single = static_cast<float>(value);
        uint16_t half;
        switch (dtype) {
            case Dtype::kFloat64: std::memcpy(to, &value, 8); return;
            case Dtype::kFloat32: std::memcpy(to, &single, 4); return;
            case Dtype::kBfloat16: half = to_bfloat16(single); break;
            case Dtype::kFloat16:  // small integers only: exact
                half = single == 0 ? 0
                                   : static_cast<uint16_t>((single < 0 ? 0x8000 : 0) |
                                                           ((std::ilogb(single) + 15) << 10) |
                                                           (static_cast<int>(std::ldexp(std::fabs(single), 10 - std::ilogb(single))) & 0x3ff));
                break;
        }
        std::memcpy(to, &half, 2);
    }
    double get(int64_t i) const {
        const unsigned char* from = bytes.get() + i * item_size(dtype);
        double value;
        float single;
        uint16_t half;
        switch (dtype) {
            case Dtype::kFloat64: std::memcpy(&value, from, 8); return value;
            case Dtype::kFloat32: std::memcpy(&single, from, 4); return single;
            default: std::memcpy(&half, from, 2);
        }
        if (dtype == Dtype::kBfloat16) return from_bfloat16(half);
        const int exponent = half >> 10 & 31, mantissa = half & 1023;
        value = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
        return half & 0x8000 ? -value : value;
    }
};

struct Case {
    int64_t batch, spatial, codes, depth;
    bool channel_first;
    Dtype dtype;
    double scale, offset;
    InstructionSet isa;
    int threads;
};

void expect(bool holds, const Case& c, const char* what) {
    if (holds) return;
    ++failures;
    std::printf("FAILED %s: %s B=%ld S=%ld K=%ld D=%ld dtype=%d scale=%g offset=%g\n", what, name_of(c.isa), long(c.batch),
                long(c.spatial), long(c.codes), long(c.depth), int(c.dtype), c.scale, c.offset);
}

void run(const Case& c) {
    const int64_t rows = c.batch * c.spatial, size = rows * c.depth;
    Tensor z(size, c.dtype), codes(c.codes * c.depth, c.dtype), z_q(size, c.dtype), grad(size, c.dtype), grad_z(size, c.dtype);
    const Dtype wide = c.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    Tensor error(rows, wide), count(c.codes, wide), sum(c.codes * c.depth, wide), grad_error(rows, wide), grad_codes(c.codes * c.depth, wide);
    std::uniform_int_distribution<int> number(-63, 63);  // exact in every dtype
    for (int64_t i = 0; i < size; ++i) z.set(i, (number(generator) + c.offset) * c.scale), grad.set(i, 1);
    for (int64_t i = 0; i < c.codes * c.depth; ++i) codes.set(i, (number(generator) + c.offset) * c.scale);
    for (int64_t i = 0; i < rows; ++i) grad_error.set(i, 1);

    const auto view = [&](const Tensor& t) {
        return c.channel_first ? RowsView{t.bytes.get(), c.dtype, c.batch, c.spatial, c.depth, c.depth * c.spatial, 1, c.spatial}
                               : RowsView{t.bytes.get(), c.dtype, 1, rows, c.depth, 0, c.depth, 1};
    };
    const RowsView rows_of_z = view(z);
    const Codebook codebook = {codes.bytes.get(), c.dtype, c.codes, c.depth};
    const InstructionSet isa = c.isa;
    std::unique_ptr<int64_t[]> index(new int64_t[rows]), screened(new int64_t[rows]);
    nearest_code(rows_of_z, codebook, screened.get(), false, isa, c.threads);
    quantize(rows_of_z, codebook, {view(z_q), index.get(), error.bytes.get(), count.bytes.get(), sum.bytes.get()}, isa, c.threads);
    for (Gradient through : {Gradient::kStraightThrough, Gradient::kRotation, Gradient::kCodebook})
        quantize_backward(rows_of_z, codebook, index.get(),
                          {view(grad), grad_error.bytes.get(), through, view(grad_z), grad_codes.bytes.get()}, isa, c.threads);

    // Indices that come from outside: refused before anything is read or written.
    for (int64_t bad : {int64_t(-1), c.codes, std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()}) {
        if (rows == 0) break;
        std::unique_ptr<int64_t[]> given(new int64_t[rows]);
        std::copy(index.get(), index.get() + rows, given.get());
        given[rows - 1] = bad;
        const auto refused = [&](auto call) {
            try {
                call();
            } catch (const std::out_of_range&) {
                return true;
            }
            return false;
        };
        expect(refused([&] { code_error(rows_of_z, codebook, given.get(), error.bytes.get(), isa, c.threads); }), c,
               "code_error takes an index outside the codebook");
        const QuantizeGradient wanted = {view(grad), grad_error.bytes.get(), Gradient::kCodebook, view(grad_z),
                                         grad_codes.bytes.get()};
        expect(refused([&] { quantize_backward(rows_of_z, codebook, given.get(), wanted, isa, c.threads); }), c,
               "quantize_backward takes an index outside the codebook");
    }

    double counted = 0;
    for (int64_t k = 0; k < c.codes; ++k) counted += count.get(k);
    expect(counted == double(rows), c, "count");
    for (int64_t row = 0; row < rows; ++row) {
        expect(screened[row] >= 0 && screened[row] < c.codes, c, "screened index");
        double best = std::numeric_limits<double>::infinity();
        int64_t expected = 0;
        for (int64_t k = 0; k < c.codes; ++k) {
            double score = 0;  // integers times a power of two: exact, so ties are ties
            for (int64_t d = 0; d < c.depth; ++d) {
                const double code = codes.get(k * c.depth + d);
                score += code * code / 2 - z.get(rows_of_z.offset(row) + d * rows_of_z.depth_stride) * code;
            }
            if (score < best) best = score, expected = k;
        }
        expect(index[row] == expected, c, "index");
    }
}

}  // namespace

int main() {
    const Dtype dtypes[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBfloat16, Dtype::kFloat16};
    const int64_t shapes[][4] = {{1, 1, 1, 1},    {1, 5, 3, 2},    {1, 97, 65, 33},  {3, 49, 64, 16}, {2, 50, 130, 31},
                                 {0, 7, 4, 3},    {2, 0, 4, 3},    {1, 100, 63, 65}, {5, 1, 200, 7},  {1, 13, 2113, 5},
                                 {2, 70, 300, 64}, {1, 3, 20, 257}};
    int cases = 0;
    for (const InstructionSet isa : available_isas())
        for (Dtype dtype : dtypes)
            for (const auto& s : shapes)
                for (bool channel_first : {false, true})
                    for (double scale : {1.0, 0x1p-140, 0x1p110})
                        for (double offset : {0.0, 4000.0}) {
                            if (dtype == Dtype::kFloat16 && scale != 1.0) continue;
                            if ((dtype == Dtype::kBfloat16 || dtype == Dtype::kFloat16) && offset != 0.0) continue;
                            run({s[0], s[1], s[2], s[3], channel_first, dtype, scale, offset, isa, 1 + cases % 3});
                            ++cases;
                        }
    // More than one packed block of codes.
    for (const InstructionSet isa : available_isas())
        run({1, 20, 2500, 1030, false, Dtype::kFloat32, 1.0, 0.0, isa, 2});
    std::printf("paths:");
    for (const InstructionSet isa : available_isas()) std::printf(" %s", name_of(isa));
    std::printf("\n%d cases, %d failures\n", cases, failures);
    return failures != 0;
}
