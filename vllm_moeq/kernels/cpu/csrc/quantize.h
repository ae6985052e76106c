// Converts activations to fixed point, and results to their dtype.
#pragma once

namespace moeq {
namespace {

template <int DTYPE>
MOEQ_INLINE Floats load_as(const void* p, int64_t index) {
    if constexpr (DTYPE == kFloat32) return load(static_cast<const float*>(p) + index);
    if constexpr (DTYPE == kBfloat16) return load_bfloat(static_cast<const uint16_t*>(p) + index);
    return load_half(static_cast<const uint16_t*>(p) + index);
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store_bfloat(uint16_t* p, Floats x) {
    const Ints bits = as_ints(x);
    const Ints odd = shift_right<16>(bits) & splat_int(1);
    const Ints rounded = shift_right<16>(bits + splat_int(0x7fff) + odd);
    store_low_words(p, rounded & splat_int(0xffff));
    float lane[kLanes];
    store(lane, x);
    for (int i = 0; i < kLanes; ++i) {
        if (lane[i] != lane[i]) p[i] = 0x7fc0;
    }
}

template <int DTYPE>
MOEQ_INLINE void store_as(void* p, int64_t index, Floats x) {
    if constexpr (DTYPE == kFloat32) store(static_cast<float*>(p) + index, x);
    if constexpr (DTYPE == kBfloat16) store_bfloat(static_cast<uint16_t*>(p) + index, x);
    if constexpr (DTYPE == kFloat16) store_half(static_cast<uint16_t*>(p) + index, x);
}

// Stores the first `count` floats of `from`, which is padded to a whole vector.
template <int DTYPE>
MOEQ_INLINE void store_columns(void* out, int64_t first, const float* from, int64_t count) {
    constexpr size_t item = DTYPE == kFloat32 ? 4 : 2;
    int64_t c = 0;
    for (; c + kLanes <= count; c += kLanes) store_as<DTYPE>(out, first + c, load(from + c));
    if (c < count) {
        float tail[kLanes];
        store_as<DTYPE>(tail, 0, load(from + c));
        __builtin_memcpy(static_cast<char*>(out) + (first + c) * item, tail, static_cast<size_t>(count - c) * item);
    }
}

inline float power_of_two(int exponent) {  // the result must be a normal number
    const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
    float r;
    __builtin_memcpy(&r, &bits, 4);
    return r;
}

// Returns the smallest e >= −97 with v <= 2^e; v is positive and finite. So 2^±(e − 28) are normal numbers.
inline int exponent_above(float v) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    const int e = static_cast<int>(bits >> 23) - 127 + ((bits & 0x7fffffu) != 0);
    return e < -97 ? -97 : e;
}

// Splits integers of magnitudes up to 64 · 128^(DIGITS − 1) into digits from −64 to 64, the highest digit first.
template <int DIGITS>
MOEQ_INLINE void store_digits(int8_t* p, Ints value) {
#pragma GCC unroll 4
    for (int d = DIGITS - 1; d > 0; --d) {
        const Ints digit = ((value + splat_int(64)) & splat_int(127)) - splat_int(64);
        store_bytes(p + d * kChunk, digit);
        value = shift_right<7>(value - digit);
    }
    store_bytes(p, value);
}

// Quantizes one segment of one row. Scales are powers of two, so values with few mantissa bits stay exact: with two
// digits, every bfloat16 down to 1/64 of the largest. A segment with an infinity or NaN makes its row's results NaN.
template <int DTYPE, int DIGITS>
void quantize_segment(const void* x, int64_t first, int chunks, int8_t* digits, float* scale, float* sum) {
    Floats largest = splat(0.0f), bad = splat(0.0f);
    for (int i = 0; i < chunks * kChunk; i += kLanes) {
        const Floats v = load_as<DTYPE>(x, first + i);
        largest = maximum(maximum(v, splat(0.0f) - v), largest);
        bad = multiply_add(v, splat(0.0f), bad);
    }
    float lanes[kLanes], worst[kLanes];
    store(lanes, largest);
    store(worst, bad);
    float top = 0.0f, broken = 0.0f;
    for (int i = 0; i < kLanes; ++i) {
        top = lanes[i] > top ? lanes[i] : top;
        broken += worst[i];
    }
    if (broken != 0.0f || top == 0.0f) {  // zero times an infinity is NaN, and NaN != 0
        __builtin_memset(digits, 0, static_cast<size_t>(chunks) * kChunk * DIGITS);
        *scale = broken;
        *sum = 0.0f;
        return;
    }
    const int exponent = exponent_above(top) - (7 * DIGITS - 1);
    const Floats up = splat(power_of_two(-exponent));
    Floats total = splat(0.0f);
    for (int i = 0; i < chunks * kChunk; i += kLanes) {
        const Floats v = nearest(load_as<DTYPE>(x, first + i) * up);
        total = total + v;
        store_digits<DIGITS>(digits + (i / kChunk) * kChunk * DIGITS + i % kChunk, to_ints(v));
    }
    store(lanes, total);
    float added = 0.0f;
    for (int i = 0; i < kLanes; ++i) added += lanes[i];
    *scale = power_of_two(exponent);
    *sum = added;
}

// Threads share pairs of segment and row evenly, because there may be only one row.
template <int DTYPE, int DIGITS>
void quantize_part(const void* x, const Matrices& m, const Planes& planes, int thread, int threads) {
    const int64_t work = planes.rows * m.num_segments;
    const int64_t end = work * (thread + 1) / threads;
    for (int64_t i = work * thread / threads; i < end; ++i) {
        const int64_t s = i / planes.rows, row = i % planes.rows;
        const Segment segment = m.segments[s];
        const int64_t before = static_cast<int64_t>(segment.chunk) * kChunk * DIGITS * planes.rows;
        quantize_segment<DTYPE, DIGITS>(x, row * m.columns + segment.chunk * kChunk, segment.chunks,
                                        planes.digits + before + row * segment.chunks * kChunk * DIGITS,
                                        planes.scale + i, planes.sum + i);
    }
}

template <int DIGITS>
void quantize(const void* x, int dtype, const Matrices& m, const Planes& planes, int thread, int threads) {
    if (dtype == kFloat32) quantize_part<kFloat32, DIGITS>(x, m, planes, thread, threads);
    if (dtype == kBfloat16) quantize_part<kBfloat16, DIGITS>(x, m, planes, thread, threads);
    if (dtype == kFloat16) quantize_part<kFloat16, DIGITS>(x, m, planes, thread, threads);
}

}  // namespace
}  // namespace moeq
