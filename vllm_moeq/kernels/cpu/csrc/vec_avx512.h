// Sixteen lanes as one AVX-512 register. vec_scalar.h shows what each operation does. MOEQ_VNNI: dot products of bytes
// are summed directly in 32 bits.
#pragma once

#include <immintrin.h>

#include "core.h"

namespace moeq {
namespace {

constexpr int kAccumulators = 16;  // half of the 32 registers
constexpr int kDirectTokens = 8;
constexpr int kDirectTrellis = 4;

struct Floats {
    __m512 a;
};
struct Ints {
    __m512i a;
};
struct Codes {
    __m512i a;
};
using Quad = __m512i;

#ifndef MOEQ_EMULATED  // a test defines these, and the instructions, in C++
#define MOEQ_INLINE inline __attribute__((always_inline))
#define MOEQ_LAMBDA __attribute__((always_inline))
#define MOEQ_PIN(x) __asm__ volatile("" : "+v"(x))  // see vec_avx2.h
#endif

inline Floats splat(float v) { return {_mm512_set1_ps(v)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v.a); }
inline Floats load_half(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store_half(uint16_t* p, Floats v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
}
inline Floats load_bfloat(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Floats operator+(Floats x, Floats y) { return {_mm512_add_ps(x.a, y.a)}; }
inline Floats operator-(Floats x, Floats y) { return {_mm512_sub_ps(x.a, y.a)}; }
inline Floats operator*(Floats x, Floats y) { return {_mm512_mul_ps(x.a, y.a)}; }
inline Floats operator/(Floats x, Floats y) { return {_mm512_div_ps(x.a, y.a)}; }
inline Floats maximum(Floats x, Floats y) { return {_mm512_max_ps(x.a, y.a)}; }
inline Floats minimum(Floats x, Floats y) { return {_mm512_min_ps(x.a, y.a)}; }
inline Floats multiply_add(Floats x, Floats y, Floats z) { return {_mm512_fmadd_ps(x.a, y.a, z.a)}; }
template <int DISTANCE>
inline Floats swapped(Floats x) {
    constexpr int order = DISTANCE == 1 || DISTANCE == 4 ? 0xb1 : 0x4e;
    if constexpr (DISTANCE < 4) return {_mm512_permute_ps(x.a, order)};
    return {_mm512_shuffle_f32x4(x.a, x.a, order)};
}
inline Floats nearest(Floats x) {
    return {_mm512_roundscale_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Ints to_ints(Floats x) { return {_mm512_cvtps_epi32(x.a)}; }
inline Floats as_floats(Ints x) { return {_mm512_castsi512_ps(x.a)}; }
inline Ints as_ints(Floats x) { return {_mm512_castps_si512(x.a)}; }

inline Ints splat_int(int32_t v) { return {_mm512_set1_epi32(v)}; }
inline Ints operator+(Ints x, Ints y) { return {_mm512_add_epi32(x.a, y.a)}; }
inline Ints operator-(Ints x, Ints y) { return {_mm512_sub_epi32(x.a, y.a)}; }
inline Ints operator&(Ints x, Ints y) { return {_mm512_and_si512(x.a, y.a)}; }
template <int N>
inline Ints shift_left(Ints x) {
    return {_mm512_slli_epi32(x.a, N)};
}
template <int N>
inline Ints shift_right(Ints x) {
    return {_mm512_srai_epi32(x.a, N)};
}
template <int N>
inline Ints shift_right_zero(Ints x) {
    return {_mm512_srli_epi32(x.a, N)};
}
inline Ints operator|(Ints x, Ints y) { return {_mm512_or_si512(x.a, y.a)}; }
inline Ints previous_lane(Ints x) { return {_mm512_alignr_epi32(x.a, x.a, 15)}; }
inline void store_bytes(int8_t* p, Ints x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.a));
}
inline void store_low_words(uint16_t* p, Ints x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x.a));
}

inline Codes load_codes(const uint8_t* p) { return {_mm512_load_si512(p)}; }
inline void store_codes(uint8_t* p, Codes c) { _mm512_store_si512(p, c.a); }
template <int RIGHT>
inline Codes moved(Codes c) {
    if constexpr (RIGHT > 0) return {_mm512_srli_epi16(c.a, RIGHT)};
    if constexpr (RIGHT < 0) return {_mm512_slli_epi16(c.a, -RIGHT)};
    return c;
}
template <int MASK>
inline Codes masked(Codes c) {
    return {_mm512_and_si512(c.a, _mm512_set1_epi8(static_cast<char>(MASK)))};
}
inline Codes operator|(Codes x, Codes y) { return {_mm512_or_si512(x.a, y.a)}; }
inline Ints lanes_of(Codes c) { return {c.a}; }
// Returns TIMES the sum of a product's bytes for two states per lane, in 16 bits each.
#ifdef MOEQ_VNNI
template <int TIMES>
inline __m512i sums_of_states(__m512i low, __m512i high) {
    const __m512i factor = _mm512_set1_epi32(static_cast<int32_t>(kTrellisFactor)), times = _mm512_set1_epi8(TIMES);
    const __m512i upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_mullo_epi32(high, factor), times);
    return _mm512_dpbusd_epi32(_mm512_slli_epi32(upper, 16), _mm512_mullo_epi32(low, factor), times);
}
#else
template <int TIMES>
inline __m512i sums_of_states(__m512i low, __m512i high) {
    const __m512i states = _mm512_or_si512(low, _mm512_slli_epi32(high, 16)), times = _mm512_set1_epi8(TIMES);
    const __m512i factor = _mm512_set1_epi16(static_cast<int16_t>(kTrellisFactor));
    const __m512i upper = _mm512_set1_epi16(static_cast<int16_t>(kTrellisFactor >> 16));
    const __m512i second = _mm512_add_epi16(_mm512_mulhi_epu16(states, factor), _mm512_mullo_epi16(states, upper));
    return _mm512_add_epi16(_mm512_maddubs_epi16(_mm512_mullo_epi16(states, factor), times),
                            _mm512_maddubs_epi16(second, times));
}
#endif
// 32 times a sum has the code in its upper byte.
inline Codes codes_of_states(Ints a, Ints b, Ints c, Ints d) {
    const __m512i even = _mm512_srli_epi16(sums_of_states<1>(a.a, c.a), 3), odd = sums_of_states<32>(b.a, d.a);
    return {_mm512_or_si512(even, _mm512_and_si512(odd, _mm512_set1_epi16(static_cast<int16_t>(0xff00))))};
}
inline Quad quad(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

#ifdef MOEQ_VNNI
template <int BITS>
struct Dots {
    static constexpr int kRunChunks = kSegmentChunks;
    __m512i a;

    inline void clear() { a = _mm512_setzero_si512(); }
    inline void add(Codes c, Quad q) {
        a = _mm512_dpbusd_epi32(a, c.a, q);
        MOEQ_PIN(a);
    }
    inline Floats floats() const { return {_mm512_cvtepi32_ps(a)}; }
};
#else
// See vec_avx2.h.
template <int BITS>
struct Dots {
    static constexpr int kRunChunks = BITS == 4 ? 2 : kSegmentChunks;
    __m512i a;

    inline void clear() { a = _mm512_setzero_si512(); }
    inline void add(Codes c, Quad q) {
        const __m512i x = _mm512_maddubs_epi16(c.a, q);
        if constexpr (BITS == 8) {
            a = _mm512_add_epi32(a, _mm512_madd_epi16(x, _mm512_set1_epi16(1)));
        } else {
            a = _mm512_add_epi16(a, x);
        }
        MOEQ_PIN(a);
    }
    inline Floats floats() const {
        if constexpr (BITS == 8) return {_mm512_cvtepi32_ps(a)};
        return {_mm512_cvtepi32_ps(_mm512_madd_epi16(a, _mm512_set1_epi16(1)))};
    }
};
#endif

}  // namespace
}  // namespace moeq
