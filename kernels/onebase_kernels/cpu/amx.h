// Intel's matrix tiles, as nf4_linear.cpp uses them: tiles 0 to 5 sum up, 6 holds inputs, 7 weights.
#pragma once

#include <cstdint>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace onebase {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Full tiles for as long as it lives; one for each thread that computes.
class Tiles {
public:
    Tiles() {
        static const TileConfig config;
        asm volatile("" : : "r"(&config) : "memory");  // gcc 12 believes that only its first bytes are read
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

// Asks the kernel for the tiles' state, once for the process; false where it refuses.
inline bool request_tiles() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
}

}  // namespace onebase
