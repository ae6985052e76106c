// Decodes the codes of one chunk, four columns at a time.
#pragma once

namespace moeq {
namespace {

inline void prefetch(const uint8_t* p) {
    // Far enough ahead to hide memory's latency at full speed. This may reach into the next panel, which is read next.
    __builtin_prefetch(p + 3072);
}

template <int FIELDS, int STEP, int BITS, class F>
MOEQ_INLINE void fields(Codes word, F&& step) {
    if constexpr (FIELDS > 0) {
        constexpr int index = 8 / BITS - FIELDS;
        step(STEP, masked<(1 << BITS) - 1>(moved<index * BITS>(word)));
        fields<FIELDS - 1, STEP + 1, BITS>(word, step);
    }
}

template <int STEP, class F>
MOEQ_INLINE void bytes(const uint8_t* p, F&& step) {
    if constexpr (STEP < kSteps) {
        step(STEP, load_codes(p + STEP * kVector));
        bytes<STEP + 1>(p, step);
    }
}

// Calls step(index, codes) for the eight steps of a chunk of packed codes.
template <int BITS>
struct Packed {
    template <class F>
    static MOEQ_INLINE void chunk(const uint8_t* p, F&& step) {
        words<0>(p, step);
    }
    static constexpr int kBytes = BITS * kVector;

   private:
    template <int WORD, class F>
    static MOEQ_INLINE void words(const uint8_t* p, F&& step) {
        if constexpr (WORD < BITS) {
            prefetch(p + WORD * kVector);
            fields<8 / BITS, WORD * (8 / BITS), BITS>(load_codes(p + WORD * kVector), step);
            words<WORD + 1>(p, step);
        }
    }
};

template <>
struct Packed<8> {
    template <class F>
    static MOEQ_INLINE void chunk(const uint8_t* p, F&& step) {
        for (int i = 0; i < kSteps; ++i) prefetch(p + i * kVector);
        bytes<0>(p, step);
    }
    static constexpr int kBytes = 8 * kVector;
};

// Each byte of three vectors has two codes in its low six bits. The top bits hold two more codes: their low two bits in
// the first two vectors, their third bits in the last vector.
template <>
struct Packed<3> {
    template <class F>
    static MOEQ_INLINE void chunk(const uint8_t* p, F&& step) {
        for (int i = 0; i < 3; ++i) prefetch(p + i * kVector);
        const Codes last = load_codes(p + 2 * kVector);
        three<0>(load_codes(p), masked<4>(moved<4>(last)), step);
        three<3>(load_codes(p + kVector), masked<4>(moved<5>(last)), step);
        pair<6>(last, step);
    }
    static constexpr int kBytes = 3 * kVector;

   private:
    template <int STEP, class F>
    static MOEQ_INLINE void pair(Codes word, F&& step) {
        step(STEP, masked<7>(word));
        step(STEP + 1, masked<7>(moved<3>(word)));
    }
    template <int STEP, class F>
    static MOEQ_INLINE void three(Codes word, Codes third, F&& step) {
        pair<STEP>(word, step);
        step(STEP + 2, masked<3>(moved<6>(word)) | third);
    }
};

// Codes that are already decoded, one per byte.
struct Decoded {
    template <class F>
    static MOEQ_INLINE void chunk(const uint8_t* p, F&& step) {
        bytes<0>(p, step);
    }
    static constexpr int kBytes = kSteps * kVector;
};

template <class Source>
void decode(const uint8_t* p, int chunks, uint8_t* tile) {
    for (int c = 0; c < chunks; ++c) {
        Source::chunk(p + c * Source::kBytes, [&](int i, Codes codes) MOEQ_LAMBDA {
            store_codes(tile + (c * kSteps + i) * kVector, codes);
        });
    }
}

}  // namespace
}  // namespace moeq
