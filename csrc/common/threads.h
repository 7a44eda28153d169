// How many threads a problem is worth.
#pragma once

#include <cstdint>

namespace movae {

// Waking a thread costs what about 10^5 operations cost; a small problem is not worth it.
inline int useful_threads(int threads, int64_t operations) {
    const int64_t useful = 1 + (operations >> 17);
    return static_cast<int>(useful < threads ? useful : threads < 1 ? 1 : threads);
}

}  // namespace movae
