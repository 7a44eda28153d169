// The weightings by a team of four threads, as a warp works on CUDA, against one thread: the same bits. Under
// ThreadSanitizer two threads that touch one place without a sync between them, one of them writing, are an error.
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "weightings/gramian_weights.h"

using namespace movae;

namespace {

constexpr int kThreads = 4;

struct Barrier {
    std::mutex mutex;
    std::condition_variable all_here;
    int here = 0;
    long turn = 0;

    void wait() {
        std::unique_lock<std::mutex> lock(mutex);
        if (++here == kThreads) {
            here = 0, ++turn;
            all_here.notify_all();
            return;
        }
        const long mine = turn;
        all_here.wait(lock, [&] { return turn != mine; });
    }
};

struct Team {
    int number;
    Barrier* barrier;
    int rank() const { return number; }
    int size() const { return kThreads; }
    void sync() const { barrier->wait(); }
};

}  // namespace

int main() {
    std::mt19937 random(0);
    std::normal_distribution<double> normal;
    int failures = 0, compared = 0;
    for (int m = 1; m <= 7; ++m) {
        std::vector<double> J(m * 20), G(m * m), pref(m, 1.0 / m);
        for (double& x : J) x = normal(random);
        for (int i = 0; i < m; ++i)
            for (int j = 0; j < m; ++j)
                for (int k = 0; k < 20; ++k) G[i * m + j] += J[i * 20 + k] * J[j * 20 + k];
        std::vector<int64_t> order(m * m);
        for (int i = 0; i < m * m; ++i) order[i] = (i / m + i) % m;
        for (int method = 0; method <= static_cast<int>(Method::kPcgrad); ++method) {
            const bool cagrad = method == static_cast<int>(Method::kCagrad);
            std::vector<double> out(m), expected(m), scratch(weightings::scratch_size(m));
            WeightingTask task{static_cast<Method>(method), m, G.data(), pref.data(), order.data(),
                               cagrad ? 0.5 : 1e-3, cagrad ? 1e-4 : 0, 10, expected.data()};
            weightings::weigh(OneThread(), task, scratch.data());
            task.out = out.data();
            Barrier barrier;
            std::vector<std::thread> threads;
            for (int i = 0; i < kThreads; ++i)
                threads.emplace_back([&, i] { weightings::weigh(Team{i, &barrier}, task, scratch.data()); });
            for (std::thread& thread : threads) thread.join();
            ++compared;
            if (std::memcmp(out.data(), expected.data(), m * sizeof(double)) != 0) {
                ++failures;
                std::printf("m %d method %d differs\n", m, method);
            }
        }
    }
    // An order from outside that names no row: the weight says so, and nothing outside the Gramian is touched.
    for (int64_t bad : {int64_t(-1), int64_t(3), int64_t(1) << 32, int64_t(1) << 62, -(int64_t(1) << 62)}) {
        const std::vector<double> G = {2, -1, 0, -1, 2, 0, 0, 0, 1};
        const std::vector<int64_t> order = {0, 1, 2, bad, 0, 2, 2, 0, 1};
        std::vector<double> out(3), scratch(weightings::scratch_size(3));
        weightings::weigh(OneThread(), {Method::kPcgrad, 3, G.data(), nullptr, order.data(), 0, 0, 0, out.data()}, scratch.data());
        ++compared;
        if (out[0] != out[0] || out[1] == out[1] || out[2] != out[2]) {
            ++failures;
            std::printf("order %ld: weights %g %g %g\n", long(bad), out[0], out[1], out[2]);
        }
    }
    std::printf("%d compared, %d failures\n", compared, failures);
    return failures != 0;
}
