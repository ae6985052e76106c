// Thirty-two unsigned 16-bit lanes in plain C++: the meaning of the operations that the other headers have, too.
#pragma once

#include <stdint.h>

namespace moeq {
namespace {

constexpr int kShorts = 32;

struct Shorts {
    uint16_t lane[kShorts];
};

inline Shorts splat_short(uint16_t v) {
    Shorts r;
    for (int i = 0; i < kShorts; ++i) r.lane[i] = v;
    return r;
}
inline Shorts load_shorts(const uint16_t* p) {
    Shorts r;
    for (int i = 0; i < kShorts; ++i) r.lane[i] = p[i];
    return r;
}
inline void store_shorts(uint16_t* p, const Shorts& v) {
    for (int i = 0; i < kShorts; ++i) p[i] = v.lane[i];
}
// Reads 32 >> B numbers and repeats each 2^B times; 64 bytes behind p must be readable.
template <int B>
inline Shorts spread(const uint16_t* p) {
    Shorts r;
    for (int i = 0; i < kShorts; ++i) r.lane[i] = p[i >> B];
    return r;
}
inline Shorts minimum(const Shorts& x, const Shorts& y) {
    Shorts r;
    for (int i = 0; i < kShorts; ++i) r.lane[i] = x.lane[i] < y.lane[i] ? x.lane[i] : y.lane[i];
    return r;
}
// Bit i is 1 where lane i of `least`, which is the minimum of x and another vector, is not x.
inline uint32_t other(const Shorts& least, const Shorts& x) {
    uint32_t mask = 0;
    for (int i = 0; i < kShorts; ++i) mask |= static_cast<uint32_t>(least.lane[i] != x.lane[i]) << i;
    return mask;
}
inline Shorts operator-(const Shorts& x, const Shorts& y) {
    Shorts r;
    for (int i = 0; i < kShorts; ++i) r.lane[i] = static_cast<uint16_t>(x.lane[i] - y.lane[i]);
    return r;
}
inline Shorts squared(const Shorts& x) {  // modulo 2^16
    Shorts r;
    for (int i = 0; i < kShorts; ++i) r.lane[i] = static_cast<uint16_t>(static_cast<uint32_t>(x.lane[i]) * x.lane[i]);
    return r;
}
inline Shorts add_saturated(const Shorts& x, const Shorts& y) {
    Shorts r;
    for (int i = 0; i < kShorts; ++i) {
        const uint32_t sum = static_cast<uint32_t>(x.lane[i]) + y.lane[i];
        r.lane[i] = static_cast<uint16_t>(sum > 65535 ? 65535 : sum);
    }
    return r;
}
inline uint16_t smallest(const Shorts& x) {
    uint16_t r = x.lane[0];
    for (int i = 1; i < kShorts; ++i) r = x.lane[i] < r ? x.lane[i] : r;
    return r;
}

}  // namespace
}  // namespace moeq
