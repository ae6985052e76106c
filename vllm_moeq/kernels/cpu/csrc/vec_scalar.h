// Sixteen lanes in plain C++, for processors without AVX2; the other headers are compared with this one.
#pragma once

#include <math.h>

#include "core.h"

namespace moeq {
namespace {

constexpr int kAccumulators = 1;  // sums (one per token and digit) that are kept in registers
constexpr int kDirectTokens = 2;  // up to this many tokens, codes are decoded anew for each group of tokens
constexpr int kDirectTrellis = 0;  // the same of a trellis, whose codes are always decoded once

// Inlining is left to the compiler: with sixteen lanes in each of many unrolled steps it would take minutes.
#define MOEQ_INLINE inline
#define MOEQ_LAMBDA

struct Floats {
    float v[kLanes];
};
struct Ints {
    int32_t v[kLanes];
};
struct Codes {
    uint8_t v[kVector];  // four columns of sixteen rows
};
struct Quad {
    int8_t v[4];  // four columns of one token
};

template <class F>
inline Floats each(F f) {
    Floats r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = f(i);
    return r;
}
template <class F>
inline Ints each_int(F f) {
    Ints r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = f(i);
    return r;
}
template <class F>
inline Codes each_code(F f) {
    Codes r;
    for (int i = 0; i < kVector; ++i) r.v[i] = static_cast<uint8_t>(f(i));
    return r;
}
inline float float_of(uint32_t bits) {
    float r;
    __builtin_memcpy(&r, &bits, 4);
    return r;
}
inline uint32_t bits_of(float v) {
    uint32_t r;
    __builtin_memcpy(&r, &v, 4);
    return r;
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
    if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) {
        const float tiny = static_cast<float>(mantissa) * 0x1p-24f;
        return sign ? -tiny : tiny;
    }
    return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline uint16_t float_to_half(float f) {
    const uint32_t bits = bits_of(f), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (size >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and above
    if (size < 0x38800000u) {  // subnormal: the addition rounds at 2^-24
        return static_cast<uint16_t>(sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f)));
    }
    const uint32_t rounded = size + 0xfffu + (size >> 13 & 1u);
    return static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13);
}

inline Floats splat(float v) {
    return each([&](int) { return v; });
}
inline Floats load(const float* p) {
    return each([&](int i) { return p[i]; });
}
inline void store(float* p, Floats x) { __builtin_memcpy(p, x.v, sizeof x.v); }
inline Floats load_half(const uint16_t* p) {
    return each([&](int i) { return half_to_float(p[i]); });
}
inline void store_half(uint16_t* p, Floats x) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(x.v[i]);
}
inline Floats load_bfloat(const uint16_t* p) {
    return each([&](int i) { return float_of(static_cast<uint32_t>(p[i]) << 16); });
}
inline Floats operator+(Floats x, Floats y) {
    return each([&](int i) { return x.v[i] + y.v[i]; });
}
inline Floats operator-(Floats x, Floats y) {
    return each([&](int i) { return x.v[i] - y.v[i]; });
}
inline Floats operator*(Floats x, Floats y) {
    return each([&](int i) { return x.v[i] * y.v[i]; });
}
inline Floats operator/(Floats x, Floats y) {
    return each([&](int i) { return x.v[i] / y.v[i]; });
}
inline Floats maximum(Floats x, Floats y) {
    return each([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
}
inline Floats minimum(Floats x, Floats y) {
    return each([&](int i) { return x.v[i] < y.v[i] ? x.v[i] : y.v[i]; });
}
inline Floats multiply_add(Floats x, Floats y, Floats z) {
    return each([&](int i) { return x.v[i] * y.v[i] + z.v[i]; });
}
// Lane i becomes lane i ^ DISTANCE, for 1, 2, 4 and 8.
template <int DISTANCE>
inline Floats swapped(Floats x) {
    return each([&](int i) { return x.v[i ^ DISTANCE]; });
}
inline Floats nearest(Floats x) {
    return each([&](int i) { return rintf(x.v[i]); });
}
inline Ints to_ints(Floats x) {  // magnitudes must be below 2^31
    return each_int([&](int i) { return static_cast<int32_t>(rintf(x.v[i])); });
}
inline Floats as_floats(Ints x) {
    return each([&](int i) { return float_of(static_cast<uint32_t>(x.v[i])); });
}
inline Ints as_ints(Floats x) {
    return each_int([&](int i) { return static_cast<int32_t>(bits_of(x.v[i])); });
}

// Integers wrap around, as in vector registers.
inline int32_t wrapped(uint32_t v) { return static_cast<int32_t>(v); }
inline Ints splat_int(int32_t v) {
    return each_int([&](int) { return v; });
}
inline Ints operator+(Ints x, Ints y) {
    return each_int([&](int i) { return wrapped(static_cast<uint32_t>(x.v[i]) + static_cast<uint32_t>(y.v[i])); });
}
inline Ints operator-(Ints x, Ints y) {
    return each_int([&](int i) { return wrapped(static_cast<uint32_t>(x.v[i]) - static_cast<uint32_t>(y.v[i])); });
}
inline Ints operator&(Ints x, Ints y) {
    return each_int([&](int i) { return x.v[i] & y.v[i]; });
}
template <int N>
inline Ints shift_left(Ints x) {
    return each_int([&](int i) { return wrapped(static_cast<uint32_t>(x.v[i]) << N); });
}
template <int N>
inline Ints shift_right(Ints x) {  // keeps the sign
    return each_int([&](int i) { return x.v[i] >> N; });
}
template <int N>
inline Ints shift_right_zero(Ints x) {
    return each_int([&](int i) { return wrapped(static_cast<uint32_t>(x.v[i]) >> N); });
}
inline Ints operator|(Ints x, Ints y) {
    return each_int([&](int i) { return x.v[i] | y.v[i]; });
}
// Lane i becomes lane i − 1, the first the last.
inline Ints previous_lane(Ints x) {
    return each_int([&](int i) { return x.v[(i + kLanes - 1) % kLanes]; });
}
inline void store_bytes(int8_t* p, Ints x) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(x.v[i]);
}
inline void store_low_words(uint16_t* p, Ints x) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint16_t>(x.v[i]);
}

