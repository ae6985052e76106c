// The best codes of a trellis for the weights of one tile (Viterbi, 1967), as docs/format.md defines the codes.
//
// A state is the last 12 bits of a tile's ring. Its index here has the oldest bits on top: the states that lead to
// state i are those whose lower bits are i >> B, and differ in their top B bits. So one step takes the minimum over 2^B
// vectors that lie 2^(12−B) apart, and adds the squared error of each of the 2^B codes that can follow.
#pragma once

#include "encode_call.h"

namespace moeq {
namespace {

constexpr int kStateBits = 12;
constexpr int kStates = 1 << kStateBits;
constexpr int kTile = 256;
constexpr int kWarmUp = 64;  // weights on either side of a tile's beginning that decide the state there

// The minimum of 2^B vectors, and for each lane the bits of the index of the vector that it comes from.
template <int B>
struct Winner {
    Shorts value;
    uint32_t bits[B > 0 ? B : 1];
};

template <int B>
inline __attribute__((always_inline)) Winner<B> best_of(const uint16_t* p, int stride) {
    Winner<B> r;
    if constexpr (B == 0) {
        r.value = load_shorts(p);
    } else {
        const Winner<B - 1> low = best_of<B - 1>(p, stride);
        const Winner<B - 1> high = best_of<B - 1>(p + (stride << (B - 1)), stride);
        r.value = minimum(low.value, high.value);
        const uint32_t is_high = other(r.value, low.value);  // the lower index where both are equal
        for (int i = 0; i < B - 1; ++i) r.bits[i] = (is_high & high.bits[i]) | (~is_high & low.bits[i]);
        r.bits[B - 1] = is_high;
    }
    return r;
}

template <int B>
struct Encoder {
    static constexpr int kRest = kStates >> B;
    static constexpr int kVectors = kRest / kShorts;

    alignas(64) uint16_t cost[kStates];            // squared errors on the best way to each state
    alignas(64) uint16_t best[kRest + kShorts];    // the minimum over the states that lead to the same states
    uint32_t from[kTile][kVectors][B];             // which of them it was

    // Takes one weight, in half codes. The least cost was subtracted before, so that costs stay small.
    void step(const uint16_t* codes, uint16_t weight, uint32_t (*chosen)[B]) {
        Shorts least = splat_short(65535);
        for (int v = 0; v < kVectors; ++v) {
            const Winner<B> winner = best_of<B>(cost + v * kShorts, kRest);
            for (int i = 0; i < B; ++i) chosen[v][i] = winner.bits[i];
            store_shorts(best + v * kShorts, winner.value);
            least = minimum(least, winner.value);
        }
        const Shorts subtracted = splat_short(smallest(least)), wanted = splat_short(weight);
        for (int i = 0; i < kStates; i += kShorts) {
            const Shorts error = squared(load_shorts(codes + i) - wanted);
            store_shorts(cost + i, add_saturated(spread<B>(best + (i >> B)) - subtracted, error));
        }
    }

    // Finds the best states for `count` weights; `state` is the one before and behind them, or −1 for any.
    void run(const uint16_t* codes, const uint16_t* weights, int count, int state, uint16_t* states) {
        for (int i = 0; i < kStates; ++i) cost[i] = state < 0 ? 0 : 65535;
        int last = 0;
        if (state >= 0) cost[last = state] = 0;
        for (int t = 0; t < count; ++t) step(codes, weights[t], from[t]);
        if (state < 0) {
            for (int i = 1; i < kStates; ++i) {
                if (cost[i] < cost[last]) last = i;
            }
        }
        for (int t = count - 1; t >= 0; --t) {
            states[t] = static_cast<uint16_t>(last);
            const int rest = last >> B;
            int top = 0;
            for (int i = 0; i < B; ++i) top |= (from[t][rest / kShorts][i] >> rest % kShorts & 1) << i;
            last = top << (kStateBits - B) | rest;
        }
    }

    // Writes the B bits that each weight adds to the ring. A run without a fixed state across the tile's end and
    // beginning finds a state to begin and end with.
    void tile(const uint16_t* codes, const float* weights, uint8_t* own) {
        uint16_t halves[kTile], states[kTile], turned[2 * kWarmUp];
        for (int i = 0; i < kTile; ++i) {
            const float v = weights[i] * 2 + 0.5f;
            halves[i] = static_cast<uint16_t>(v > 0 ? v < 254 ? v : 254 : 0);
        }
        for (int i = 0; i < 2 * kWarmUp; ++i) turned[i] = halves[(kTile - kWarmUp + i) % kTile];
        run(codes, turned, 2 * kWarmUp, -1, states);
        run(codes, halves, kTile, states[kWarmUp - 1], states);
        for (int i = 0; i < kTile; ++i) own[i] = static_cast<uint8_t>(states[i] & ((1 << B) - 1));
    }
};

template <int B>
void encode_tiles(const EncodeCall& call) {
    Encoder<B>* encoder = static_cast<Encoder<B>*>(call.memory);
    for (int64_t t = 0; t < call.tiles; ++t) encoder->tile(call.codes, call.weights + t * kTile, call.own + t * kTile);
}

inline void encode_tiles(const EncodeCall& call) {
    if (call.bits == 1) encode_tiles<1>(call);
    if (call.bits == 2) encode_tiles<2>(call);
    if (call.bits == 3) encode_tiles<3>(call);
    if (call.bits == 4) encode_tiles<4>(call);
}

}  // namespace
}  // namespace moeq
