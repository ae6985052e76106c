// Decodes chunks of a trellis (vllm_moeq/format/schemes/trellis.py) to one code per byte.
#pragma once

namespace moeq {
namespace {

constexpr int kTile = 16;       // rows and columns of a tile; a chunk has two tiles
constexpr int kStateBits = 12;  // the window of bits that ends with a weight's own

// The 32 · BITS bits of each row of a chunk. A tile's bits form a ring through its rows, so the states of a row's first
// columns begin in the row before it: in another lane.
template <int BITS>
struct Rows {
    Ints words[BITS];
    Ints heads[2];  // per tile: the last kStateBits bits of the row before, then the row's first bits

    explicit MOEQ_INLINE Rows(const uint8_t* p) {
        load<0>(p);
        heads[0] = head<0>();
        heads[1] = head<1>();
    }

    // The state of the weight in this column: its own bits are the topmost of twelve.
    template <int COLUMN>
    MOEQ_INLINE Ints state() const {
        constexpr int tile = COLUMN / kTile, own = (COLUMN % kTile + 1) * BITS;
        if constexpr (own < kStateBits) return shift_right_zero<own>(heads[tile]) & splat_int(kMask);
        else return window<tile * kTile * BITS + own - kStateBits>() & splat_int(kMask);
    }

   private:
    static constexpr int kMask = (1 << kStateBits) - 1;

    template <int WORD>
    MOEQ_INLINE void load(const uint8_t* p) {
        if constexpr (WORD < BITS) {
            words[WORD] = lanes_of(load_codes(p + WORD * kVector));
            load<WORD + 1>(p);
        }
    }
    // Bits of the row from FIRST on, at least kStateBits of them.
    template <int FIRST>
    MOEQ_INLINE Ints window() const {
        constexpr int word = FIRST / 32, shift = FIRST % 32;
        const Ints low = shift_right_zero<shift>(words[word]);
        if constexpr (shift + kStateBits > 32) return low | shift_left<32 - shift>(words[word + 1]);
        else return low;
    }
    template <int TILE>
    MOEQ_INLINE Ints head() const {
        constexpr int first = TILE * kTile * BITS, last = first + kTile * BITS - kStateBits;
        const Ints before = shift_right_zero<last % 32>(previous_lane(words[last / 32])) & splat_int(kMask);
        return before | shift_left<kStateBits>(shift_right_zero<first % 32>(words[first / 32]));
    }
};

// Calls step(index, codes) for the eight steps of a chunk, as Packed does.
template <int BITS>
struct Trellis {
    template <class F>
    static MOEQ_INLINE void chunk(const uint8_t* p, F&& step) {
        for (int i = 0; i < BITS; ++i) prefetch(p + i * kVector);
        steps<0>(Rows<BITS>(p), step);
    }
    static constexpr int kBytes = BITS * kVector;

   private:
    template <int STEP, class F>
    static MOEQ_INLINE void steps(const Rows<BITS>& rows, F&& step) {
        if constexpr (STEP < kSteps) {
            step(STEP, codes_of_states(rows.template state<4 * STEP>(), rows.template state<4 * STEP + 1>(),
                                       rows.template state<4 * STEP + 2>(), rows.template state<4 * STEP + 3>()));
            steps<STEP + 1>(rows, step);
        }
    }
};

}  // namespace
}  // namespace moeq
