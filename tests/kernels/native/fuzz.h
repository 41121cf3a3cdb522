// What the cases of the fuzz driver share: random arguments in buffers with no element to spare, and checks of results.
#pragma once

#include <algorithm>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "csae_cpu.h"

namespace fuzz {

constexpr double unit = 1.0 / (1 << 24);  // of float: the largest relative error of one operation
constexpr double least = std::numeric_limits<float>::denorm_min();
constexpr int untouched = -777;

inline unsigned seed, case_number;
inline const char* function = "impossible_arguments";
inline std::mt19937_64 random_bits;

inline void say_where() {
    std::fprintf(stderr, "fuzz: %s, seed %u, case %u, isa %d\n", function, seed, case_number, csae_isa());
}

[[noreturn]] inline void fail(const std::string& what) {
    std::fprintf(stderr, "fuzz: %s\n", what.c_str());
    say_where();
    std::exit(1);
}

inline void check(bool good, const char* what) {
    if (!good) fail(what);
}

inline void check_status(int status, int wanted) {
    if (status != wanted) fail("status " + std::to_string(status) + ", wanted " + std::to_string(wanted));
}

// --- random arguments ----------------------------------------------------------------------------------------

inline int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }
inline bool one_in(int64_t n) { return below(n) == 0; }

enum Kind { plain, ties, special };

inline float number(Kind kind) {
    constexpr float few[] = {-1.0f, -0.0f, 0.0f, 0.5f, 1.0f};
    constexpr float rare[] = {NAN, INFINITY, -INFINITY, -0.0f, 1e-45f, -1e-45f};
    if (kind == ties) return few[below(5)];
    if (kind == special && one_in(60)) return rare[below(6)];
    return static_cast<float>(below(1 << 24)) / (1 << 22) - 2.0f;
}

inline int some_threads() { return one_in(40) ? (one_in(2) ? INT_MAX : 1 << 30) : 1 + static_cast<int>(below(5)); }

// Null where it is empty, as an empty tensor of torch is.
template <class T>
std::unique_ptr<T[]> allocate(int64_t size) {
    return std::unique_ptr<T[]>(size > 0 ? new T[static_cast<size_t>(size)] : nullptr);
}

// What is between the rows holds `untouched`.
template <class T>
struct Matrix {
    int64_t rows, columns, stride, size;
    std::unique_ptr<T[]> memory;

    Matrix(int64_t rows, int64_t columns, int64_t stride)
        : rows(rows),
          columns(columns),
          stride(stride),
          size(rows * columns == 0 ? 0 : (rows - 1) * stride + columns),
          memory(allocate<T>(size)) {
        std::fill_n(memory.get(), size, static_cast<T>(untouched));
    }
    T* data() const { return memory.get(); }
    T& operator()(int64_t i, int64_t j) const { return memory[i * stride + j]; }

    void check_between_rows() const {
        for (int64_t at = 0; rows > 1 && at < size; ++at) {
            if (at % stride >= columns) check(memory[at] == static_cast<T>(untouched), "wrote between two rows");
        }
    }
    void check_same_bits(const Matrix& other, const char* what) const {
        for (int64_t i = 0; i < rows * columns; ++i) {
            const T &a = (*this)(i / columns, i % columns), &b = other(i / columns, i % columns);
            check(std::memcmp(&a, &b, sizeof a) == 0, what);
        }
    }
};

inline int64_t input_stride(int64_t columns) {
    const int64_t strides[] = {columns, columns + below(9), below(columns + 1), 0};
    return strides[below(4)];
}

// The stride of a single row is of no meaning.
inline int64_t output_stride(int64_t rows, int64_t columns) { return rows > 1 ? columns + below(5) : below(5); }

template <class T>
Matrix<T> input(int64_t rows, int64_t columns) {
    return {rows, columns, input_stride(columns)};
}

inline Matrix<float> input_of(int64_t rows, int64_t columns, Kind kind) {
    auto matrix = input<float>(rows, columns);
    for (int64_t at = 0; at < matrix.size; ++at) matrix.memory[at] = number(kind);
    return matrix;
}

template <class T>
Matrix<T> output(int64_t rows, int64_t columns) {
    return {rows, columns, output_stride(rows, columns)};
}

// A matrix of floats or of bfloat16, which are the upper halves of floats.
struct Stored {
    int type;
    Matrix<float> floats;
    Matrix<uint16_t> halves;

    Stored(int type, int64_t rows, int64_t columns, int64_t stride)
        : type(type),
          floats(type == csae_float32 ? rows : 0, columns, stride),
          halves(type == csae_float32 ? 0 : rows, columns, stride) {}
    void* data() const { return type == csae_float32 ? static_cast<void*>(floats.data()) : halves.data(); }
    int64_t stride() const { return floats.stride; }
    float operator()(int64_t i, int64_t j) const {
        if (type == csae_float32) return floats(i, j);
        const uint32_t bits = uint32_t{halves(i, j)} << 16;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    }
    void set(int64_t i, int64_t j, float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        if (type == csae_float32) {
            floats(i, j) = x;
        } else {  // a NaN that is all in the lower half becomes infinity, as good a number as any
            halves(i, j) = static_cast<uint16_t>(bits >> 16);
        }
    }
    double rounding() const { return type == csae_float32 ? 0 : 1.0 / 256; }
    void check_between_rows() const {
        floats.check_between_rows();
        halves.check_between_rows();
    }
    void check_same_bits(const Stored& other, const char* what) const {
        floats.check_same_bits(other.floats, what);
        halves.check_same_bits(other.halves, what);
    }
};

inline int some_type() { return one_in(2) ? csae_float32 : csae_bfloat16; }

inline Stored stored_of(int type, int64_t rows, int64_t columns, Kind kind) {
    Stored matrix(type, rows, columns, input_stride(columns));
    for (int64_t i = 0; i < rows * columns; ++i) matrix.set(i / columns, i % columns, number(kind));
    return matrix;
}

inline Stored stored_output(int type, int64_t rows, int64_t columns) {
    return {type, rows, columns, output_stride(rows, columns)};
}

// --- results -------------------------------------------------------------------------------------------------

// What a float should be: the terms' sum, and that of their sizes, to which rounding is relative.
struct Sum {
    double value = 0, size = 0;
    int64_t count = 0;

    void add(double term, double size_of_term) {
        value += term;
        size += size_of_term;
        ++count;
    }
    void add(double term) { add(term, std::abs(term)); }
    bool near(float x, double rounding) const {
        if (std::isnan(value)) return std::isnan(x);
        return std::isinf(value) ? x == value : std::abs(x - value) <= rounding * size + 2 * least * (count + 1);
    }
};

inline void check_near(float x, const Sum& sum, double rounding, const char* name) {
    if (sum.near(x, rounding)) return;
    char text[200];
    std::snprintf(text, sizeof text, "%s is %.9g, wanted %.9g; error over size of terms %.3g, allowed %.3g", name, x,
                  sum.value, std::abs(x - sum.value) / sum.size, rounding);
    fail(text);
}

// The cases, each one call or a few of what the library exports.
void topk_rows();
void above_rows();
void topk_settle();
void topk_products();
void products();
void gather(bool dot);
void feature_rows();
void lookback();
void read_memory();
void scaled_heads();

}  // namespace fuzz
