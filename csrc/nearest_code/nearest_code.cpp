// The exact nearest codeword of every row, without an N x K buffer.
//
// 1. Screen: a kernel scores a block of rows against the packed codebook, |c|^2 / 2 - z.c in float32 or bfloat16
//    products, and keeps the minimum of every group of four codes (kernels.h).
// 2. Certify: a screened score differs from the true one by no more than
//        |z - z~| |c|  +  |z~| |c - c~|  +  gamma (|z~| |c| + |c|^2 / 2)  +  tiny,
//    z~ and c~ being what the kernel read. The first two are Cauchy-Schwarz over what rounding really dropped,
//    measured while packing, two to three times less than the worst case; gamma bounds the float32 summation in
//    whatever order; tiny covers flushed subnormals. A group whose minimum less its bound exceeds the least
//    minimum plus its bound cannot hold the nearest code.
// 3. Re-score the groups that are left, one or two per row as a rule, in float64, and take the lowest index on a tie.
//
// The answer is thus float64's on every path. Rows for which bfloat16 leaves many groups (codes that crowd together
// far from the origin) are screened again in float32.
#include "nearest_code/nearest_code.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/threads.h"
#include "nearest_code/pack.h"

namespace movae {
namespace {

constexpr int kRows = 96;                  // rows per block: two thirds of a megabyte of minima and operands at D = 64
constexpr int kChunkPanels = 32;           // panels screened before their candidates are re-scored
constexpr int64_t kBlockBytes = 12 << 20;  // of packed codebook at a time
constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class Real>
struct Workspace {  // one thread's
    RowBlock<Real> rows;
    Buffer<float> minima;     // [padded rows][kChunkPanels * 16]
    Buffer<float> hard_rows;  // rows to be screened again, made contiguous
    float bound[kChunkPanels];
    uint16_t groups[kChunkPanels * kLanes];
    int hard[kRows], hard_count = 0;
    float norm_scale;        // 2^(a - b), by which the codes' norms enter the screened scores
    double norm_unit, unit;  // the same for re-scoring, and screening units over re-scoring units
    double best[kRows];
    int64_t index[kRows];
};

template <class Real>
class Search {
  public:
    Search(const RowsView& z, const Codebook& codebook, int64_t* index, bool exact, const Kernels& kernels, int threads)
        : z_(z), codebook_(codebook), index_(index), exact_(exact), kernels_(kernels), threads_(threads),
          depth_(static_cast<int>(z.depth)) {
        const double largest = largest_magnitude(codebook, kernels, threads);
        exponent_ = scale_exponent(largest);
        // Norms enter the scores as |c 2^b|^2 / 2 * 2^(a - b); this keeps them under 2^100, and the factor finite.
        const int room = largest == 0 ? 0 : 98 - std::ilogb(depth_) - 2 * (std::ilogb(largest) + exponent_);
        max_row_exponent_ = exponent_ + std::min(room, 120);
    }

    void run(const BlockDone& done) {
        const int64_t widened = item_size(codebook_.dtype) == 2 ? 4 : 0;
        const int64_t bytes_a_code = depth_ * (4 + widened + (kernels_.screening ? 2 : 0));
        const int64_t step = std::max<int64_t>(kBlockBytes / bytes_a_code / kPanel * kPanel, kChunkPanels * kPanel);
        const bool one_block = step >= codebook_.count;
        if (!one_block) best_.resize(z_.rows());
        for (int64_t first = 0; first < codebook_.count; first += step) {
            const int64_t count = std::min(step, codebook_.count - first);
            block_.pack(codebook_, first, count, exponent_, kernels_, threads_);
            pass(first == 0, one_block, first + count == codebook_.count ? done : BlockDone());
        }
    }

