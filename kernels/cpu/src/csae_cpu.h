// What the library exports: a C ABI, called through ctypes.
//
// Matrices are row-major with contiguous rows, and a stride between rows in elements. Outputs must not overlap inputs.
// Functions on matrices return a csae_status. If it is not `csae_ok`, the content of outputs is undefined, and nothing
// out of bounds was touched. Results have the same bits for any number of threads.
#pragma once

#include <cstdint>

#define CSAE_EXPORT extern "C" __attribute__((visibility("default")))

enum csae_status : int {
    csae_ok = 0,
    csae_bad_argument = 1,
    csae_out_of_memory = 2,
    csae_bad_index = 3,     // an index is outside of [0, d_sae)
    csae_out_of_range = 4,  // a number is too large or not finite (csae_multiply)
};

// Increased whenever a signature below changes; the loader refuses a library of another version.
CSAE_EXPORT const int csae_abi_version;

// The instruction set in use: 0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 and AMX. The best that this CPU has is chosen at
// load. csae_use_isa is for tests; it refuses an instruction set that this CPU lacks.
CSAE_EXPORT int csae_isa();
CSAE_EXPORT int csae_use_isa(int isa);

// Use the threads of the OpenMP runtime with this GOMP_parallel (see parallel.h), or std::thread if null.
CSAE_EXPORT void csae_use_openmp(void* gomp_parallel);

// The file name of that runtime, or null.
CSAE_EXPORT const char* csae_openmp_file();

// Ask the system for huge pages in fresh memory for a result. Only whole huge pages inside of it are affected.
CSAE_EXPORT void csae_use_huge_pages(void* memory, int64_t bytes);

// Streaming top-k: the candidates so far for the k largest of each of n rows, whose columns are added in tiles. Before
// the first tile: threshold [n] = -inf, count [n] = 0, order and columns [n, capacity] uninitialised. capacity >= k +
// 64; with a larger capacity, lists are pruned to their k largest less often.
struct csae_topk {
    int32_t *order, *columns;
    float* threshold;
    int32_t* count;
    int64_t n, k, capacity;
};

// The element type of a matrix that may have either.
enum csae_type : int { csae_float32 = 0, csae_bfloat16 = 1 };

// Adds pre_acts [n, width] + bias [width] as columns first_column .. first_column + width. Tiles must come in column
// order; columns are below 2^31. pre_acts is not written to.
CSAE_EXPORT int csae_topk_add(const csae_topk* best, const float* pre_acts, int64_t pre_acts_stride, const float* bias,
                              int64_t width, int64_t first_column, int n_threads);

// values [n, k], indices [n, k] = the k largest of each row, relu'd after the selection. Largest first, equal ones
// (-0.0 and 0.0 are equal) by lower index first. A row with a NaN gives k NaN at indices 0..k-1. At least k columns
// must have been added. `best` can't be used afterwards.
CSAE_EXPORT int csae_topk_finish(const csae_topk* best, float* values, int64_t values_stride, int64_t* indices,
                                 int64_t indices_stride, int n_threads);

// For a selection by upper bounds, which csae_topk_settle finishes: computes and adds a tile of upper bounds of
// pre-activations, x [n, width] table^T, both bfloat16. table: rows first_column .. first_column + columns, in the
// layout of csae_round_pairs; width is a multiple of 32. Thresholds may start at any number: a column whose bound is
// below the row's threshold is no candidate.
CSAE_EXPORT int csae_topk_add_products(const csae_topk* best, const void* x, int64_t x_stride, const void* table,
                                       int64_t width, int64_t columns, int64_t first_column, int n_threads);

