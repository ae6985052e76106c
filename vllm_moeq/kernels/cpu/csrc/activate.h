// What happens between gate and up and down: biases, clamps, and one of a few functions. Which one is chosen once per
// call (`finish_of`), outside of all loops.
//
// The order of operands matters: maximum and minimum return the second one where one is not a number.
#pragma once

#include "core.h"

namespace moeq {
namespace {

// Returns e^x for x <= 0, exact to a few units in the last place, as 2^n times a polynomial of the remainder.
MOEQ_INLINE Floats exponential(Floats x) {
    x = maximum(x, splat(-87.0f));
    const Floats n = nearest(x * splat(1.44269504f));
    Floats r = multiply_add(n, splat(-0.693359375f), x);
    r = multiply_add(n, splat(2.12194440e-4f), r);
    constexpr float over[] = {1 / 5040.0f, 1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f};
    Floats sum = splat(over[0]);
#pragma GCC unroll 8
    for (int i = 1; i < 8; ++i) sum = multiply_add(sum, r, splat(over[i]));
    return sum * as_floats(shift_left<23>(to_ints(n) + splat_int(127)));
}

// Returns x / (1 + e^−y) for y of the same sign as x, computed from e^−|y|, which cannot overflow.
MOEQ_INLINE Floats times_sigmoid(Floats x, Floats y) {
    const Floats zero = splat(0.0f), small = exponential(minimum(y, zero - y));
    const Floats positive = maximum(zero, x), negative = minimum(zero, x);
    return multiply_add(negative, small, positive) / (splat(1.0f) + small);
}

template <int FUNCTION>
MOEQ_INLINE Floats function_of(const Activation& does, Floats x) {
    if (FUNCTION == kSilu) return times_sigmoid(x, x * splat(does.alpha));
    if (FUNCTION == kGeluTanh) {
        // x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³))) is x / (1 + e^−y) with twice tanh's argument as y.
        const Floats inner = multiply_add(x * x, splat(2 * 0.7978845608f * 0.044715f), splat(2 * 0.7978845608f));
        return times_sigmoid(x, x * inner);
    }
    const Floats positive = maximum(splat(0.0f), x);
    return positive * positive;
}

// Turns the sums of one panel and some tokens into rows of `inner`. `first` is the first token's pair; a bias of null
// adds nothing.
using Finish = void (*)(const Call& call, float* sums, int tokens, int64_t first, int panel, const float* bias);

template <int FUNCTION, bool GATED, bool BOUNDED>
void finish(const Call& call, float* sums, int tokens, int64_t first, int panel, const float* bias) {
    constexpr int kRows = GATED ? kLanes : kPanelRows;
    const Activation does = call.activation;
    const Floats limit = splat(does.limit), low = splat(-does.limit), beta = splat(does.beta);
    const int64_t begin = static_cast<int64_t>(panel) * kRows, left = call.intermediate - begin;
    const size_t bytes = static_cast<size_t>(left < kRows ? left : kRows) * sizeof(float);
    for (int t = 0; t < tokens; ++t) {
        float* both = sums + t * kPanelRows;
        Floats one = load(both), other = load(both + kLanes);
        if (bias) {
            one = one + load(bias);
            other = other + load(bias + kLanes);
        }
        if (BOUNDED) {
            one = minimum(limit, one);
            other = maximum(low, minimum(limit, other)) + beta;
        }
        store(both, GATED ? function_of<FUNCTION>(does, one) * other : function_of<FUNCTION>(does, one));
        if (!GATED) store(both + kLanes, function_of<FUNCTION>(does, other));
        __builtin_memcpy(call.inner + (first + t) * call.intermediate + begin, both, bytes);
    }
}

template <int FUNCTION>
Finish finish_with(const Activation& does) {
    if (!does.gated) return finish<FUNCTION, false, false>;
    return does.bounded ? finish<FUNCTION, true, true> : finish<FUNCTION, true, false>;
}

inline Finish finish_of(const Activation& does) {
    if (does.function == kGeluTanh) return finish_with<kGeluTanh>(does);
    if (does.function == kRelu2) return finish_with<kRelu2>(does);
    return finish_with<kSilu>(does);
}

}  // namespace
}  // namespace moeq
