// Thirty-two unsigned 16-bit lanes as two AVX2 registers. shorts_scalar.h shows what each operation does.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace moeq {
namespace {

constexpr int kShorts = 32;

struct Shorts {
    __m256i a, b;
};

inline Shorts splat_short(uint16_t v) {
    const __m256i all = _mm256_set1_epi16(static_cast<int16_t>(v));
    return {all, all};
}
inline Shorts load_shorts(const uint16_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16))};
}
inline void store_shorts(uint16_t* p, Shorts v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), v.b);
}
template <int B>
inline __m256i spread_half(const uint16_t* p) {
    constexpr auto byte = [](int lane, int half) { return static_cast<char>(2 * (lane >> B) + half); };
    const __m256i place = _mm256_setr_epi8(
        byte(0, 0), byte(0, 1), byte(1, 0), byte(1, 1), byte(2, 0), byte(2, 1), byte(3, 0), byte(3, 1),  //
        byte(4, 0), byte(4, 1), byte(5, 0), byte(5, 1), byte(6, 0), byte(6, 1), byte(7, 0), byte(7, 1),  //
        byte(8, 0), byte(8, 1), byte(9, 0), byte(9, 1), byte(10, 0), byte(10, 1), byte(11, 0), byte(11, 1),  //
        byte(12, 0), byte(12, 1), byte(13, 0), byte(13, 1), byte(14, 0), byte(14, 1), byte(15, 0), byte(15, 1));
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_shuffle_epi8(both, place);
}
template <int B>
inline Shorts spread(const uint16_t* p) {
    return {spread_half<B>(p), spread_half<B>(p + (16 >> B))};
}
inline Shorts minimum(Shorts x, Shorts y) { return {_mm256_min_epu16(x.a, y.a), _mm256_min_epu16(x.b, y.b)}; }
inline uint32_t other(Shorts least, Shorts x) {
    const __m256i same = _mm256_packs_epi16(_mm256_cmpeq_epi16(least.a, x.a), _mm256_cmpeq_epi16(least.b, x.b));
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(same, 0xd8)));
}
inline Shorts operator-(Shorts x, Shorts y) { return {_mm256_sub_epi16(x.a, y.a), _mm256_sub_epi16(x.b, y.b)}; }
inline Shorts squared(Shorts x) { return {_mm256_mullo_epi16(x.a, x.a), _mm256_mullo_epi16(x.b, x.b)}; }
inline Shorts add_saturated(Shorts x, Shorts y) { return {_mm256_adds_epu16(x.a, y.a), _mm256_adds_epu16(x.b, y.b)}; }
inline uint16_t smallest(Shorts x) {
    const __m256i half = _mm256_min_epu16(x.a, x.b);
    const __m128i eight = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return static_cast<uint16_t>(_mm_extract_epi16(_mm_minpos_epu16(eight), 0));
}

}  // namespace
}  // namespace moeq
