// The call of an encoder; like core.h it includes nothing of torch or of the C++ library.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace moeq {

struct EncodeCall {
    const float* weights;   // [tiles, 256] in units of codes, finite or not
    uint8_t* own;           // [tiles, 256]
    const uint16_t* codes;  // [4096] twice the code of each state, by the index of encode.h
    void* memory;           // of kEncoderBytes, aligned to 64 bytes; its content does not matter
    int64_t tiles;
    int64_t bits;
};

constexpr size_t kEncoderBytes = size_t{96} << 10;

using Encode = void (*)(const EncodeCall&);

void encode_scalar(const EncodeCall& call);
void encode_avx2(const EncodeCall& call);
void encode_avx512(const EncodeCall& call);

}  // namespace moeq
