// Runs the Gramian, the projection and the weighted sum over odd shapes, dtypes and paths, in buffers of exactly the size
// they need, and checks the answers. Meant for the sanitizers.
#include <omp.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gramian/gramian.h"
#include "projection/project_weights.h"
#include "weightings/gramian_weights.h"

using namespace movae;

namespace {

int failures = 0;
std::mt19937 generator(0);

void expect(bool ok, const char* what, int64_t m, int64_t columns, const std::string& path) {
    if (ok) return;
    ++failures;
    std::printf("%s: m=%d columns=%d %s\n", what, int(m), int(columns), path.c_str());
}

// Small integers: exact in every dtype, and so are their products' sums.
void rows_of(int64_t m, int64_t columns, Dtype dtype, InstructionSet isa) {
    const int64_t n = m * columns, size = item_size(dtype);
    std::unique_ptr<unsigned char[]> bytes(new unsigned char[n * size]), out(new unsigned char[columns * size]);
    std::vector<double> values(n), weights(m);
    for (int64_t k = 0; k < n; ++k) {
        values[k] = int(generator() % 5) - 2;
        const float single = float(values[k]);
        const uint16_t bfloat = to_bfloat16(single), half = to_half(single);
        std::memcpy(bytes.get() + k * size,
                    dtype == Dtype::kFloat64   ? static_cast<const void*>(&values[k])
                    : dtype == Dtype::kFloat32 ? static_cast<const void*>(&single)
                    : dtype == Dtype::kFloat16 ? static_cast<const void*>(&half)
                                               : static_cast<const void*>(&bfloat),
                    size);
    }
    for (double& w : weights) w = int(generator() % 3) - 1;
    const Rows rows = {bytes.get(), dtype, m, columns, columns};
    std::unique_ptr<double[]> G(new double[m * m]);
    for (int threads : {1, 2}) {
        gramian(rows, G.get(), isa, threads);
        bool exact = true;
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < m; ++j) {
                double sum = 0;
                for (int64_t k = 0; k < columns; ++k) sum += values[i * columns + k] * values[j * columns + k];
                exact = exact && G[i * m + j] == sum;
            }
        expect(exact, "gramian", m, columns, name_of(isa));
        combine(rows, weights.data(), out.get(), isa, threads);
        exact = true;
        for (int64_t k = 0; k < columns; ++k) {
            double sum = 0;
            for (int64_t i = 0; i < m; ++i) sum += weights[i] * values[i * columns + k];
            unsigned char wanted[8];
            const float single = float(sum);
            const uint16_t bfloat = to_bfloat16(single), half = to_half(single);
            std::memcpy(wanted, dtype == Dtype::kFloat64   ? static_cast<const void*>(&sum)
                                : dtype == Dtype::kFloat32 ? static_cast<const void*>(&single)
                                : dtype == Dtype::kFloat16 ? static_cast<const void*>(&half)
                                                           : static_cast<const void*>(&bfloat), size);
            // A negative zero is a zero.
            exact = exact && (sum == 0 || std::memcmp(wanted, out.get() + k * size, size) == 0);
        }
        expect(exact, "combine", m, columns, name_of(isa));
    }
}

void projection_of(int m, int rank, InstructionSet isa) {
    std::normal_distribution<double> normal;
    std::vector<double> J(m * rank);
    std::unique_ptr<double[]> G(new double[m * m]), u(new double[3 * m]), v(new double[3 * m]), w(new double[m]);
    for (double& x : J) x = normal(generator);
    for (int i = 0; i < m; ++i)
        for (int j = 0; j < m; ++j) {
            G[i * m + j] = 0;
            for (int k = 0; k < rank; ++k) G[i * m + j] += J[i * rank + k] * J[j * rank + k];
        }
    for (int k = 0; k < 3 * m; ++k) u[k] = normal(generator);
    double trace = 0;
    for (int i = 0; i < m; ++i) trace += G[i * m + i];
    for (int threads : {1, 2}) {
        const auto solved = [&](ProjectionMode mode, int rows, double* out) {
            return project({G.get(), m, false, 0, 1e-6, mode, u.get(), rows, out}, isa, threads);
        };
        int status = solved(ProjectionMode::rows, 3, v.get());
        for (int r = 0; r < 3; ++r)
            for (int i = 0; i < m; ++i) {
                double y = 1e-6 * v[r * m + i];
                for (int j = 0; j < m; ++j) y += G[i * m + j] / trace * v[r * m + j];
                const double residual = std::fmin(v[r * m + i] - u[r * m + i], y);
                if (!(std::fabs(residual) < 1e-9)) status = 99;
            }
        expect(status == 0, "projection of rows", m, rank, name_of(isa));
        status = solved(ProjectionMode::sum, 1, w.get());
        for (int k = 0; k < m; ++k)
            if (!std::isfinite(w[k])) status = 99;
        expect(status == 0, "sum of projections", m, rank, name_of(isa));
        G[m * m - 1] = NAN;
        expect(solved(ProjectionMode::sum, 1, w.get()) == -1, "NaN", m, rank, name_of(isa));
        G[m * m - 1] = 0;
        for (int k = 0; k < rank; ++k) G[m * m - 1] += J[(m - 1) * rank + k] * J[(m - 1) * rank + k];
    }
}

