// Adam on tables with factored gradients. Each row's gradient is summed just before its update: parameters and moments
// pass through memory once, and the dense gradient never exists.
#include "csae_cpu.h"
#include "rows/adam_row.h"
#include "rows/feature_gradients.h"

namespace csae {
namespace {

// Denormal numbers count as zero during the lifetime of this object. The moments of dead features decay to denormals
// and stay there, and arithmetic on them is ten times slower.
class FlushDenormals {
public:
    FlushDenormals() : before_(get()) { set(before_ | flush); }
    ~FlushDenormals() { set(before_); }
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

private:
#if defined(__x86_64__)
    using Mode = unsigned;
    static constexpr Mode flush = 0x8040;  // MXCSR: FTZ (results) and DAZ (operands)
    static Mode get() { return __builtin_ia32_stmxcsr(); }
    static void set(Mode mode) { __builtin_ia32_ldmxcsr(mode); }
#elif defined(__aarch64__)
    using Mode = uint64_t;
    static constexpr Mode flush = 1 << 24;  // FPCR: FZ
    static Mode get() {
        Mode mode;
        asm volatile("mrs %0, fpcr" : "=r"(mode));
        return mode;
    }
    static void set(Mode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
    using Mode = int;
    static constexpr Mode flush = 0;
    static Mode get() { return 0; }
    static void set(Mode) {}
#endif
    const Mode before_;
};

bool good(const csae_table& table, int64_t d_sae) {
    if (table.moments_type != csae_float32 && table.moments_type != csae_bfloat16) return false;
    const int64_t d = table.gradient.d;
    if (d_sae > 1 && (table.param_stride < d || table.exp_avg_stride < d || table.exp_avg_sq_stride < d)) return false;
    return d_sae * d <= 0 || (table.param != nullptr && table.exp_avg != nullptr && table.exp_avg_sq != nullptr);
}

template <class M>
void update(const csae_adam& step, const csae_table& table, int64_t feature, const float* gradient) {
    const int64_t d = table.gradient.d;
    const uint32_t row = step.first_row + static_cast<uint32_t>(feature);
    adam_row<M>()(step, table.param + feature * table.param_stride,
                  static_cast<M*>(table.exp_avg) + feature * table.exp_avg_stride,
                  static_cast<M*>(table.exp_avg_sq) + feature * table.exp_avg_sq_stride, gradient, d,
                  row * static_cast<uint32_t>(d), table.unit_rows != 0);
}

}  // namespace
}  // namespace csae

int csae_adam_rows(const csae_pairs* pairs, const csae_table* tables, int n_tables, const csae_adam* step,
                   int n_threads) {
    if (pairs == nullptr || step == nullptr || n_tables < 0 || (n_tables > 0 && tables == nullptr)) {
        return csae_bad_argument;
    }
    for (int i = 0; i < n_tables; ++i) {
        if (!csae::good(tables[i], pairs->d_sae)) return csae_bad_argument;
    }
    try {
        std::vector<csae_gradient> gradients;
        for (int i = 0; i < n_tables; ++i) gradients.push_back(tables[i].gradient);
        csae::FeatureGradients rows(*pairs, std::move(gradients), n_threads);
        if (rows.status() != csae_ok) return rows.status();
        rows.for_each(step->lazy != 0, [&](size_t i, int64_t feature, const float* gradient) {
            const csae_table& table = tables[i];
            if (table.gradient.d == 0) return;
            const csae::FlushDenormals flush;
            if (table.moments_type == csae_float32) {
                csae::update<float>(*step, table, feature, gradient);
            } else {
                csae::update<csae::BFloat16>(*step, table, feature, gradient);
            }
        });
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return csae_ok;
}
