// The work of a thread in a call that multiplies one matrix with all tokens.
#pragma once

#include "layer.h"

namespace moeq {
namespace {

template <int DTYPE, int DIGITS>
void linear_item(LinearCall& call, int number) {
    alignas(64) float sums[kTokensAtOnce * kPanelRows];
    const Matrices& m = call.weights;
    const Coding coding = {call.bits, kGrid};
    const int first = number * call.panels, end = first + call.panels < m.panels ? first + call.panels : m.panels;
    for (int p = first; p < end; ++p) {
        const uint8_t* panel = m.data + p * panel_bytes(m, coding);
        const int64_t row = static_cast<int64_t>(p) * kPanelRows, left = call.rows - row;
        for (int64_t begin = 0; begin < call.tokens; begin += kTokensAtOnce) {
            const int64_t rest = call.tokens - begin;
            const int tokens = rest < kTokensAtOnce ? static_cast<int>(rest) : kTokensAtOnce;
            multiply<DIGITS>(coding, m, panel, call.planes, call.token + begin, tokens, sums);
            for (int t = 0; t < tokens; ++t) {
                store_columns<DTYPE>(call.out, (begin + t) * call.rows + row, sums + t * kPanelRows,
                                     left < kPanelRows ? left : kPanelRows);
            }
        }
    }
}

template <int DIGITS>
void run_linear_digits(LinearCall& call, int thread, int threads) {
    quantize<DIGITS>(call.x, call.dtype, call.weights, call.planes, thread, threads);
    barrier(threads);
    const int items = (call.weights.panels + call.panels - 1) / call.panels;
    for (int i = take(&call.next); i < items; i = take(&call.next)) {
        if (call.dtype == kFloat32) linear_item<kFloat32, DIGITS>(call, i);
        if (call.dtype == kBfloat16) linear_item<kBfloat16, DIGITS>(call, i);
        if (call.dtype == kFloat16) linear_item<kFloat16, DIGITS>(call, i);
    }
}

inline void run_linear(LinearCall* call, int thread, int threads) {
    if (call->digits == 2) run_linear_digits<2>(*call, thread, threads);
    if (call->digits == 4) run_linear_digits<4>(*call, thread, threads);
}

}  // namespace
}  // namespace moeq
