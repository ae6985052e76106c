// The work of a thread in a call: rotate and quantize, gate and up, rotate and quantize, down. A free thread takes the next item. Results
// depend neither on which thread computes an item nor on the other tokens of the batch.
#pragma once

#include "core.h"
#include "decode.h"
#include "trellis.h"
#include "quantize.h"
#include "rotate.h"
#include "panel.h"
#include "activate.h"

namespace moeq {
namespace {

inline int take(int32_t* next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

template <int DIGITS>
void gate_up_item(Call& call, const Item& item) {
    alignas(64) float sums[kTokensAtOnce * kPanelRows];
    const Active active = call.active[item.active];
    const Coding coding = coding_of(call, active.expert);
    const Matrices& m = call.gate_up;
    const uint8_t* data = m.data + m.offsets[active.expert * m.stride];
    const Finish finish = finish_of(call.activation);
    for (int p = item.panel; p < item.panel + item.panels; ++p) {
        for (int begin = 0; begin < active.count; begin += kTokensAtOnce) {
            const int rest = active.count - begin, tokens = rest < kTokensAtOnce ? rest : kTokensAtOnce;
            const int first = active.first + begin;
            multiply<DIGITS>(coding, m, data + p * panel_bytes(m, coding), call.x_planes, call.token + first, tokens,
                             sums);
            finish(call, sums, tokens, first, p, bias_of(m, active.expert, p));
        }
    }
}

template <int DTYPE>
void store_result(Call& call, int first_panel, int panels) {
    const int64_t width = static_cast<int64_t>(call.down.panels) * kPanelRows;
    const int64_t first = static_cast<int64_t>(first_panel) * kPanelRows;
    int64_t last = first + static_cast<int64_t>(panels) * kPanelRows;
    if (last > call.hidden) last = call.hidden;
    for (int64_t t = 0; t < call.tokens; ++t) {
        store_columns<DTYPE>(call.out, t * call.hidden + first, call.sums + t * width + first, last - first);
    }
}

// Computes some output columns of all experts, in ascending order, so that sums need neither locks nor a second pass.
template <int DIGITS>
void down_item(Call& call, int number) {
    alignas(64) float sums[kTokensAtOnce * kPanelRows];
    const Matrices& m = call.down;
    const int64_t width = static_cast<int64_t>(m.panels) * kPanelRows;
    const int first_panel = number * call.down_panels;
    const int end = first_panel + call.down_panels < m.panels ? first_panel + call.down_panels : m.panels;
    for (int64_t t = 0; t < call.tokens; ++t) {
        for (int64_t c = first_panel * kPanelRows; c < end * kPanelRows; c += kLanes) {
            store(call.sums + t * width + c, splat(0.0f));
        }
    }
    for (int a = 0; a < call.num_active; ++a) {
        const Active active = call.active[a];
        const Coding coding = coding_of(call, active.expert);
        const uint8_t* data = m.data + m.offsets[active.expert * m.stride];
        for (int p = first_panel; p < end; ++p) {
            for (int begin = 0; begin < active.count; begin += kTokensAtOnce) {
                const int rest = active.count - begin, tokens = rest < kTokensAtOnce ? rest : kTokensAtOnce;
                const int first = active.first + begin;
                multiply<DIGITS>(coding, m, data + p * panel_bytes(m, coding), call.hidden_planes, call.pair + first,
                                 tokens, sums);
                const float* bias = bias_of(m, active.expert, p);
                for (int t = 0; t < tokens; ++t) {
                    float* place = call.sums + call.token[first + t] * width + p * kPanelRows;
                    const Floats weight = splat(call.weight[first + t]);
                    for (int c = 0; c < kPanelRows; c += kLanes) {
                        Floats value = load(sums + t * kPanelRows + c);
                        if (bias) value = value + load(bias + c);
                        store(place + c, multiply_add(value, weight, load(place + c)));
                    }
                }
            }
        }
    }
    if (call.dtype == kFloat32) store_result<kFloat32>(call, first_panel, end - first_panel);
    if (call.dtype == kBfloat16) store_result<kBfloat16>(call, first_panel, end - first_panel);
    if (call.dtype == kFloat16) store_result<kFloat16>(call, first_panel, end - first_panel);
}

inline void barrier(int threads) {
    if (threads > 1) {
#pragma omp barrier
    }
}

template <int DIGITS>
void run_digits(Call& call, int thread, int threads) {
    const void* x = call.x;
    int dtype = call.dtype;
    if (call.before_up.size) {
        rotate(x, dtype, call.before_up, call.tokens, call.hidden, call.rotated, thread, threads);
        barrier(threads);
        x = call.rotated;
        dtype = kFloat32;
    }
    quantize<DIGITS>(x, dtype, call.gate_up, call.x_planes, thread, threads);
    barrier(threads);
    for (int i = take(&call.next_gate_up); i < call.num_items; i = take(&call.next_gate_up)) {
        gate_up_item<DIGITS>(call, call.items[i]);
    }
    barrier(threads);
    if (call.before_down.size) {
        rotate(call.inner, kFloat32, call.before_down, call.pairs, call.intermediate, call.inner, thread, threads);
        barrier(threads);
    }
    quantize<DIGITS>(call.inner, kFloat32, call.down, call.hidden_planes, thread, threads);
    barrier(threads);
    const int items = (call.down.panels + call.down_panels - 1) / call.down_panels;
    for (int i = take(&call.next_down); i < items; i = take(&call.next_down)) down_item<DIGITS>(call, i);
}

inline void run(Call* call, int thread, int threads) {
    if (call->digits == 2) run_digits<2>(*call, thread, threads);
    if (call->digits == 4) run_digits<4>(*call, thread, threads);
}

}  // namespace
}  // namespace moeq
