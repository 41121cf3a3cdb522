// Candidates for the k largest pre-activations of each row, by upper bounds that are products of bfloat16.
//
// A thread takes a share of x's rows, and goes through the table in parts that fit L2. One step multiplies 32 rows of
// x, which stay in L1, by 32 rows of the table, and sums in float: on AMX four tiles of 16 x 16, 8192 products an
// instruction; with AVX512-BF16 11 rows of x by 32 of the table at a time, 32 products an instruction. The square of
// sums is compared with the rows' thresholds right after, so non-candidates (all but one in 80) never leave L1.
//
// Operations: 2 n F d in bfloat16. Bytes: the table's 2 F d once for each share. Floor: two threads of a Xeon with AMX
// multiply 3.6 T a second on tiles in L1, which is 12.6 ms for n = 2048, F = 18432, d = 608. Measured there: 16 to 18
// ms without candidates, 19 to 21 ms with 220 candidates a row. One thread of a Zen 4 core, with AVX512-BF16, for
// n = 2048, F = 4608, d = 608: 52 ms without candidates, where PyTorch's product in bfloat16 takes 58 ms.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "csae_cpu.h"
#include "parallel.h"
#include "simd/isa.h"
#include "simd/matrix_units.h"
#include "simd/register.h"
#include "topk/topk_list.h"
#include "topk/topk_scan.h"

namespace csae {
namespace {

// The most rows of x that a thread takes, and the bytes of a part of the table.
constexpr int64_t rows_a_piece = 1024, bytes_in_l2 = 640 << 10;

// The sums of 32 rows of x by 32 rows of the table.
struct alignas(64) Square {
    float sums[side * side];
    float thresholds[side];  // of the rows
    uint32_t hits[side];     // for each row, a bit for each column that is not below the threshold, or NaN
};

struct Units {
    void (*begin)();
    void (*end)();
    // Fills the square from 32 rows of x and two blocks of the table. `columns`: a bit for each existing column.
    // Returns a bit for each row with hits.
    uint32_t (*multiply)(const BFloat16* x, int64_t x_stride, const BFloat16* first, const BFloat16* second,
                         int64_t width, uint32_t columns, Square& square);
};

// --- portable ----------------------------------------------------------------------------------------------

uint32_t multiply_portable(const BFloat16* x, int64_t x_stride, const BFloat16* first, const BFloat16* second,
                           int64_t width, uint32_t columns, Square& square) {
    uint32_t any = 0;
    for (int64_t i = 0; i < side; ++i) {
        const BFloat16* row = x + i * x_stride;
        float* sums = square.sums + i * side;
        std::fill_n(sums, side, 0.0f);
        for (int64_t c = 0; c < width; ++c) {
            const float number = load<1>(row + c).x[0];
            const int64_t at = c / 2 * side + c % 2;
            for (int64_t j = 0; j < tile; ++j) sums[j] += number * load<1>(first + at + 2 * j).x[0];
            for (int64_t j = 0; j < tile; ++j) sums[tile + j] += number * load<1>(second + at + 2 * j).x[0];
        }
        uint32_t hits = 0;
        for (int64_t j = 0; j < side; ++j) hits |= static_cast<uint32_t>(!(sums[j] < square.thresholds[i])) << j;
        square.hits[i] = hits & columns;
        any |= static_cast<uint32_t>(square.hits[i] != 0) << i;
    }
    return any;
}

constexpr Units portable = {no_units, no_units, multiply_portable};

// --- AVX-512 -----------------------------------------------------------------------------------------------

#if CSAE_X86

// Fills the hits of a square from its sums. Returns a bit for each row with hits.
CSAE_AVX512 inline uint32_t compare(uint32_t columns, Square& square) {
    uint32_t any = 0;
    for (int64_t i = 0; i < side; ++i) {
        const __m512 threshold = _mm512_set1_ps(square.thresholds[i]);
        const __m512 low = _mm512_load_ps(square.sums + i * side), high = _mm512_load_ps(square.sums + i * side + tile);
        const __mmask32 hits = _mm512_kunpackw(_mm512_cmp_ps_mask(high, threshold, _CMP_NLT_UQ),
                                               _mm512_cmp_ps_mask(low, threshold, _CMP_NLT_UQ));
        square.hits[i] = _cvtmask32_u32(hits) & columns;
        any |= static_cast<uint32_t>(square.hits[i] != 0) << i;
    }
    return any;
}

#endif

// --- AVX512-BF16 -------------------------------------------------------------------------------------------

#if CSAE_HAS_BF16

// `rows` rows of x by two blocks of the table: sums stay in registers.
template <int rows>
CSAE_BF16 inline void multiply_rows(const BFloat16* x, int64_t x_stride, const BFloat16* first, const BFloat16* second,
                                    int64_t width, float* sums) {
    __m512 low[rows], high[rows];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) low[r] = high[r] = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += 2) {
        const auto a = (__m512bh)_mm512_loadu_si512(first + c * tile);  // [16, 2]
        const auto b = (__m512bh)_mm512_loadu_si512(second + c * tile);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            int32_t pair;
            std::memcpy(&pair, x + r * x_stride + c, sizeof pair);
            const auto both = (__m512bh)_mm512_set1_epi32(pair);
            low[r] = _mm512_dpbf16_ps(low[r], both, a);
            high[r] = _mm512_dpbf16_ps(high[r], both, b);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
        _mm512_store_ps(sums + r * side, low[r]);
        _mm512_store_ps(sums + r * side + tile, high[r]);
    }
}