// values, indices [n, k] = the k largest of each row of x table^T + bias in float32, ordered as by csae_topk_finish,
// from the best->k > k candidates with the largest bounds. x [n, d], table [d_sae, d] of `type`, bias [d_sae]. settled
// [n]: 1 if it is proven that no other column is among the k largest; if 0, the row's values and indices are not
// filled. A row with more than best->k candidates is pruned to best->k, which raises its threshold.
CSAE_EXPORT int csae_topk_settle(const csae_topk* best, int64_t k, const float* x, int64_t x_stride, const void* table,
                                 int64_t table_stride, int64_t d_sae, int64_t d, int type, const float* bias,
                                 float* values, int64_t values_stride, int64_t* indices, int64_t indices_stride,
                                 uint8_t* settled, int n_threads);

// The columns that are selected: floor < v, and v < ceiling where ceiling is not null; a number for each column. floor is
// zero or more, or NaN, which selects nothing.
struct csae_band {
    const float *floor, *ceiling;
};

// As csae_topk_add, for the columns in the band (whose numbers are those of the tile's columns).
CSAE_EXPORT int csae_above_add(const csae_topk* best, const csae_band* band, const float* pre_acts,
                               int64_t pre_acts_stride, const float* bias, int64_t width, int64_t first_column,
                               int n_threads);

// As csae_topk_finish, of rows that may have fewer than k; behind the last, values and indices are 0.
CSAE_EXPORT int csae_above_finish(const csae_topk* best, float* values, int64_t values_stride, int64_t* indices,
                                  int64_t indices_stride, int n_threads);

// As csae_topk_settle, for the columns in the band: up to k <= best->k of them, from the candidates that
// csae_topk_add_products found with thresholds that started at `start`. of_values: whether bounds are of what is
// selected by; if not, only that a candidate of a bound below `start` is not in the band, and a row that was pruned is
// not settled.
CSAE_EXPORT int csae_above_settle(const csae_topk* best, const csae_band* band, int64_t k, float start, int of_values,
                                  const float* x, int64_t x_stride, const void* table, int64_t table_stride,
                                  int64_t d_sae, int64_t d, int type, const float* bias, float* values,
                                  int64_t values_stride, int64_t* indices, int64_t indices_stride, uint8_t* settled,
                                  int n_threads);

// Of values [n, k], each row descending and ending at the first number that is not above zero, the `budget` largest are
// kept; the others and their indices become 0. Equal ones are kept by lower row, then by lower place. threshold: the
// smallest that is kept, 0 if fewer than `budget` are positive. A row of NaN stays, and takes none of the budget.
CSAE_EXPORT int csae_cut(float* values, int64_t values_stride, int64_t* indices, int64_t indices_stride, int64_t n,
                         int64_t k, int64_t budget, float* threshold);

// out [m, n] = a [m, k] b [k, n]: a bf16x3 GEMM (see float_products.cpp), as exact as sums in float32. One of the two
// strides of a is 1, and one of b's. Returns csae_out_of_range if a sum might overflow: a number is not finite or is
// 2^127 or more, or max|a| max|b| k >= 2^127. Numbers and products of parts below 2^-126 may count as zero, so numbers
// below 2^-103 lose digits.
CSAE_EXPORT int csae_multiply(const float* a, int64_t a_row_stride, int64_t a_column_stride, const float* b,
                              int64_t b_row_stride, int64_t b_column_stride, int64_t m, int64_t n, int64_t k,
                              float* out, int64_t out_stride, int n_threads);

// rounded [n, d] = rows [n, d] rounded to the nearest bfloat16; lengths [n] = |row|; errors [n] = |row - rounded row|.
CSAE_EXPORT int csae_round_rows(const float* rows, int64_t rows_stride, int64_t n, int64_t d, void* rounded,
                                int64_t rounded_stride, float* lengths, float* errors, int n_threads);