  private:
    // Every row against the packed block.
    void pass(bool first_block, bool one_block, const BlockDone& done) {
        const int64_t share = (z_.rows() + threads_ - 1) / threads_;
        const int size = static_cast<int>(std::min<int64_t>(kRows, (share + kRowStep - 1) / kRowStep * kRowStep));
        const int64_t blocks = (z_.rows() + size - 1) / size;
#pragma omp parallel num_threads(static_cast<int>(std::min<int64_t>(threads_, blocks)))
        {
            Workspace<Real> work;
            if (kernels_.tiles) amx_configure();
#pragma omp for schedule(dynamic)
            for (int64_t b = 0; b < blocks; ++b) {
                const int64_t first = b * size;
                const int rows = static_cast<int>(std::min<int64_t>(size, z_.rows() - first));
                for (int r = 0; r < rows; ++r) {
                    work.best[r] = first_block ? kInfinity : best_[first + r];
                    work.index[r] = first_block ? 0 : index_[first + r];
                }
                work.rows.load(z_, first, rows, max_row_exponent_, kernels_);
                search_block(work);
                std::copy(work.index, work.index + rows, index_ + first);
                if (!one_block) std::copy(work.best, work.best + rows, best_.get() + first);
                if (done) done(first, rows, work.index);
            }
            if (kernels_.tiles) amx_release();
        }
    }

    void search_block(Workspace<Real>& work) {
        const RowBlock<Real>& rows = work.rows;
        work.minima.resize(static_cast<int64_t>(rows.padded) * kChunkPanels * kLanes);
        if (kernels_.screening) work.rows.round(depth_, *kernels_.screening);
        // Never zero: the padding's infinite norms must stay infinite. certify() allows for what that adds.
        work.norm_scale = static_cast<float>(std::ldexp(1.0, std::max(rows.exponent - exponent_, -126)));
        // float64 rows are re-scored as scaled, others as they came.
        constexpr bool kScaled = std::is_same<Real, double>::value;
        work.norm_unit = kScaled ? std::ldexp(1.0, rows.exponent - exponent_) : 1.0;
        work.unit = kScaled ? 1.0 : std::ldexp(1.0, rows.exponent + exponent_);
        for (int64_t panel = 0; panel < block_.panels; panel += kChunkPanels) {
            const int panels = static_cast<int>(std::min<int64_t>(kChunkPanels, block_.panels - panel));
            screen(work, panel, panels);
            work.hard_count = 0;
            for (int r = 0; r < rows.rows; ++r) {
                if (rows.bad[r]) continue;
                const bool low = kernels_.screening != nullptr;
                const int found = certify(work, r, r, panel, panels, low);
                if (low && exact_ && found > 2 * panels)
                    work.hard[work.hard_count++] = r;
                else
                    rescore(work, r, panel, found);
            }
            if (work.hard_count) screen_again(work, panel, panels);
        }
    }

    // One panel stays in the first-level cache while the rows go by.
    void screen(Workspace<Real>& work, int64_t panel, int panels) {
        const RowBlock<Real>& rows = work.rows;
        const int64_t deep = (depth_ + kDepthStep - 1) / kDepthStep * kDepthStep;
        const float unit = work.norm_scale;
        for (int64_t p = panel; p < panel + panels; ++p) {
            float* minima = work.minima.get() + (p - panel) * kLanes;
            const float* norms = block_.half_norm.get() + p * kPanel;
            if (kernels_.screening)
                kernels_.screening->screen(rows.rounded.get(), deep, rows.rows, block_.panel16.get() + p * deep * kPanel, norms,
                                           unit, depth_, minima, kChunkPanels * kLanes);
            else
                kernels_.exact->screen(rows.screen, depth_, rows.rows, block_.panel32.get() + p * depth_ * kPanel, norms, unit,
                                       depth_, minima, kChunkPanels * kLanes);
        }
    }

    void screen_again(Workspace<Real>& work, int64_t panel, int panels) {
        const RowBlock<Real>& rows = work.rows;
        const int64_t padded = (work.hard_count + kRowStep - 1) / kRowStep * kRowStep;
        float* z = work.hard_rows.resize(padded * depth_);
        std::fill(z, z + padded * depth_, 0.0f);
        for (int i = 0; i < work.hard_count; ++i)
            std::copy_n(rows.screen + static_cast<int64_t>(work.hard[i]) * depth_, depth_, z + i * int64_t{depth_});
        for (int64_t p = panel; p < panel + panels; ++p)
            kernels_.exact->screen(z, depth_, work.hard_count, block_.panel32.get() + p * depth_ * kPanel,
                                   block_.half_norm.get() + p * kPanel, work.norm_scale, depth_,
                                   work.minima.get() + (p - panel) * kLanes, kChunkPanels * kLanes);
        for (int i = 0; i < work.hard_count; ++i)
            rescore(work, work.hard[i], panel, certify(work, work.hard[i], i, panel, panels, false));
    }