CSAE_BF16 uint32_t multiply_bf16(const BFloat16* x, int64_t x_stride, const BFloat16* first, const BFloat16* second,
                                 int64_t width, uint32_t columns, Square& square) {
    // 22 registers of sums hide what a product waits for, and leave room for its operands.
    multiply_rows<11>(x, x_stride, first, second, width, square.sums);
    multiply_rows<11>(x + 11 * x_stride, x_stride, first, second, width, square.sums + 11 * side);
    multiply_rows<10>(x + 22 * x_stride, x_stride, first, second, width, square.sums + 22 * side);
    return compare(columns, square);
}

constexpr Units bf16 = {no_units, no_units, multiply_bf16};

#endif

// --- AMX ---------------------------------------------------------------------------------------------------

#if CSAE_HAS_AMX

CSAE_AMX uint32_t multiply_amx(const BFloat16* x, int64_t x_stride, const BFloat16* first, const BFloat16* second,
                               int64_t width, uint32_t columns, Square& square) {
    const int64_t x_bytes = x_stride * 2, sums_bytes = side * 4;
    // A tile store takes 1000 cycles if the last one was 1700 cycles ago, so there is a dummy store every 500.
    alignas(64) BFloat16 unused[tile * depth];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < width; c += depth) {
        if (c / depth % 8 == 7) _tile_stored(7, unused, 64);
        _tile_loadd(4, x + c, x_bytes);        // [16, 32]
        _tile_loadd(6, first + c * tile, 64);  // [16, 16, 2]
        _tile_loadd(5, x + tile * x_stride + c, x_bytes);
        _tile_loadd(7, second + c * tile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, square.sums, sums_bytes);
    _tile_stored(1, square.sums + tile, sums_bytes);
    _tile_stored(2, square.sums + tile * side, sums_bytes);
    _tile_stored(3, square.sums + tile * side + tile, sums_bytes);
    return compare(columns, square);
}

constexpr Units amx = {begin_amx, end_amx, multiply_amx};

#endif

const Units& units() {
#if CSAE_HAS_AMX
    if (current_isa() == Isa::amx) return amx;
#endif
#if CSAE_HAS_BF16
    if (current_isa() == Isa::bf16) return bf16;
#endif
    return portable;
}

// -----------------------------------------------------------------------------------------------------------

// A row without a bias to add: the counterpart of Sums.
struct PlainRow {
    const float* row;
};

template <int W>
CSAE_INLINE Register<W> at(const PlainRow& values, int64_t c) {
    return load<W>(values.row + c);
}

struct Add {
    const csae_topk& to;
    const BFloat16* x;
    int64_t x_stride;
    const BFloat16* table;
    int64_t width, columns, first_column;
    const TopkScan& scan;
    const Units& units;