// pairs [ceil(n / 16), width / 2, 16, 2] bfloat16: rows of `width` numbers, interleaved by pairs in blocks of 16 rows,
// as AMX reads its right operand. A row holds the d numbers of rows [n, d] (of `type`), rounded to the nearest; its two
// of bias [n, 2] bfloat16; upper bounds of |row| and of |row - rounded row|; zeros up to width, which is even and at
// least d + 4. Rows beyond n are zero. An upper bound is (length + unseen) * above. lengths [n]: the upper bounds of
// |row|.
CSAE_EXPORT int csae_round_pairs(const void* rows, int64_t rows_stride, int64_t n, int64_t d, int type,
                                 const void* bias, float unseen, float above, int64_t width, void* pairs,
                                 float* lengths, int n_threads);

// A code is values, indices [n, k]. A row's length is the place after its last non-zero value (NaN is non-zero): what
// stands at or behind it is not looked at, indices included.

// A weighted embedding bag: out[i] = sum over j of values[i, j] table[indices[i, j]], summed in float32.
// table [d_sae, d] and out [n, d] of `type`.
CSAE_EXPORT int csae_gather_sum(const float* values, int64_t values_stride, const int64_t* indices,
                                int64_t indices_stride, int64_t n, int64_t k, const void* table, int64_t table_stride,
                                int64_t d_sae, int64_t d, int type, void* out, int64_t out_stride, int n_threads);

// An SDDMM: out[i, j] = <rows[i], table[indices[i, j]]>, and 0 at and behind a row's length. rows [n, d], out [n, k],
// table [d_sae, d] of `type`.
CSAE_EXPORT int csae_gather_dot(const float* rows, int64_t rows_stride, const float* values, int64_t values_stride,
                                const int64_t* indices, int64_t indices_stride, int64_t n, int64_t k, const void* table,
                                int64_t table_stride, int64_t d_sae, int64_t d, int type, float* out,
                                int64_t out_stride, int n_threads);

// Pairs (feature, token) sorted by feature, a CSR matrix [d_sae, n]. order [n_pairs]: the place of each sorted pair
// among the pairs as given; tokens [n_pairs]: its token; ends [d_sae + 1] (CSR indptr): the pairs of feature f are at
// ends[f] to ends[f + 1] - 1. Pairs from ends[d_sae] on belong to no feature.
struct csae_pairs {
    const int64_t *order, *tokens, *ends;
    int64_t n_pairs, d_sae;
};

// Stably sorts the pairs of features, tokens [n_pairs]. Pairs with a feature outside of [0, d_sae) are inactive and
// come last.
CSAE_EXPORT int csae_sort_pairs(const int64_t* features, const int64_t* tokens, int64_t n_pairs, int64_t d_sae,
                                int64_t* order, int64_t* sorted_tokens, int64_t* ends, int n_threads);

// The factored gradient [d_sae, d] of a table: gradient[f] = sum over the pairs p of f of weights[p] rows[tokens[p]],
// in float32. weights [n_pairs], in the order before sorting; rows [n, d] of `type`. The sum's order is fixed: partial
// sums of 1024 pairs, then their sum.
struct csae_gradient {
    const float* weights;
    const void* rows;
    int64_t rows_stride, n, d;
    int type;
};

// out [d_sae, d], of the type of the gradient's rows; zero for a feature without pairs.
struct csae_dense_gradient {
    csae_gradient gradient;
    void* out;
    int64_t out_stride;
};

// Writes each table's gradient to `out`. Returns csae_bad_index if an order or a token is out of range, or ends do not
// ascend from 0 to at most n_pairs.
CSAE_EXPORT int csae_feature_sums(const csae_pairs* pairs, const csae_dense_gradient* tables, int n_tables,
                                  int n_threads);

// A table [d_sae, d] and its Adam moments, of moments_type, updated in place. unit_rows: rows of param have norm 1; the
// gradient is projected to be orthogonal to its row, and the row is normalised after the step.
struct csae_table {
    csae_gradient gradient;
    float* param;
    void *exp_avg, *exp_avg_sq;
    int64_t param_stride, exp_avg_stride, exp_avg_sq_stride;
    int moments_type, unit_rows;
};