// One thread alone, and one of four that meet at every sync: a warp in slow motion.
struct Four {
    int number;
    int rank() const { return number; }
    int size() const { return 4; }
    void sync() const {
#pragma omp barrier
    }
};

// Every weighting, alone and by four, to the last bit the same and finite.
void weightings_of(int m, int rank, bool zero_row) {
    std::vector<double> J(m * rank);
    for (double& x : J) x = int(generator() % 7) - 3;
    for (int k = 0; k < rank && zero_row; ++k) J[k] = 0;
    std::unique_ptr<double[]> G(new double[m * m]), pref(new double[m]), out(new double[m]), again(new double[m]);
    std::unique_ptr<int64_t[]> order(new int64_t[m * m]);
    for (int i = 0; i < m; ++i) {
        pref[i] = 1 + i;
        for (int j = 0; j < m; ++j) {
            order[i * m + j] = (j + i) % m;
            G[i * m + j] = 0;
            for (int k = 0; k < rank; ++k) G[i * m + j] += J[i * rank + k] * J[j * rank + k];
        }
    }
    std::unique_ptr<double[]> scratch(new double[weightings::scratch_size(m)]);
    for (int method = 0; method < 7; ++method) {
        const bool aligned = method < 3;
        WeightingTask task = {static_cast<Method>(method), m, G.get(), aligned ? pref.get() : nullptr, order.get(), 0.5,
                              1e-4, 20, out.get()};
        weightings::weigh(OneThread(), task, scratch.get());
        task.out = again.get();
#pragma omp parallel num_threads(4)
        weightings::weigh(Four{omp_get_thread_num()}, task, scratch.get());
        bool right = true;
        for (int i = 0; i < m; ++i) right = right && std::isfinite(out[i]) && out[i] == again[i];
        expect(right, "weighting", m, rank, std::to_string(method));
    }
    // An order from outside that names no row: that row's weight is NaN, and nothing outside is read or written.
    for (int64_t bad : {int64_t(-1), int64_t(m), int64_t(1) << 32, int64_t(1) << 62}) {
        order[0] = bad;
        weightings::weigh(OneThread(), {Method::kPcgrad, m, G.get(), nullptr, order.get(), 0, 0, 0, out.get()}, scratch.get());
        expect(std::isnan(out[0]), "order from outside", m, rank, std::to_string(bad));
    }
}

}  // namespace

int main() {
    for (int m : {1, 2, 3, 4, 7, 9})
        for (int rank : {1, (m + 1) / 2, 2 * m})
            for (bool zero_row : {false, true}) weightings_of(m, rank, zero_row);

    for (const InstructionSet isa : available_isas()) {
        if (isa != vectors_of(isa)) continue;
        std::printf("%s\n", name_of(isa));
        for (Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBfloat16, Dtype::kFloat16})
            for (int64_t m : {1, 2, 3, 4, 5, 7, 8, 9, 17})
                for (int64_t columns : {0, 1, 7, 64, 65, 1031, 40000})
                    if (m * columns < 200000) rows_of(m, columns, dtype, isa);
        for (int m : {1, 2, 3, 5, 8, 9, 31, 64, 70})
            for (int rank : {1, (m + 1) / 2, 2 * m}) projection_of(m, rank, isa);
    }
    std::printf("%d failures\n", failures);
    return failures != 0;
}
