// The 512-bit instructions that the kernels use, in plain C++: a processor without them runs the same source, and
// sanitizers see into it. Included before vec_avx512.h; needs AVX2 and F16C for the parts that are 256 bits wide.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define MOEQ_EMULATED
#define MOEQ_INLINE inline
#define MOEQ_LAMBDA
#define MOEQ_PIN(x)

namespace emulated {

union Vector {
    float f[16];
    int32_t i[16];
    uint32_t u[16];
    int16_t s[32];
    uint16_t w[32];
    int8_t c[64];
    uint8_t b[64];
};

template <class F>
Vector floats(F of) {
    Vector r;
    for (int k = 0; k < 16; ++k) r.f[k] = of(k);
    return r;
}
template <class F>
Vector ints(F of) {
    Vector r;
    for (int k = 0; k < 16; ++k) r.u[k] = static_cast<uint32_t>(of(k));
    return r;
}
template <class F>
Vector words(F of) {
    Vector r;
    for (int k = 0; k < 32; ++k) r.w[k] = static_cast<uint16_t>(of(k));
    return r;
}

inline Vector zero() { return ints([](int) { return 0; }); }
inline Vector set_ps(float v) { return floats([=](int) { return v; }); }
inline Vector set_epi32(int32_t v) { return ints([=](int) { return v; }); }
inline Vector set_epi16(int v) { return words([=](int) { return v; }); }
inline Vector set_epi8(char v) {
    Vector r;
    std::memset(r.b, v, 64);
    return r;
}
inline Vector load(const void* p) {
    Vector r;
    std::memcpy(&r, p, 64);
    return r;
}
inline void store(void* p, Vector v) { std::memcpy(p, &v, 64); }
inline const void* aligned(const void* p) {  // as the instructions demand
    if (reinterpret_cast<uintptr_t>(p) % 64) std::abort();
    return p;
}
inline Vector load_aligned(const void* p) { return load(aligned(p)); }
inline void store_aligned(void* p, Vector v) { store(const_cast<void*>(aligned(p)), v); }
inline Vector same(Vector v) { return v; }

inline Vector add_ps(Vector x, Vector y) { return floats([&](int k) { return x.f[k] + y.f[k]; }); }
inline Vector sub_ps(Vector x, Vector y) { return floats([&](int k) { return x.f[k] - y.f[k]; }); }
inline Vector mul_ps(Vector x, Vector y) { return floats([&](int k) { return x.f[k] * y.f[k]; }); }
inline Vector div_ps(Vector x, Vector y) { return floats([&](int k) { return x.f[k] / y.f[k]; }); }
inline Vector fmadd_ps(Vector x, Vector y, Vector z) {
    return floats([&](int k) { return std::fma(x.f[k], y.f[k], z.f[k]); });
}
// The second operand where either is no number.
inline Vector max_ps(Vector x, Vector y) { return floats([&](int k) { return x.f[k] > y.f[k] ? x.f[k] : y.f[k]; }); }
inline Vector min_ps(Vector x, Vector y) { return floats([&](int k) { return x.f[k] < y.f[k] ? x.f[k] : y.f[k]; }); }
inline Vector round_ps(Vector x, int) { return floats([&](int k) { return std::nearbyint(x.f[k]); }); }

inline Vector permute_ps(Vector x, int order) {  // within fours
    return ints([&](int k) { return x.u[k / 4 * 4 + (order >> k % 4 * 2 & 3)]; });
}
inline Vector shuffle_f32x4(Vector x, Vector y, int order) {  // of fours
    return ints([&](int k) { return (k < 8 ? x : y).u[(order >> k / 4 * 2 & 3) * 4 + k % 4]; });
}

inline Vector add_epi32(Vector x, Vector y) { return ints([&](int k) { return x.u[k] + y.u[k]; }); }
inline Vector sub_epi32(Vector x, Vector y) { return ints([&](int k) { return x.u[k] - y.u[k]; }); }
inline Vector and_bits(Vector x, Vector y) { return ints([&](int k) { return x.u[k] & y.u[k]; }); }
inline Vector or_bits(Vector x, Vector y) { return ints([&](int k) { return x.u[k] | y.u[k]; }); }
inline Vector slli_epi32(Vector x, int n) { return ints([&](int k) { return x.u[k] << n; }); }
inline Vector srai_epi32(Vector x, int n) { return ints([&](int k) { return x.i[k] >> n; }); }
inline Vector srli_epi32(Vector x, int n) { return ints([&](int k) { return x.u[k] >> n; }); }
inline Vector mullo_epi32(Vector x, Vector y) { return ints([&](int k) { return x.u[k] * y.u[k]; }); }
inline Vector mullo_epi16(Vector x, Vector y) { return words([&](int k) { return uint32_t{x.w[k]} * y.w[k]; }); }
inline Vector mulhi_epu16(Vector x, Vector y) { return words([&](int k) { return uint32_t{x.w[k]} * y.w[k] >> 16; }); }
inline Vector alignr_epi32(Vector high, Vector low, int n) {
    return ints([&](int k) { return k + n < 16 ? low.u[k + n] : high.u[k + n - 16]; });
}
inline Vector slli_epi16(Vector x, int n) { return words([&](int k) { return x.w[k] << n; }); }
inline Vector srli_epi16(Vector x, int n) { return words([&](int k) { return x.w[k] >> n; }); }
inline Vector add_epi16(Vector x, Vector y) { return words([&](int k) { return x.w[k] + y.w[k]; }); }

inline Vector to_ints(Vector x) { return ints([&](int k) { return static_cast<int32_t>(std::nearbyint(x.f[k])); }); }
inline Vector to_floats(Vector x) { return floats([&](int k) { return static_cast<float>(x.i[k]); }); }
inline Vector from_halves(__m256i h) {
    Vector r;
    _mm256_storeu_ps(r.f, _mm256_cvtph_ps(_mm256_castsi256_si128(h)));
    _mm256_storeu_ps(r.f + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1)));
    return r;
}
inline __m256i to_halves(Vector x, int) {
    const __m128i low = _mm256_cvtps_ph(_mm256_loadu_ps(x.f), 0), high = _mm256_cvtps_ph(_mm256_loadu_ps(x.f + 8), 0);
    return _mm256_set_m128i(high, low);
}
inline Vector from_words(__m256i x) {
    uint16_t word[16];
    std::memcpy(word, &x, 32);
    return ints([&](int k) { return word[k]; });
}
inline __m256i low_words(Vector x) {
    uint16_t word[16];
    for (int k = 0; k < 16; ++k) word[k] = static_cast<uint16_t>(x.u[k]);
    __m256i r;
    std::memcpy(&r, word, 32);
    return r;
}
inline __m128i low_bytes(Vector x) {
    uint8_t byte[16];
    for (int k = 0; k < 16; ++k) byte[k] = static_cast<uint8_t>(x.u[k]);
    __m128i r;
    std::memcpy(&r, byte, 16);
    return r;
}

