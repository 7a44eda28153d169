// Every entry point in buffers of exactly the size that Python gives them, for AddressSanitizer and ThreadSanitizer.
// Arguments: the numbers of rows to try.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "entry.h"

int main(int count, char** sizes) {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    int failures = 0, calls = 0;
    const auto called = [&](int error, const char* what, int m) {
        ++calls;
        if (error) std::printf("%s, m = %d failed\n", what, m), ++failures;
    };
    for (int a = 1; a < count; ++a) {
        const int m = std::atoi(sizes[a]);
        const int64_t columns = m < 9 ? 700 : 100;
        std::vector<float> rows(m * columns);
        for (float& x : rows) x = normal(random);
        for (int64_t c = 0; c < columns; ++c) {  // rows that conflict
            float mean = 0;
            for (int i = 0; i < m; ++i) mean += rows[i * columns + c] / m;
            for (int i = 0; i < m; ++i) rows[i * columns + c] -= 0.9f * mean;
        }
        std::vector<double> gramian(m * m), pref(m, 1.0 / m), weights(m);
        int32_t status = 0;
        for (int diagonal = 0; diagonal < 2; ++diagonal) {
            for (int sum = 0; sum < 2; ++sum) {
                std::vector<double> scratch(scratch_of_upgrad(m));
                called(upgrad(rows.data(), 0, m, columns, columns, pref.data(), sum, diagonal, 0, 1e-6, weights.data(),
                              gramian.data(), &status, scratch.data()) || status != 0, "upgrad", m);
            }
            for (int mode = 0; mode < 3; ++mode) {
                const int problems = mode == 1 ? m : 3;
                std::vector<double> given(mode == 1 ? m : 3 * m), out(given.size());
                std::vector<double> scratch(scratch_of_projection(m, problems));
                for (double& x : given) x = mode == 1 ? 1.0 / m : normal(random);
                called(project(gramian.data(), m, given.data(), mode == 1 ? 1 : 3, mode, diagonal, 0, 1e-6, out.data(), &status,
                               scratch.data()) || status != 0, "project", m);
            }
        }
        std::vector<int64_t> order(m * m);
        for (int i = 0; i < m * m; ++i) order[i] = (i / m + i) % m;
        for (int method = 0; method < 7; ++method) {
            std::vector<double> scratch(scratch_of_weightings(m));
            const bool cagrad = method == 3;
            called(weigh(method, m, gramian.data(), method < 3 ? pref.data() : nullptr, method == 6 ? order.data() : nullptr,
                         cagrad ? 0.5 : 1e-3, cagrad ? 1e-4 : 0, 10, weights.data(), scratch.data()), "weigh", m);
        }
    }
    std::printf("%d calls, %d failures\n", calls, failures);
    return failures != 0;
}
