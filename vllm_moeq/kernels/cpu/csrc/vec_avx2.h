// Sixteen lanes as two AVX2 registers. See vec_scalar.h for what each operation means.
#pragma once

#include <immintrin.h>

#include "core.h"

namespace moeq {
namespace {

constexpr int kAccumulators = 6;  // pairs of registers for sums: twelve of the sixteen registers
constexpr int kDirectTokens = 2;
constexpr int kDirectTrellis = 0;  // decoding needs the registers itself

struct Floats {
    __m256 a, b;
};
struct Ints {
    __m256i a, b;
};
struct Codes {
    __m256i a, b;
};
using Quad = __m256i;

#define MOEQ_INLINE inline __attribute__((always_inline))
#define MOEQ_LAMBDA __attribute__((always_inline))

inline Floats splat(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
inline Floats load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline void store_half(uint16_t* p, Floats v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
}
inline Floats load_bfloat(const uint16_t* p) {
    const __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i b = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
}
inline Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats maximum(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats minimum(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats multiply_add(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
template <int DISTANCE>
inline Floats swapped(Floats x) {
    if constexpr (DISTANCE == 8) return {x.b, x.a};
    if constexpr (DISTANCE == 4) return {_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1)};
    constexpr int order = DISTANCE == 1 ? 0xb1 : 0x4e;
    return {_mm256_permute_ps(x.a, order), _mm256_permute_ps(x.b, order)};
}
inline Floats nearest(Floats x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline Ints to_ints(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline Floats as_floats(Ints x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline Ints as_ints(Floats x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }

inline Ints splat_int(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline Ints operator+(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Ints operator-(Ints x, Ints y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline Ints operator&(Ints x, Ints y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int N>
inline Ints shift_left(Ints x) {
    return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
}
template <int N>
inline Ints shift_right(Ints x) {
    return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)};
}
template <int N>
inline Ints shift_right_zero(Ints x) {
    return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)};
}
inline Ints operator|(Ints x, Ints y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline Ints previous_lane(Ints x) {
    const __m256i order = _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6);
    const __m256i a = _mm256_permutevar8x32_epi32(x.a, order), b = _mm256_permutevar8x32_epi32(x.b, order);
    return {_mm256_blend_epi32(a, b, 1), _mm256_blend_epi32(b, a, 1)};
}
inline void store_bytes(int8_t* p, Ints x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline void store_low_words(uint16_t* p, Ints x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
}

inline Codes load_codes(const uint8_t* p) {
    return {_mm256_load_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline void store_codes(uint8_t* p, Codes c) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), c.a);
    _mm256_store_si256(reinterpret_cast<__m256i*>(p + 32), c.b);
}
template <int RIGHT>
inline Codes moved(Codes c) {
    if constexpr (RIGHT > 0) return {_mm256_srli_epi16(c.a, RIGHT), _mm256_srli_epi16(c.b, RIGHT)};
    if constexpr (RIGHT < 0) return {_mm256_slli_epi16(c.a, -RIGHT), _mm256_slli_epi16(c.b, -RIGHT)};
    return c;
}
template <int MASK>
inline Codes masked(Codes c) {
    const __m256i mask = _mm256_set1_epi8(static_cast<char>(MASK));
    return {_mm256_and_si256(c.a, mask), _mm256_and_si256(c.b, mask)};
}
inline Codes operator|(Codes x, Codes y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline Ints lanes_of(Codes c) { return {c.a, c.b}; }
// Returns TIMES the sum of a product's bytes for two states per lane, in 16 bits each.
template <int TIMES>
inline __m256i sums_of_states(__m256i low, __m256i high) {
    const __m256i states = _mm256_or_si256(low, _mm256_slli_epi32(high, 16)), times = _mm256_set1_epi8(TIMES);
    const __m256i factor = _mm256_set1_epi16(static_cast<int16_t>(kTrellisFactor));
    const __m256i upper = _mm256_set1_epi16(static_cast<int16_t>(kTrellisFactor >> 16));
    const __m256i second = _mm256_add_epi16(_mm256_mulhi_epu16(states, factor), _mm256_mullo_epi16(states, upper));
    return _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_mullo_epi16(states, factor), times),
                            _mm256_maddubs_epi16(second, times));
}
// 32 times a sum has the code in its upper byte.
inline __m256i codes_of_states(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i even = _mm256_srli_epi16(sums_of_states<1>(a, c), 3);
    return _mm256_or_si256(even, _mm256_andnot_si256(_mm256_set1_epi16(0xff), sums_of_states<32>(b, d)));
}
inline Codes codes_of_states(Ints a, Ints b, Ints c, Ints d) {
    return {codes_of_states(a.a, b.a, c.a, d.a), codes_of_states(a.b, b.b, c.b, d.b)};
}
inline Quad quad(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

// Pairs of products are summed in 16 bits. A pair is at most 2 · 64 · (2^bits − 1), so as many steps as kRunChunks has
// fit in 2^15. Eight bits fit only once (2 · 64 · 255 = 32640) and are widened at every step. The empty assembly pins
// each sum to its place: compilers would otherwise keep the products of many steps in memory and add them at the end.
template <int BITS>
struct Dots {
    static constexpr int kRunChunks = BITS == 4 ? 2 : kSegmentChunks;
    __m256i a, b;

    inline void clear() { a = b = _mm256_setzero_si256(); }
    inline void add(Codes c, Quad q) {
        const __m256i x = _mm256_maddubs_epi16(c.a, q), y = _mm256_maddubs_epi16(c.b, q);
        if constexpr (BITS == 8) {
            const __m256i one = _mm256_set1_epi16(1);
            a = _mm256_add_epi32(a, _mm256_madd_epi16(x, one));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(y, one));
        } else {
            a = _mm256_add_epi16(a, x);
            b = _mm256_add_epi16(b, y);
        }
        __asm__ volatile("" : "+x"(a), "+x"(b));
    }
    inline Floats floats() const {
        if constexpr (BITS == 8) return {_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)};
        const __m256i one = _mm256_set1_epi16(1);
        return {_mm256_cvtepi32_ps(_mm256_madd_epi16(a, one)), _mm256_cvtepi32_ps(_mm256_madd_epi16(b, one))};
    }
};

}  // namespace
}  // namespace moeq
