// Each function of the native CPU library must refuse what it can't work on: one argument at a time is made impossible.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "csae_cpu.h"

namespace {

template <class T, class Call>
void refused(const Call& call, std::vector<T*> arguments, T impossible, int line = __builtin_LINE()) {
    if (call() != csae_ok) {
        std::fprintf(stderr, "impossible_arguments.cpp:%d: the possible arguments were refused\n", line);
        std::exit(1);
    }
    for (size_t i = 0; i < arguments.size(); ++i) {
        const T possible = *arguments[i];
        *arguments[i] = impossible;
        if (call() != csae_bad_argument) {
            std::fprintf(stderr, "impossible_arguments.cpp:%d: argument %zu of the list was not refused\n", line, i);
            std::exit(1);
        }
        *arguments[i] = possible;
    }
}

}  // namespace

void impossible_arguments() {
    const float zeros[8] = {}, *first = zeros, *second = zeros;
    float results[7][8], *out = results[0], *lse = results[1], *d_q = results[2], *d_k = results[3];
    float *d_v = results[4], *d_slope = results[5], *d_null = results[6];
    int64_t ids[4] = {}, *indices = ids;
    int64_t n = 2, k = 2, d_sae = 2, d = 2, first_stride = 2, indices_stride = 2, second_stride = 2, out_stride = 2;
    int n_threads = 1;

    int32_t order[2 * 80] = {}, columns[2 * 80] = {}, count[2] = {2, 2};
    float threshold[2] = {};
    csae_topk best = {order, columns, threshold, count, 2, 2, 80};
    int64_t width = 2, first_column = 0;
    int type = csae_float32;
    const auto add = [&] {
        count[0] = 2;
        return csae_topk_add(&best, first, first_stride, second, width, first_column, n_threads);
    };
    const auto finish = [&] { return csae_topk_finish(&best, out, out_stride, indices, indices_stride, n_threads); };
    const auto both = [&](const auto& call) {
        refused<int64_t>(call, {&best.n, &best.k, &best.capacity}, -1);
        refused<int64_t>(call, {&best.k, &best.capacity}, 0);
        refused<int64_t>(call, {&best.k}, 17);  // capacity is less than k + 64
        refused<int64_t>(call, {&best.capacity}, int64_t{1} << 32);
        refused<int32_t*>(call, {&best.order, &best.columns, &best.count}, nullptr);
        refused<float*>(call, {&best.threshold}, nullptr);
        refused(call, {&count[1]}, -2);
        refused(call, {&count[1]}, 81);
        refused(call, {&n_threads}, 0);
    };
    both(add);
    refused<int64_t>(add, {&first_stride, &width, &first_column}, -1);
    refused<int64_t>(add, {&width, &first_column}, int64_t{1} << 31);
    refused<const float*>(add, {&first, &second}, nullptr);
    csae_band limits = {zeros, nullptr};
    const auto add_above = [&] {
        count[0] = 2;
        return csae_above_add(&best, &limits, first, first_stride, second, width, first_column, n_threads);
    };
    both(add_above);
    refused<int64_t>(add_above, {&first_stride, &width, &first_column}, -1);
    refused<int64_t>(add_above, {&width, &first_column}, int64_t{1} << 31);
    refused<const float*>(add_above, {&first, &second, &limits.floor}, nullptr);
    int64_t depth = 32;
    alignas(4) uint16_t numbers[2 * 32] = {}, blocks[16 * 32] = {};
    const uint16_t *of_x = numbers, *of_table = blocks;
    uint16_t* paired = blocks;
    const auto add_products = [&] {
        count[0] = 2;
        return csae_topk_add_products(&best, of_x, first_stride, of_table, depth, width, first_column, n_threads);
    };
    both(add_products);
    refused<int64_t>(add_products, {&first_stride, &depth, &width, &first_column}, -1);
    refused<int64_t>(add_products, {&depth}, 30);
    refused<int64_t>(add_products, {&width, &first_column}, int64_t{1} << 31);
    refused<const uint16_t*>(add_products, {&of_x, &of_table}, nullptr);
    int64_t n_rows = 2;
    const auto round_pairs = [&] {
        return csae_round_pairs(first, first_stride, n_rows, d, type, of_x, 0, 1, depth, paired, out, n_threads);
    };
    refused<int64_t>(round_pairs, {&first_stride, &n_rows, &d, &depth}, -1);
    refused<int64_t>(round_pairs, {&depth}, 31);
    refused<int64_t>(round_pairs, {&depth}, 4);  // no room for what is beside two numbers
    refused<const float*>(round_pairs, {&first}, nullptr);
    refused<const uint16_t*>(round_pairs, {&of_x}, nullptr);
    refused<uint16_t*>(round_pairs, {&paired}, nullptr);
    refused<float*>(round_pairs, {&out}, nullptr);
    refused(round_pairs, {&type}, 2);
    refused(round_pairs, {&n_threads}, 0);
    both(finish);
    refused(finish, {&count[0]}, 1);  // fewer than k candidates
    refused<int64_t>(finish, {&out_stride, &indices_stride}, 1);
    refused<float*>(finish, {&out}, nullptr);
    refused<int64_t*>(finish, {&indices}, nullptr);

    const auto finish_above = [&] {
        return csae_above_finish(&best, out, out_stride, indices, indices_stride, n_threads);
    };
    both(finish_above);
    refused<int64_t>(finish_above, {&out_stride, &indices_stride}, 1);
    refused<float*>(finish_above, {&out}, nullptr);
    refused<int64_t*>(finish_above, {&indices}, nullptr);
    int64_t budget = 1;
    const auto cut = [&] { return csae_cut(out, out_stride, indices, indices_stride, n, k, budget, lse); };
    refused<int64_t>(cut, {&n, &k, &budget}, -1);
    refused<int64_t>(cut, {&out_stride, &indices_stride}, 1);
    refused<float*>(cut, {&out, &lse}, nullptr);
    refused<int64_t*>(cut, {&indices}, nullptr);

    uint8_t settled_rows[2] = {}, *settled = settled_rows;
    int64_t k_of_two = 1, x_stride = 2;
    int32_t two_columns[2 * 80] = {0, 1};
    two_columns[81] = 1;
    best.columns = two_columns;
    const auto settle = [&] {
        return csae_topk_settle(&best, k_of_two, first, x_stride, second, second_stride, d_sae, d, type, first, out,
                                out_stride, indices, indices_stride, settled, n_threads);
    };
    both(settle);
    refused<int64_t>(settle, {&x_stride, &second_stride, &d_sae, &d, &k_of_two}, -1);
    refused<int64_t>(settle, {&d_sae}, 1);
    refused<int64_t>(settle, {&k_of_two}, 2);  // as many as there are candidates
    refused<int64_t>(settle, {&out_stride, &indices_stride}, 0);
    refused<const float*>(settle, {&first, &second}, nullptr);
    refused<float*>(settle, {&out}, nullptr);
    refused<int64_t*>(settle, {&indices}, nullptr);
    refused<uint8_t*>(settle, {&settled}, nullptr);
    refused(settle, {&type}, 2);
    const auto settle_above = [&] {
        return csae_above_settle(&best, &limits, k_of_two, 0, 1, first, x_stride, second, second_stride, d_sae, d, type,
                                 first, out, out_stride, indices, indices_stride, settled, n_threads);
    };
    both(settle_above);
    refused<int64_t>(settle_above, {&x_stride, &second_stride, &d_sae, &d, &k_of_two}, -1);
    refused<int64_t>(settle_above, {&k_of_two}, 3);  // more than there are candidates
    refused<int64_t>(settle_above, {&out_stride, &indices_stride}, 0);
    refused<const float*>(settle_above, {&first, &second, &limits.floor}, nullptr);
    refused<float*>(settle_above, {&out}, nullptr);
    refused<int64_t*>(settle_above, {&indices}, nullptr);
    refused<uint8_t*>(settle_above, {&settled}, nullptr);
    refused(settle_above, {&type}, 2);
    std::fill_n(indices, 4, 0);

    int64_t room[4] = {}, *rounded = room;
    const auto round = [&] {
        return csae_round_rows(first, first_stride, n, d, rounded, out_stride, out, lse, n_threads);
    };
    refused<int64_t>(round, {&first_stride, &n, &d, &out_stride}, -1);
    refused<int64_t>(round, {&out_stride}, 1);
    refused<const float*>(round, {&first}, nullptr);
    refused<int64_t*>(round, {&rounded}, nullptr);
    refused<float*>(round, {&out, &lse}, nullptr);
    refused(round, {&n_threads}, 0);

    const auto gather_sum = [&] {
        return csae_gather_sum(first, first_stride, indices, indices_stride, n, k, second, second_stride, d_sae, d,
                               type, out, out_stride, n_threads);
    };
    const auto gather_dot = [&] {
        return csae_gather_dot(first, first_stride, second, second_stride, indices, indices_stride, n, k, second,
                               second_stride, d_sae, d, type, out, out_stride, n_threads);
    };
    const auto both_gathers = [&](const auto& call) {
        refused<int64_t>(call, {&n, &k, &d_sae, &d, &first_stride, &indices_stride, &second_stride, &out_stride}, -1);
        refused<int64_t>(call, {&out_stride}, 1);
        refused<const float*>(call, {&first, &second}, nullptr);
        refused<float*>(call, {&out}, nullptr);
        refused<int64_t*>(call, {&indices}, nullptr);
        refused(call, {&n_threads}, 0);
        refused(call, {&type}, 2);
    };
    both_gathers(gather_sum);
    both_gathers(gather_dot);

    int64_t sorted[3][3], *order_of_pairs = sorted[0], *tokens = sorted[1], *ends = sorted[2];
    const auto sort = [&] {
        return csae_sort_pairs(indices, indices, n, d_sae, order_of_pairs, tokens, ends, n_threads);
    };
    refused<int64_t>(sort, {&n, &d_sae}, -1);
    refused<int64_t*>(sort, {&indices, &order_of_pairs, &tokens, &ends}, nullptr);
    refused(sort, {&n_threads}, 0);

    csae_pairs pairs = {order_of_pairs, tokens, ends, 2, 2};
    const csae_gradient gradient = {zeros, zeros, 2, 2, 2, csae_float32};
    csae_dense_gradient dense = {gradient, out, 2};
    csae_table table = {gradient, out, lse, d_q, 2, 2, 2, csae_float32, 1};
    csae_adam step = {};
    int n_tables = 1;
    const auto sums = [&] { return csae_feature_sums(&pairs, &dense, n_tables, n_threads); };
    const auto adam = [&] { return csae_adam_rows(&pairs, &table, n_tables, &step, n_threads); };
    const auto both_of_pairs = [&](const auto& call, csae_gradient& of) {
        refused<int64_t>(call, {&pairs.n_pairs, &pairs.d_sae, &of.rows_stride, &of.n, &of.d}, -1);
        refused<const int64_t*>(call, {&pairs.order, &pairs.tokens, &pairs.ends}, nullptr);
        refused<const float*>(call, {&of.weights}, nullptr);
        refused<const void*>(call, {&of.rows}, nullptr);
        refused(call, {&n_threads}, 0);
        refused(call, {&n_tables}, -1);
        refused(call, {&of.type}, 2);
    };
    both_of_pairs(sums, dense.gradient);
    refused<void*>(sums, {&dense.out}, nullptr);
    refused<int64_t>(sums, {&dense.out_stride}, 1);
    both_of_pairs(adam, table.gradient);
    refused<float*>(adam, {&table.param}, nullptr);
    refused<void*>(adam, {&table.exp_avg, &table.exp_avg_sq}, nullptr);
    refused<int64_t>(adam, {&table.param_stride, &table.exp_avg_stride, &table.exp_avg_sq_stride}, 1);
    refused(adam, {&table.moments_type}, 2);

    csae_heads x = {zeros, 2, 2, 2}, grad = x, attended = x;
    csae_attention given = {x, x, x, zeros, zeros, nullptr, nullptr, 1, 2, 1, 2, 2};
    const auto forward = [&] { return csae_lookback_forward(&given, out, lse, n_threads); };
    const auto backward = [&] {
        return csae_lookback_backward(&given, &grad, &attended, lse, d_q, d_k, d_v, d_slope, d_null, n_threads);
    };
    const auto both_refuse = [&](const auto& call) {
        refused<int64_t>(call,
                         {&given.B, &given.T, &given.H, &given.d_head, &given.d_value, &given.q.stride_b,
                          &given.k.stride_t, &given.v.stride_h},
                         -1);
        refused<int64_t>(call, {&given.d_head}, 0);
        refused<const float*>(call, {&given.q.x, &given.k.x, &given.v.x, &given.slope, &given.null}, nullptr);
        refused<float*>(call, {&lse}, nullptr);
        refused(call, {&n_threads}, 0);
    };
    both_refuse(forward);
    refused<float*>(forward, {&out}, nullptr);
    both_refuse(backward);
    refused<const float*>(backward, {&grad.x, &attended.x}, nullptr);
    refused<int64_t>(backward, {&grad.stride_t, &attended.stride_b}, -1);
    refused<float*>(backward, {&d_q, &d_k, &d_v, &d_slope, &d_null}, nullptr);

    uint8_t looks[2] = {1, 1};
    int64_t start[2] = {0, 0}, stride = 2;
    csae_memory memory = {zeros, 2, zeros, 2, 2, looks, 1, zeros, zeros, start, looks, 2, 1, 1, 1, 1, 1};
    const auto read = [&] { return csae_read_memory(&memory, out, stride, n_threads); };
    refused<int64_t>(read,
                     {&memory.B, &memory.L, &memory.H, &memory.d_head, &memory.d_value, &memory.t, &memory.q_stride,
                      &memory.memory_stride_b, &memory.memory_stride_l, &memory.takes_part_stride},
                     -1);
    refused<int64_t>(read, {&memory.d_head, &stride}, 0);
    refused<const float*>(read, {&memory.q, &memory.memory, &memory.slope, &memory.null}, nullptr);
    refused<const uint8_t*>(read, {&memory.takes_part, &memory.looks}, nullptr);
    refused<const int64_t*>(read, {&memory.start}, nullptr);
    refused(read, {&n_threads}, 0);

    int64_t n_tokens = 2, n_heads = 1, d_of_head = 1;
    float *scale = out, *d_gains = out;
    const float *heads = zeros, *grad_heads = zeros;
    const auto scale_forward = [&] {
        return csae_scale_heads(heads, n_tokens, n_heads, d_of_head, 1, 1, nullptr, out, scale, n_threads);
    };
    const auto scale_backward = [&] {
        return csae_scale_heads_backward(grad_heads, heads, scale, n_tokens, n_heads, d_of_head, 1, nullptr, out,
                                         d_gains, n_threads);
    };
    const auto both_scales_refuse = [&](const auto& call) {
        refused<int64_t>(call, {&n_tokens, &n_heads, &d_of_head}, -1);
        refused<int64_t>(call, {&n_heads, &d_of_head}, 0);
        refused<float*>(call, {&out, &scale}, nullptr);
        refused<const float*>(call, {&heads}, nullptr);
        refused(call, {&n_threads}, 0);
    };
    both_scales_refuse(scale_forward);
    both_scales_refuse(scale_backward);
    refused<float*>(scale_backward, {&d_gains}, nullptr);
    refused<const float*>(scale_backward, {&grad_heads}, nullptr);

    int64_t row = 2, column = 1;
    const auto multiply = [&] {
        return csae_multiply(first, row, column, second, row, column, n, d, k, out, out_stride, n_threads);
    };
    refused<int64_t>(multiply, {&row, &column, &n, &d, &k}, -1);
    refused<int64_t>(multiply, {&column}, 3);
    refused<int64_t>(multiply, {&out_stride}, 1);
    refused<const float*>(multiply, {&first, &second}, nullptr);
    refused<float*>(multiply, {&out}, nullptr);
    refused(multiply, {&n_threads}, 0);

    int isa = csae_isa();
    refused([&] { return csae_use_isa(isa); }, {&isa}, -1);
    refused([&] { return csae_use_isa(isa); }, {&isa}, 4);
}
