// What the library exports: a C ABI, called through ctypes.
//
// Matrices are row-major with a stride between rows, in elements; columns are contiguous. Outputs must not overlap
// inputs. A function that works on a matrix returns a status; where that is not `csae_ok`, the outputs hold nothing
// of use, and nothing out of bounds was touched. The result has the same bits for any number of threads.
#pragma once

#include <cstdint>

#define CSAE_EXPORT extern "C" __attribute__((visibility("default")))

enum csae_status : int {
    csae_ok = 0,
    csae_bad_argument = 1,
    csae_out_of_memory = 2,
    csae_bad_index = 3,     // one of indices is outside of [0, d_sae)
    csae_out_of_range = 4,  // numbers too large, or not finite (csae_multiply)
};

// Raised by one whenever a signature below changes; the loader refuses a library of another version.
CSAE_EXPORT const int csae_abi_version;

// Which instructions the row loops use: 0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 and AMX. At load, the best that this CPU has.
// csae_use_isa is there for tests; it refuses what the CPU can't run.
CSAE_EXPORT int csae_isa();
CSAE_EXPORT int csae_use_isa(int isa);

// Take threads from the OpenMP runtime that has this GOMP_parallel (see parallel.h); null: from std::thread.
CSAE_EXPORT void csae_use_openmp(void* gomp_parallel);

// The file of that runtime, or null.
CSAE_EXPORT const char* csae_openmp_file();

// Ask the system for huge pages in fresh memory that a result is to go to. Only whole pages within it are touched.
CSAE_EXPORT void csae_use_huge_pages(void* memory, int64_t bytes);

// The best so far of each of n rows of pre-activations that come in tiles of columns. Before the first tile:
// threshold [n] = -inf, count [n] = 0; order and columns [n, capacity] hold nothing yet. capacity is at least k + 64;
// the larger, the less often a list is searched for its k largest.
struct csae_topk {
    int32_t *order, *columns;
    float* threshold;
    int32_t* count;
    int64_t n, k, capacity;
};

// What a matrix that may be either holds.
enum csae_type : int { csae_float32 = 0, csae_bfloat16 = 1 };

// Takes in pre_acts [n, width] + bias [width], whose columns are first_column and on. Tiles come in the order of
// columns, and no column is 2^31 or more. Nothing is written to pre_acts.
CSAE_EXPORT int csae_topk_add(const csae_topk* best, const float* pre_acts, int64_t pre_acts_stride, const float* bias,
                              int64_t width, int64_t first_column, int n_threads);

// The k largest of each row, relu'd: values [n, k], indices [n, k]. Largest first, equal ones (-0.0 and 0.0 are equal)
// by lower index first, selected before the relu. A row with a NaN gives k NaN at indices 0..k-1. Needs k columns or
// more to have been added. The lists are then of no more use.
CSAE_EXPORT int csae_topk_finish(const csae_topk* best, float* values, int64_t values_stride, int64_t* indices,
                                 int64_t indices_stride, int n_threads);

// Another way, where the tiles are upper bounds of the pre-activations, made here: the products of x [n, width] and
// so many rows of a table, both bfloat16, that are `first_column` and on. table: of csae_round_pairs; width is a multiple
// of 32. It ends with csae_topk_settle. Here a threshold may begin anywhere: what is below it is no candidate.
CSAE_EXPORT int csae_topk_add_products(const csae_topk* best, const void* x, int64_t x_stride, const void* table,
                                       int64_t width, int64_t columns, int64_t first_column, int n_threads);

// The k largest of each row of x table^T + bias in float32, k < best->k, as csae_topk_finish has them, from the best->k
// candidates with the largest bounds. x [n, d], table [d_sae, d] of that type, bias [d_sae]. settled [n]: 1 where it is
// proven that no other column is among the k largest; where it is 0, the row's values and indices hold nothing. The
// threshold of a row with more candidates than best->k becomes the bound that best->k of them reach.
CSAE_EXPORT int csae_topk_settle(const csae_topk* best, int64_t k, const float* x, int64_t x_stride, const void* table,
                                 int64_t table_stride, int64_t d_sae, int64_t d, int type, const float* bias,
                                 float* values, int64_t values_stride, int64_t* indices, int64_t indices_stride,
                                 uint8_t* settled, int n_threads);

