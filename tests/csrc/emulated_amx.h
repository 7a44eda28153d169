// AMX's tile instructions in plain C++, for the bfloat16 product that csrc/nearest_code/amx.cpp takes: eight tiles of
// 16 rows x 64 bytes, configured so and no other way.
#pragma once

#include <cassert>
#include <cstdint>
#include <cstring>

namespace emulated_amx {

struct Tile {
    unsigned char row[16][64];
};
struct State {
    Tile tile[8];
    bool configured = false;
};
inline thread_local State state;

inline void load_config(const void* config) {
    const unsigned char* bytes = static_cast<const unsigned char*>(config);
    assert(bytes[0] == 1);
    for (int t = 0; t < 8; ++t) {
        uint16_t row_bytes;
        std::memcpy(&row_bytes, bytes + 16 + 2 * t, 2);
        assert(row_bytes == 64 && bytes[48 + t] == 16);
    }
    state.configured = true;
}

inline void load(int tile, const void* from, long stride) {
    assert(state.configured);
    for (int r = 0; r < 16; ++r) std::memcpy(state.tile[tile].row[r], static_cast<const char*>(from) + r * stride, 64);
}

inline void store(int tile, void* to, long stride) {
    assert(state.configured);
    for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, state.tile[tile].row[r], 64);
}

inline float number(const unsigned char* bfloat16) {
    uint16_t half;
    std::memcpy(&half, bfloat16, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void dot(int sum, int a, int b) {
    assert(state.configured);
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            float total;
            std::memcpy(&total, state.tile[sum].row[m] + 4 * n, 4);
            for (int k = 0; k < 16; ++k)
                for (int i = 0; i < 2; ++i)
                    total += number(state.tile[a].row[m] + 4 * k + 2 * i) *
                             number(state.tile[b].row[k] + 4 * n + 2 * i);
            std::memcpy(state.tile[sum].row[m] + 4 * n, &total, 4);
        }
}

}  // namespace emulated_amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated_amx::load_config(config)
#define _tile_release() (emulated_amx::state.configured = false)
#define _tile_loadd(tile, from, stride) emulated_amx::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated_amx::store(tile, to, stride)
#define _tile_dpbf16ps(sum, a, b) emulated_amx::dot(sum, a, b)
