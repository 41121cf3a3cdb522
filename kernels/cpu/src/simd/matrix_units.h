// AMX: matrix units that multiply bfloat16, with eight tile registers of 16 rows of 64 bytes. Other instruction sets
// read tables in the layout that suits it.
#pragma once

#include <cstdint>

#include "simd/isa.h"

#if CSAE_X86
#if !defined(__clang__)
// GCC's own header leaves the unused operand of some intrinsics uninitialised on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace csae {

// A tile register holds 16 x 32 numbers of the left operand, or 16 pairs of numbers of each of 16 columns of the right
// one, or 16 x 16 float sums. Four tiles of sums are a square, side x side.
constexpr int64_t tile = 16, depth = 32, side = 2 * tile;

inline void no_units() {}

#if CSAE_HAS_AMX

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {tile, tile, tile, tile, tile, tile, tile, tile};
};

// Not a local variable: GCC believes that the instruction reads 8 bytes only, and would drop the stores of the others.
inline constexpr TileConfig eight_tiles;

CSAE_AMX inline void begin_amx() { _tile_loadconfig(&eight_tiles); }

CSAE_AMX inline void end_amx() { _tile_release(); }

#endif

}  // namespace csae