// out [m, n] = a [m, k] b [k, n], as exact as sums in float32, from products of bfloat16 (see float_products.cpp). One
// of the two strides of a is 1, and one of b's. csae_out_of_range where a number is not finite or is 2^127 or more, or
// the largest of a by the largest of b by k is: then sums might overflow. Whatever is below 2^-126, of a number or of a
// product of parts, may count as zero; so numbers below 2^-103 lose digits.
CSAE_EXPORT int csae_multiply(const float* a, int64_t a_row_stride, int64_t a_column_stride, const float* b,
                              int64_t b_row_stride, int64_t b_column_stride, int64_t m, int64_t n, int64_t k,
                              float* out, int64_t out_stride, int n_threads);

// rounded [n, d]: rows [n, d] as bfloat16, to the nearest. lengths [n]: of the rows; errors [n]: the length of what
// was taken by rounding.
CSAE_EXPORT int csae_round_rows(const float* rows, int64_t rows_stride, int64_t n, int64_t d, void* rounded,
                                int64_t rounded_stride, float* lengths, float* errors, int n_threads);

// pairs [n / 16, rounded up][width / 2][16][2]: rows of bfloat16, two numbers of a row beside the same two of the next.
// Each is one of rows [n, d], of that type, to the nearest; the two numbers of bias [n, 2] of bfloat16; the row's length
// and that of what was taken by rounding, both made larger: (length + unseen) * above; zeros up to width, which is even
// and d + 4 at least. Rows that there are not are zero. lengths [n]: of the rows, made larger likewise.
CSAE_EXPORT int csae_round_pairs(const void* rows, int64_t rows_stride, int64_t n, int64_t d, int type,
                                 const void* bias, float unseen, float above, int64_t width, void* pairs,
                                 float* lengths, int n_threads);

// out [n, d]: out_i = sum over j of values_ij * table[indices_ij], of table's type, summed in float32.
// values, indices [n, k], table [d_sae, d].
CSAE_EXPORT int csae_gather_sum(const float* values, int64_t values_stride, const int64_t* indices,
                                int64_t indices_stride, int64_t n, int64_t k, const void* table, int64_t table_stride,
                                int64_t d_sae, int64_t d, int type, void* out, int64_t out_stride, int n_threads);

// out [n, k]: out_ij = <rows_i, table[indices_ij]>. rows [n, d], indices [n, k], table [d_sae, d] of that type.
CSAE_EXPORT int csae_gather_dot(const float* rows, int64_t rows_stride, const int64_t* indices, int64_t indices_stride,
                                int64_t n, int64_t k, const void* table, int64_t table_stride, int64_t d_sae, int64_t d,
                                int type, float* out, int64_t out_stride, int n_threads);

// Pairs (feature, token) sorted by feature, contiguous: order [n_pairs], the pair at each place as it was given;
// tokens [n_pairs], its token; ends [d_sae + 1], with the pairs of feature f at ends[f] to ends[f + 1] - 1. What
// comes after ends[d_sae] belongs to no feature.
struct csae_pairs {
    const int64_t *order, *tokens, *ends;
    int64_t n_pairs, d_sae;
};

// Sorts features, tokens [n_pairs]; pairs of one feature stay in order. A feature outside of [0, d_sae) is inactive:
// such pairs come last.
CSAE_EXPORT int csae_sort_pairs(const int64_t* features, const int64_t* tokens, int64_t n_pairs, int64_t d_sae,
                                int64_t* order, int64_t* sorted_tokens, int64_t* ends, int n_threads);

// The gradient [d_sae, d] of a table: for each feature the sum over its pairs p of weights_p * rows[token of p], in
// float32. weights [n_pairs], in the order before sorting; rows [n, d] of that type. In each run 1024 pairs at a time
// are added in order, then these sums in order.
struct csae_gradient {
    const float* weights;
    const void* rows;
    int64_t rows_stride, n, d;
    int type;
};