    // The groups of these panels that may hold row r's nearest code; its minima are number `slot`.
    int certify(Workspace<Real>& work, int r, int slot, int64_t panel, int panels, bool low) {
        const RowBlock<Real>& rows = work.rows;
        const float kept = low ? rows.norm16[r] : rows.norm32[r];
        const float dropped = low ? rows.dropped16[r] : rows.dropped32[r];
        // Products of bfloat16 pairs may be rounded once more before they are added.
        const float gamma = static_cast<float>((low ? 2 * depth_ + 16 : depth_ + 8) * 0x1.04p-24);
        const float tiny = static_cast<float>((depth_ + 8) * 0x1p-125);
        const float by_norm = dropped + gamma * kept + tiny, by_square = gamma * 0.5f * work.norm_scale + 0x1p-126f;
        const float constant = tiny * (1 + kept);
        const float* norm = block_.norm.get() + panel;
        const float* lost = (low ? block_.dropped16 : block_.dropped32).get() + panel;
        for (int p = 0; p < panels; ++p)
            work.bound[p] = exact_ ? norm[p] * (by_norm + by_square * norm[p]) + kept * lost[p] + constant : 0.0f;
        const float best = static_cast<float>(work.best[r] * work.unit);
        return kernels_.exact->candidates(work.minima.get() + static_cast<int64_t>(slot) * kChunkPanels * kLanes, work.bound,
                                          panels, best, work.groups);
    }

    void rescore(Workspace<Real>& work, int r, int64_t panel, int found) {
        const Real* z = work.rows.raw.get() + static_cast<int64_t>(r) * depth_;
        for (int i = 0; i < found; ++i) {
            const int64_t first = (panel + work.groups[i] / kLanes) * kPanel + work.groups[i] % kLanes;
            const Real* codes[kGroup];
            double product[kGroup];
            for (int j = 0; j < kGroup; ++j) {
                const int64_t code = first + j * kLanes;
                codes[j] = block_.rows + (code < block_.count ? code : 0) * depth_;
            }
            if constexpr (std::is_same<Real, double>::value)
                kernels_.exact->dot4_double(z, codes, depth_, product);
            else
                kernels_.exact->dot4(z, codes, depth_, product);
            for (int j = 0; j < kGroup; ++j) {
                const int64_t code = first + j * kLanes;
                if (code >= block_.count) break;
                const double score = block_.half_norm64[code] * work.norm_unit - product[j] * block_.rows_scale;
                const int64_t global = block_.first + code;
                if (score < work.best[r] || (score == work.best[r] && global < work.index[r] && score < kInfinity)) {
                    work.best[r] = score;
                    work.index[r] = global;
                }
            }
        }
    }

    const RowsView& z_;
    const Codebook& codebook_;
    int64_t* index_;
    const bool exact_;
    const Kernels& kernels_;
    const int threads_, depth_;
    int exponent_, max_row_exponent_;
    CodeBlock<Real> block_;
    Buffer<double> best_;  // of every row, where the codebook takes more than one pass
};

}  // namespace

void nearest_code(const RowsView& z, const Codebook& codebook, int64_t* index, bool exact, InstructionSet isa, int threads,
                  const BlockDone& done) {
    if (z.rows() == 0) return;
    const Kernels kernels = kernels_of(isa);
    threads = useful_threads(threads, z.rows() * codebook.count * z.depth / 16);  // 16 a vector instruction
    if (z.dtype == Dtype::kFloat64)
        Search<double>(z, codebook, index, exact, kernels, threads).run(done);
    else
        Search<float>(z, codebook, index, exact, kernels, threads).run(done);
}

}  // namespace movae
