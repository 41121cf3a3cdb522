// csae_multiply: random matrices that lie by rows or by columns.
#include "fuzz.h"

namespace fuzz {
namespace {

// A matrix by rows, or the transpose of one.
struct Operand {
    Matrix<float> lies;
    bool transposed;

    Operand(int64_t rows, int64_t columns, Kind kind) : Operand(rows, columns, kind, one_in(2)) {}
    Operand(int64_t rows, int64_t columns, Kind kind, bool transposed)
        : lies(transposed ? input_of(columns, rows, kind) : input_of(rows, columns, kind)), transposed(transposed) {}
    int64_t row_stride() const { return transposed ? 1 : lies.stride; }
    int64_t column_stride() const { return transposed ? lies.stride : 1; }
    float operator()(int64_t i, int64_t j) const { return transposed ? lies(j, i) : lies(i, j); }
    bool finite() const {
        for (int64_t at = 0; at < lies.rows * lies.columns; ++at) {
            if (!std::isfinite(lies(at / lies.columns, at % lies.columns))) return false;
        }
        return true;
    }
};

}  // namespace

void products() {
    function = "csae_multiply";
    const Kind kind = static_cast<Kind>(below(3));
    const int64_t m = below(80), n = below(80), k = one_in(8) ? below(1300) : below(80);
    const Operand a(m, k, kind), b(k, n, kind);
    const auto multiply = [&](int n_threads, int wanted) {
        auto out = output<float>(m, n);
        check_status(csae_multiply(a.lies.data(), a.row_stride(), a.column_stride(), b.lies.data(), b.row_stride(),
                                   b.column_stride(), m, n, k, out.data(), out.stride, n_threads),
                     wanted);
        out.check_between_rows();
        return out;
    };
    const bool finite = m == 0 || n == 0 || (a.finite() && b.finite());
    const int wanted = finite ? csae_ok : csae_out_of_range;
    const auto found = multiply(some_threads(), wanted);
    if (!finite) return;
    found.check_same_bits(multiply(1, wanted), "other bits with threads");
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            Sum sum;
            for (int64_t c = 0; c < k; ++c) {
                sum.add(static_cast<double>(a(i, c)) * b(c, j));
                sum.size += 0x1p-100;  // denormals count as zero
            }
            check_near(found(i, j), sum, static_cast<double>(k + 8) * unit, "a product");
        }
    }
}

}  // namespace fuzz