// One step of Adam. step_size = lr / (1 - beta1^t), correction = 1 / sqrt(1 - beta2^t). seed: for the stochastic
// rounding of bfloat16 moments (see adam_row.cpp). lazy: rows without pairs stay as they are, as in
// torch.optim.SparseAdam. Denormal numbers count as zero.
struct csae_adam {
    float step_size, correction, eps, one_minus_beta1, beta2, one_minus_beta2;
    uint32_t seed;
    int lazy;
    uint32_t first_row;  // the number of the tables' first row, where they are part of larger ones
};

// Updates each table. Returns csae_bad_index as csae_feature_sums does; then nothing was updated.
CSAE_EXPORT int csae_adam_rows(const csae_pairs* pairs, const csae_table* tables, int n_tables, const csae_adam* step,
                               int n_threads);

// A tensor [B, T, H, d] with its strides in elements; the last dimension is contiguous.
struct csae_heads {
    const float* x;
    int64_t stride_b, stride_t, stride_h;
};

// The input of look-back attention: q, k [B, T, H, d_head], v [B, T, H, d_value], slope, null [H], and mask, starts
// [B, T], contiguous or null pointers. d_head >= 1. If mask[t], position t attends to the positions j in [starts[t], t)
// with mask[j]. starts may hold any number.
struct csae_attention {
    csae_heads q, k, v;
    const float *slope, *null;
    const uint8_t* mask;
    const int32_t* starts;
    int64_t B, T, H, d_head, d_value;
};

// out [B, T, H, d_value], lse [B, H, T], contiguous. score(t, j) = <q_t, k_j> / sqrt(d_head) - slope log(t - j); out is
// the mean of v under the softmax over these scores and null (an attention sink whose value is zero); lse is the log of
// the softmax's denominator.
CSAE_EXPORT int csae_lookback_forward(const csae_attention* given, float* out, float* lse, int n_threads);

// The gradients of q, k, v, slope and null, contiguous, from grad_out [B, T, H, d_value] and forward's out and lse.
CSAE_EXPORT int csae_lookback_backward(const csae_attention* given, const csae_heads* grad_out, const csae_heads* out,
                                       const float* lse, float* d_q, float* d_k, float* d_v, float* d_slope,
                                       float* d_null, int n_threads);

// Position t of each of B sequences, and a ring buffer of the positions before it. memory [B, L, width], rows
// contiguous: row j % L holds the keys of all heads of position j, then their values. takes_part [B, L]: rows that may
// be attended to. q [B, H * d_head]; start [B]: the first position that may be attended to; looks [B]: whether a
// sequence attends at all.
struct csae_memory {
    const float* q;
    int64_t q_stride;
    const float* memory;
    int64_t memory_stride_b, memory_stride_l;
    const uint8_t* takes_part;
    int64_t takes_part_stride;
    const float *slope, *null;
    const int64_t* start;
    const uint8_t* looks;
    int64_t B, L, H, d_head, d_value, t;
};

// out [B, H * d_value]: csae_lookback_forward's output at position t, if the buffer holds all positions before it.
CSAE_EXPORT int csae_read_memory(const csae_memory* given, float* out, int64_t out_stride, int n_threads);

// RMSNorm of each head: out [n, H, d] = heads [n, H, d] * scale [n, H] * gain [H] (null: 1), all contiguous, with
// scale = 1 / sqrt(least + weight * mean square of the head). H, d >= 1.
CSAE_EXPORT int csae_scale_heads(const float* heads, int64_t n, int64_t H, int64_t d, float least, float weight,
                                 const float* gain, float* out, float* scale, int n_threads);

// The gradient of heads, from that of out and from scale; and d_gains [n, H], each head's term of gain's gradient.
CSAE_EXPORT int csae_scale_heads_backward(const float* grad, const float* heads, const float* scale, int64_t n,
                                          int64_t H, int64_t d, float weight, const float* gain, float* d_heads,
                                          float* d_gains, int n_threads);