// Pairs of unsigned times signed bytes, whose sum saturates; pairs of words; fours of bytes into 32 bits.
inline Vector maddubs(Vector x, Vector y) {
    return words([&](int k) {
        const int sum = x.b[2 * k] * y.c[2 * k] + x.b[2 * k + 1] * y.c[2 * k + 1];
        return sum > 32767 ? 32767 : sum < -32768 ? -32768 : sum;
    });
}
inline Vector madd(Vector x, Vector y) {
    return ints([&](int k) { return x.s[2 * k] * y.s[2 * k] + x.s[2 * k + 1] * y.s[2 * k + 1]; });
}
inline Vector dpbusd(Vector sum, Vector x, Vector y) {
    return ints([&](int k) {
        int r = sum.i[k];
        for (int j = 4 * k; j < 4 * k + 4; ++j) r += x.b[j] * y.c[j];
        return r;
    });
}

}  // namespace emulated

#define __m512 emulated::Vector
#define __m512i emulated::Vector
#define _mm512_setzero_si512 emulated::zero
#define _mm512_set1_ps emulated::set_ps
#define _mm512_set1_epi32 emulated::set_epi32
#define _mm512_set1_epi16 emulated::set_epi16
#define _mm512_set1_epi8 emulated::set_epi8
#define _mm512_loadu_ps emulated::load
#define _mm512_load_si512 emulated::load_aligned
#define _mm512_storeu_ps emulated::store
#define _mm512_store_si512 emulated::store_aligned
#define _mm512_castsi512_ps emulated::same
#define _mm512_castps_si512 emulated::same
#define _mm512_add_ps emulated::add_ps
#define _mm512_sub_ps emulated::sub_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_div_ps emulated::div_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps emulated::round_ps
#undef _mm512_permute_ps
#define _mm512_permute_ps emulated::permute_ps
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 emulated::shuffle_f32x4
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_sub_epi32 emulated::sub_epi32
#define _mm512_and_si512 emulated::and_bits
#define _mm512_or_si512 emulated::or_bits
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#undef _mm512_srai_epi32
#define _mm512_srai_epi32 emulated::srai_epi32
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#undef _mm512_alignr_epi32
#define _mm512_alignr_epi32 emulated::alignr_epi32
#define _mm512_mullo_epi32 emulated::mullo_epi32
#define _mm512_mullo_epi16 emulated::mullo_epi16
#define _mm512_mulhi_epu16 emulated::mulhi_epu16
#undef _mm512_slli_epi16
#define _mm512_slli_epi16 emulated::slli_epi16
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_add_epi16 emulated::add_epi16
#define _mm512_cvtps_epi32 emulated::to_ints
#define _mm512_cvtepi32_ps emulated::to_floats
#define _mm512_cvtph_ps emulated::from_halves
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated::to_halves
#define _mm512_cvtepu16_epi32 emulated::from_words
#define _mm512_cvtepi32_epi16 emulated::low_words
#define _mm512_cvtepi32_epi8 emulated::low_bytes
#define _mm512_maddubs_epi16 emulated::maddubs
#define _mm512_madd_epi16 emulated::madd
#define _mm512_dpbusd_epi32 emulated::dpbusd