    // Multiplies rows i to i + 31 of x by rows first .. last of the table. x_here: those 32 rows, padded if n ends
    // before.
    void panel(int64_t i, const BFloat16* x_here, int64_t stride, int64_t first, int64_t last, Square& square) const {
        const int64_t rows = std::min(side, to.n - i), limit = to.capacity - block_width;
        for (int64_t r = 0; r < side; ++r) square.thresholds[r] = r < rows ? to.threshold[i + r] : INFINITY;
        const uint32_t taken = ~uint32_t{0} >> (side - rows);
        for (int64_t f = first; f < last; f += side) {
            const uint32_t existing = ~uint32_t{0} >> (side - std::min(side, last - f));
            const BFloat16* block = table + f * width;
            const BFloat16* second = last - f > tile ? block + tile * width : block;
            uint32_t any = units.multiply(x_here, stride, block, second, width, existing, square) & taken;
            for (; any != 0; any &= any - 1) {
                const int64_t r = __builtin_ctz(any);
                Candidates candidates(to, i + r);
                if (candidates.count == broken) continue;
                if (candidates.count > limit) square.thresholds[r] = candidates.prune(scan, to.k);
                const bool nan = candidates.append(PlainRow{square.sums + r * side}, square.hits[r], first_column + f);
                to.count[i + r] = nan ? broken : static_cast<int32_t>(candidates.count);
            }
        }
        std::copy_n(square.thresholds, rows, to.threshold + i);
    }

    // Adds all columns to rows begin .. end. last_rows: 32 zeroed rows, to pad the last ones.
    void piece(int64_t begin, int64_t end, BFloat16* last_rows) const {
        Square square;
        if (end % side != 0) {
            const int64_t i = end / side * side;
            for (int64_t r = 0; r < end - i; ++r) std::copy_n(x + (i + r) * x_stride, width, last_rows + r * width);
        }
        const int64_t row_bytes = 2 * std::max(width, depth);
        const int64_t rows_in_l2 = std::max(side, bytes_in_l2 / row_bytes / side * side);
        units.begin();
        for (int64_t first = 0; first < columns; first += rows_in_l2) {
            const int64_t last = std::min(columns, first + rows_in_l2);
            for (int64_t i = begin; i < end; i += side) {
                if (i + side <= end) {
                    panel(i, x + i * x_stride, x_stride, first, last, square);
                } else {
                    panel(i, last_rows, width, first, last, square);
                }
            }
        }
        units.end();
    }
};

}  // namespace
}  // namespace csae

int csae_topk_add_products(const csae_topk* best, const void* x, int64_t x_stride, const void* table, int64_t width,
                           int64_t columns, int64_t first_column, int n_threads) {
    if (!csae::addable(best, columns, first_column) || n_threads < 1) return csae_bad_argument;
    if (width < 0 || width % csae::depth != 0 || x_stride < 0) return csae_bad_argument;
    const int64_t n = best->n;
    if (n == 0 || columns == 0) return csae_ok;
    if (width > 0 && (x == nullptr || table == nullptr)) return csae_bad_argument;
    try {
        const int64_t room = csae::side * width;
        // Only the last piece can end inside a square, so only one thread writes to last_rows.
        std::unique_ptr<csae::BFloat16[]> last_rows(new csae::BFloat16[room]());
        const auto *rows = static_cast<const csae::BFloat16*>(x), *blocks = static_cast<const csae::BFloat16*>(table);
        const csae::Add add{*best,   rows,         x_stride,          blocks,       width,
                            columns, first_column, csae::topk_scan(), csae::units()};
        // Each piece reads the whole table, so a piece is a thread's whole share, up to rows_a_piece.
        const int64_t share = (n + n_threads - 1) / n_threads;
        const int64_t piece = std::min((share + csae::side - 1) / csae::side * csae::side, csae::rows_a_piece);
        csae::parallel_for(n, piece, n_threads,
                           [&](int, int64_t begin, int64_t end) { add.piece(begin, end, last_rows.get()); });
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return csae_ok;
}