// out [d_sae, d], of the type of the gradient's rows; zero for a feature without a pair.
struct csae_dense_gradient {
    csae_gradient gradient;
    void* out;
    int64_t out_stride;
};

// csae_bad_index where an order or a token is out of range, or ends do not ascend from 0 to at most n_pairs.
CSAE_EXPORT int csae_feature_sums(const csae_pairs* pairs, const csae_dense_gradient* tables, int n_tables,
                                  int n_threads);

// A table [d_sae, d] and its moments, of moments_type, to be updated in place. unit_rows: the rows of param have norm
// 1; the gradient's part along a row is taken out, and the row is normalised after.
struct csae_table {
    csae_gradient gradient;
    float* param;
    void *exp_avg, *exp_avg_sq;
    int64_t param_stride, exp_avg_stride, exp_avg_sq_stride;
    int moments_type, unit_rows;
};

// One step of Adam. step_size is lr / (1 - beta1^t), correction 1 / sqrt(1 - beta2^t); seed is for the rounding of
// bfloat16 moments (see adam_row.cpp); lazy: rows without a pair are left as they are. Denormal numbers count as zero.
struct csae_adam {
    float step_size, correction, eps, one_minus_beta1, beta2, one_minus_beta2;
    uint32_t seed;
    int lazy;
};

// csae_bad_index likewise; then nothing was updated.
CSAE_EXPORT int csae_adam_rows(const csae_pairs* pairs, const csae_table* tables, int n_tables, const csae_adam* step,
                               int n_threads);

// A tensor [B, T, H, d] with its strides, in elements; its last dimension is contiguous.
struct csae_heads {
    const float* x;
    int64_t stride_b, stride_t, stride_h;
};

// The input of look-back attention: q, k [B, T, H, d_head], v [B, T, H, d_value], slope, null [H], and mask, starts
// [B, T], contiguous, or null pointers. d_head >= 1. A position t looks at the positions in [starts_t, t) that have
// mask, if it has mask itself; any number in starts will do.
struct csae_attention {
    csae_heads q, k, v;
    const float *slope, *null;
    const uint8_t* mask;
    const int32_t* starts;
    int64_t B, T, H, d_head, d_value;
};

// out [B, T, H, d_value], lse [B, H, T], contiguous. score(t, j) = <q_t, k_j> / sqrt(d_head) - slope * log(t - j);
// out is the mean of v under the softmax of these and null, whose value is zero; lse the log of its denominator.
CSAE_EXPORT int csae_lookback_forward(const csae_attention* given, float* out, float* lse, int n_threads);

// The gradients of q, k, v, slope and null, contiguous, from that of out [B, T, H, d_value] and what forward gave.
CSAE_EXPORT int csae_lookback_backward(const csae_attention* given, const csae_heads* grad_out, const csae_heads* out,
                                       const float* lse, float* d_q, float* d_k, float* d_v, float* d_slope,
                                       float* d_null, int n_threads);

// One position, number t, of each of B sequences, and the memory of the positions before: memory [B, L, width], the
// keys of all heads and then their values of position j in row j % L; rows are contiguous. takes_part [B, L]: which
// may be looked at. q [B, H * d_head]; start [B]: the first position in sight; looks [B]: whether a sequence looks.
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

// out [B, H * d_value]: what csae_lookback_forward gives at that position, where L or fewer positions went before.
CSAE_EXPORT int csae_read_memory(const csae_memory* given, float* out, int64_t out_stride, int n_threads);

// out [n, H, d]: heads [n, H, d] times scale [n, H] and gain [H] (null: 1), all contiguous. The scale of a head is
// (least + weight * its mean square)^(-1/2). H, d >= 1.
CSAE_EXPORT int csae_scale_heads(const float* heads, int64_t n, int64_t H, int64_t d, float least, float weight,
                                 const float* gain, float* out, float* scale, int n_threads);

// The gradient of heads from that of out and from scale, and d_gains [n, H]: what each head adds to that of gain.
CSAE_EXPORT int csae_scale_heads_backward(const float* grad, const float* heads, const float* scale, int64_t n,
                                          int64_t H, int64_t d, float weight, const float* gain, float* d_heads,
                                          float* d_gains, int n_threads);
