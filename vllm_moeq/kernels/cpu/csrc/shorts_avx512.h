// Thirty-two unsigned 16-bit lanes as one AVX-512 register. shorts_scalar.h shows what each operation does.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace moeq {
namespace {

constexpr int kShorts = 32;

struct Shorts {
    __m512i a;
};

inline Shorts splat_short(uint16_t v) { return {_mm512_set1_epi16(static_cast<int16_t>(v))}; }
inline Shorts load_shorts(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_shorts(uint16_t* p, Shorts v) { _mm512_storeu_si512(p, v.a); }
template <int B>
inline Shorts spread(const uint16_t* p) {
    alignas(64) static constexpr uint16_t lanes[kShorts] = {
        0 >> B,  1 >> B,  2 >> B,  3 >> B,  4 >> B,  5 >> B,  6 >> B,  7 >> B,  8 >> B,  9 >> B,  10 >> B,
        11 >> B, 12 >> B, 13 >> B, 14 >> B, 15 >> B, 16 >> B, 17 >> B, 18 >> B, 19 >> B, 20 >> B, 21 >> B,
        22 >> B, 23 >> B, 24 >> B, 25 >> B, 26 >> B, 27 >> B, 28 >> B, 29 >> B, 30 >> B, 31 >> B};
    return {_mm512_permutexvar_epi16(_mm512_load_si512(lanes), _mm512_loadu_si512(p))};
}
inline Shorts minimum(Shorts x, Shorts y) { return {_mm512_min_epu16(x.a, y.a)}; }
inline uint32_t other(Shorts least, Shorts x) { return _mm512_cmpneq_epu16_mask(least.a, x.a); }
inline Shorts operator-(Shorts x, Shorts y) { return {_mm512_sub_epi16(x.a, y.a)}; }
inline Shorts squared(Shorts x) { return {_mm512_mullo_epi16(x.a, x.a)}; }
inline Shorts add_saturated(Shorts x, Shorts y) { return {_mm512_adds_epu16(x.a, y.a)}; }
inline uint16_t smallest(Shorts x) {
    const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(x.a), _mm512_extracti64x4_epi64(x.a, 1));
    const __m128i eight = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return static_cast<uint16_t>(_mm_extract_epi16(_mm_minpos_epu16(eight), 0));
}

}  // namespace
}  // namespace moeq
