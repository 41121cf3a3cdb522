// Adam on one row, in each instruction set. M, the type of the moments, is float or BFloat16.
#pragma once

#include <cstdint>

#include "csae_cpu.h"
#include "simd/register.h"

namespace csae {

// Updates param, exp_avg, exp_avg_sq [d] by gradient [d]. place: the index of the row's first element in the whole
// table, modulo 2^32. unit_row: the row has norm 1 and is normalised again.
template <class M>
using AdamRow = void (*)(const csae_adam& step, float* param, M* exp_avg, M* exp_avg_sq, const float* gradient,
                         int64_t d, uint32_t place, bool unit_row);

template <class M>
AdamRow<M> adam_row();

}  // namespace csae