inline Codes load_codes(const uint8_t* p) {
    return each_code([&](int i) { return p[i]; });
}
inline void store_codes(uint8_t* p, Codes c) { __builtin_memcpy(p, c.v, kVector); }
// Shifts bytes to the right, or to the left if RIGHT is negative; bits from a neighbouring byte are masked later.
template <int RIGHT>
inline Codes moved(Codes c) {
    if constexpr (RIGHT >= 0) return each_code([&](int i) { return c.v[i] >> RIGHT; });
    return each_code([&](int i) { return c.v[i] << (RIGHT < 0 ? -RIGHT : 0); });
}
template <int MASK>
inline Codes masked(Codes c) {
    return each_code([&](int i) { return c.v[i] & MASK; });
}
inline Codes operator|(Codes x, Codes y) {
    return each_code([&](int i) { return x.v[i] | y.v[i]; });
}
inline Ints lanes_of(Codes c) {
    Ints r;
    __builtin_memcpy(r.v, c.v, kVector);
    return r;
}
// Returns the codes of a trellis' states of four columns, each below 2^12: an eighth of the sum of a product's bytes.
inline Codes codes_of_states(Ints a, Ints b, Ints c, Ints d) {
    const Ints columns[] = {a, b, c, d};
    return each_code([&](int i) {
        const uint32_t p = static_cast<uint32_t>(columns[i % 4].v[i / 4]) * kTrellisFactor;
        return ((p & 255) + (p >> 8 & 255) + (p >> 16 & 255) + (p >> 24)) >> 3;
    });
}
inline Quad quad(const int8_t* p) {
    Quad q;
    __builtin_memcpy(q.v, p, 4);
    return q;
}

// The sums of code · digit per row, over at most kRunChunks chunks.
template <int BITS>
struct Dots {
    static constexpr int kRunChunks = kSegmentChunks;
    Ints sums;

    inline void clear() { sums = splat_int(0); }
    inline void add(const Codes& c, Quad q) {
        for (int i = 0; i < kLanes; ++i) {
            for (int j = 0; j < 4; ++j) sums.v[i] += c.v[4 * i + j] * q.v[j];
        }
    }
    inline Floats floats() const {
        return each([&](int i) { return static_cast<float>(sums.v[i]); });
    }
};

}  // namespace
}  // namespace moeq
