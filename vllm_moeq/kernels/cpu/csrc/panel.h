// Multiplies a panel of weights with the tokens of one expert.
#pragma once

namespace moeq {
namespace {

// One token's sums, one per digit. Nested structures instead of an array: compilers keep an array in memory if they
// unroll the loop over it too late.
template <int BITS, int DIGITS>
struct DigitDots {
    Dots<BITS> first;
    DigitDots<BITS, DIGITS - 1> rest;

    MOEQ_INLINE void clear() {
        first.clear();
        rest.clear();
    }
    MOEQ_INLINE void add(Codes four, const int8_t* x) {
        first.add(four, quad(x));
        rest.add(four, x + kChunk);
    }
    // Joins the sums, highest digit first. Two digits are exact: a sum of 128 products of 8 and 7 bits fits a float.
    MOEQ_INLINE Floats floats() const { return rest.after(first.floats()); }
    MOEQ_INLINE Floats after(Floats higher) const {
        return rest.after(multiply_add(higher, splat(128.0f), first.floats()));
    }
};
template <int BITS>
struct DigitDots<BITS, 0> {
    MOEQ_INLINE void clear() {}
    MOEQ_INLINE void add(Codes, const int8_t*) {}
    MOEQ_INLINE Floats after(Floats all) const { return all; }
};

template <int BITS, int DIGITS, int TOKENS>
struct TokenDots {
    const int8_t* x;
    DigitDots<BITS, DIGITS> dots;
    Floats total;
    TokenDots<BITS, DIGITS, TOKENS - 1> rest;

    MOEQ_INLINE void begin(const int8_t* digits, const int32_t* rows, int64_t bytes) {
        x = digits + rows[0] * bytes;
        total = splat(0.0f);
        rest.begin(digits, rows + 1, bytes);
    }
    MOEQ_INLINE void clear() {
        dots.clear();
        rest.clear();
    }
    MOEQ_INLINE void add(Codes four, int64_t place) {
        dots.add(four, x + place);
        rest.add(four, place);
    }
    MOEQ_INLINE void flush() {
        total = total + dots.floats();
        rest.flush();
    }
};
template <int BITS, int DIGITS>
struct TokenDots<BITS, DIGITS, 0> {
    MOEQ_INLINE void begin(const int8_t*, const int32_t*, int64_t) {}
    MOEQ_INLINE void clear() {}
    MOEQ_INLINE void add(Codes, int64_t) {}
    MOEQ_INLINE void flush() {}
};

struct Scales {
    Floats scale, zero;
};

// Loads the vector with this index of float32 or float16.
MOEQ_INLINE Floats load_scale(const uint8_t* p, int index, bool wide) {
    if (wide) return load(reinterpret_cast<const float*>(p) + index * kLanes);
    return load_half(reinterpret_cast<const uint16_t*>(p) + index * kLanes);
}

MOEQ_INLINE Scales load_scales(const uint8_t* p, bool wide) {
    return {load_scale(p, 0, wide), load_scale(p, 1, wide)};
}

// The activations of one segment.
struct Slice {
    const int8_t* digits;
    int64_t bytes;  // per row
    const float* scale;
    const float* sum;
    const int32_t* rows;
    int chunks;
};

// Adds scale · (Σ q·a − zero · Σ a) to sums[t · kPanelRows] for each token t.
template <int BITS, int DIGITS>
MOEQ_INLINE void add_results(const TokenDots<BITS, DIGITS, 0>&, const Slice&, int, Scales, float*) {}

template <int BITS, int DIGITS, int TOKENS>
MOEQ_INLINE void add_results(const TokenDots<BITS, DIGITS, TOKENS>& tokens, const Slice& x, int first, Scales w, float* sums) {
    const int32_t row = x.rows[first];
    const Floats centred = multiply_add(w.zero, splat(-x.sum[row]), tokens.total);
    float* place = sums + first * kPanelRows;
    store(place, multiply_add(centred, w.scale * splat(x.scale[row]), load(place)));
    add_results(tokens.rest, x, first + 1, w, sums);
}
template <class Source, int BITS, int DIGITS, int TOKENS>
inline void add_tokens(const uint8_t* codes, const Slice& x, int first, Scales w, float* sums) {
    constexpr int run = Dots<BITS>::kRunChunks;
    TokenDots<BITS, DIGITS, TOKENS> tokens;
    tokens.begin(x.digits, x.rows + first, x.bytes);
    for (int begin = 0; begin < x.chunks; begin += run) {
        const int end = begin + run < x.chunks ? begin + run : x.chunks;
        tokens.clear();
        for (int c = begin; c < end; ++c) {
            Source::chunk(codes + c * Source::kBytes, [&](int step, Codes four) MOEQ_LAMBDA {
                tokens.add(four, c * DIGITS * kChunk + 4 * step);
            });
        }
        tokens.flush();
    }
    add_results(tokens, x, first, w, sums);
}

// Takes as many tokens as `size` says, from 1 to MOST.
template <class Source, int BITS, int DIGITS, int MOST>
inline void add_group(int size, const uint8_t* codes, const Slice& x, int first, Scales w, float* sums) {
    if constexpr (MOST > 1) {
        if (size < MOST) return add_group<Source, BITS, DIGITS, MOST - 1>(size, codes, x, first, w, sums);
    }
    add_tokens<Source, BITS, DIGITS, MOST>(codes, x, first, w, sums);
}

// Takes the tokens in as few groups as fit in registers, all of about the same size: a small group waits for its sums.
template <class Source, int BITS, int DIGITS, int MOST>
inline void add_all(int tokens, const uint8_t* codes, const Slice& x, Scales w, float* sums) {
    constexpr int fitting = kAccumulators / DIGITS > 0 ? kAccumulators / DIGITS : 1;
    constexpr int most = fitting < MOST ? fitting : MOST;
    static_assert(most > 0);
    for (int first = 0, groups = (tokens + most - 1) / most; groups > 0; --groups) {
        const int size = (tokens - first + groups - 1) / groups;
        add_group<Source, BITS, DIGITS, most>(size, codes, x, first, w, sums);
        first += size;
    }
}

inline void clear_sums(int tokens, float* sums) {
    for (int i = 0; i < tokens * kPanelRows; i += kLanes) store(sums + i, splat(0.0f));
}

template <int DIGITS>
MOEQ_INLINE Slice slice_of(const Planes& planes, const int32_t* rows, int s, const Segment& segment) {
    const int64_t before = static_cast<int64_t>(segment.chunk) * kChunk * DIGITS * planes.rows;
    return {planes.digits + before, segment.chunks * kChunk * DIGITS, planes.scale + s * planes.rows,
            planes.sum + s * planes.rows, rows, segment.chunks};
}

// Writes sums [tokens, kPanelRows]: the panel times the rows of `planes` with the indices `rows`.
template <int BITS, int DIGITS>
void multiply_panel(const Matrices& m, const uint8_t* panel, const Planes& planes, const int32_t* rows, int tokens,
                    float* sums) {
    alignas(64) uint8_t tile[kSegmentChunks * kSteps * kVector];
    const uint8_t* header[kBlocks] = {panel, panel};
    clear_sums(tokens, sums);
    for (int s = 0; s < m.num_segments; ++s) {
        const Segment segment = m.segments[s];
        const Slice x = slice_of<DIGITS>(planes, rows, s, segment);
        for (int block = 0; block < kBlocks; ++block) {
            if (segment.fresh) {
                header[block] = panel;
                panel += header_bytes(m);
            }
            const Scales w = load_scales(header[block], m.wide);
            float* place = sums + block * kLanes;
            if (tokens <= kDirectTokens) {
                add_all<Packed<BITS>, BITS, DIGITS, kDirectTokens>(tokens, panel, x, w, place);
            } else {
                constexpr int as = BITS < 3 ? 3 : BITS;  // once decoded, narrower codes need no code of their own
                decode<Packed<BITS>>(panel, segment.chunks, tile);
                add_all<Decoded, as, DIGITS, kTokensAtOnce>(tokens, tile, x, w, place);
            }
            panel += segment.chunks * Packed<BITS>::kBytes;
        }
    }
}

// The same for a panel of a trellis. Its codes cost so much that they are decoded once, for however many tokens; their
// seven bits need the sums of eight, because three pairs of products do not fit 16 bits.
template <int BITS, int DIGITS>
void multiply_trellis(const Matrices& m, const uint8_t* panel, const Planes& planes, const int32_t* rows, int tokens,
                      float* sums) {
    alignas(64) uint8_t tile[kSegmentChunks * kSteps * kVector];
    static_assert(kDirectTrellis * 4 <= kAccumulators);  // all tokens at once, with four digits
    const uint8_t* header = panel;
    panel += header_bytes(m);
    clear_sums(tokens, sums);
    for (int s = 0; s < m.num_segments; ++s) {
        const Segment segment = m.segments[s];
        const Slice x = slice_of<DIGITS>(planes, rows, s, segment);
        for (int block = 0; block < kBlocks; ++block) {
            const Scales w = {load_scale(header, block, m.wide), splat(kTrellisZero)};
            float* place = sums + block * kLanes;
            bool direct = false;
            if constexpr (kDirectTrellis > 0) {
                direct = tokens <= kDirectTrellis;
                if (direct) add_all<Trellis<BITS>, 8, DIGITS, kDirectTrellis>(tokens, panel, x, w, place);
            }
            if (!direct) {
                decode<Trellis<BITS>>(panel, segment.chunks, tile);
                add_all<Decoded, 8, DIGITS, kTokensAtOnce>(tokens, tile, x, w, place);
            }
            panel += segment.chunks * BITS * kVector;
        }
    }
}

template <int DIGITS>
void multiply(Coding coding, const Matrices& m, const uint8_t* panel, const Planes& planes, const int32_t* rows,
              int tokens, float* sums) {
    if (coding.scheme == kTrellis) {
        switch (coding.bits) {
            case 1: return multiply_trellis<1, DIGITS>(m, panel, planes, rows, tokens, sums);
            case 2: return multiply_trellis<2, DIGITS>(m, panel, planes, rows, tokens, sums);
            case 3: return multiply_trellis<3, DIGITS>(m, panel, planes, rows, tokens, sums);
            case 4: return multiply_trellis<4, DIGITS>(m, panel, planes, rows, tokens, sums);
            default: __builtin_trap();  // a trellis has no other width
        }
    }
    switch (coding.bits) {
        case 1: return multiply_panel<1, DIGITS>(m, panel, planes, rows, tokens, sums);
        case 2: return multiply_panel<2, DIGITS>(m, panel, planes, rows, tokens, sums);
        case 3: return multiply_panel<3, DIGITS>(m, panel, planes, rows, tokens, sums);
        case 4: return multiply_panel<4, DIGITS>(m, panel, planes, rows, tokens, sums);
        case 8: return multiply_panel<8, DIGITS>(m, panel, planes, rows, tokens, sums);
        default: __builtin_trap();  // the binding has checked
    }
}

}  // namespace
}  // namespace moeq
