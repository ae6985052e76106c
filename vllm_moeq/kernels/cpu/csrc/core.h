// What the parts of the kernel share. No header of torch or of the C++ library: this file is compiled once per
// instruction set, and an inline function of a header, built with AVX-512, could be the copy that the linker keeps for
// every other user of that header.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace moeq {

// Order in memory. Sixteen rows are a block, two blocks a panel: of gate and up, sixteen rows of each, so that
// silu(gate)·up needs no second pass. Columns come in chunks of 32, and up to four chunks that share a scale are a
// segment. A panel is, segment by segment and block by block: where a scale group begins, 16 scales and 16 zeros; then
// the segment's codes, `bits` vectors of 64 bytes per chunk. A vector has 32 bits per row, and byte j of them holds codes
// of columns that are j modulo 4, so that one byte-wise shift and mask gives four consecutive columns of sixteen rows.
constexpr int kLanes = 16;
constexpr int kBlocks = 2;
constexpr int kPanelRows = kLanes * kBlocks;
constexpr int kChunk = 32;
constexpr int kSteps = kChunk / 4;
constexpr int kSegmentChunks = 4;
constexpr int kVector = 64;

// Tokens of one expert that are multiplied with a panel before the next panel is decoded.
constexpr int kTokensAtOnce = 64;

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

struct Segment {
    int32_t chunk;   // its first
    int32_t chunks;  // 1 to kSegmentChunks
    int32_t group;   // of scales
    int32_t fresh;   // 1 where the group begins
};

// Experts of one projection. `experts` holds for each its width and the first bytes of its panels in both projections.
struct Matrices {
    const uint8_t* data;
    const int64_t* offsets;  // first byte of each expert
    int64_t stride;          // of offsets, in elements
    const Segment* segments;
    int32_t num_segments;
    int32_t panels;
    int32_t columns;
    int32_t groups;
    int32_t wide;  // 1: scales and zeros are float32, not float16
};

inline int64_t header_bytes(const Matrices& m) { return m.wide ? 2 * kVector : kVector; }

inline int64_t panel_bytes(const Matrices& m, int64_t bits) {
    return kBlocks * (m.groups * header_bytes(m) + m.columns / kChunk * bits * kVector);
}

// Activations as fixed-point numbers: per row and segment a power of two, and `digits` signed digits of base 128 with
// magnitudes up to 64. Layout [segment][row][chunk][digit][32], so that the rows of one expert lie together.
struct Planes {
    int8_t* digits;
    float* scale;  // [segment][row]
    float* sum;    // [segment][row], of the integers
    int64_t rows;
};

struct Active {
    int32_t expert;
    int32_t first;  // pair, in the order of experts
    int32_t count;
};

struct Item {
    int32_t active;
    int32_t panel, panels;
};

struct Call {
    const void* x;
    void* out;
    int32_t dtype;
    int32_t digits;
    int64_t tokens, hidden, intermediate, pairs;
    Matrices gate_up, down;
    const int64_t* bits;  // of expert e: bits[e · stride]
    int64_t bits_stride;
    const Active* active;
    int32_t num_active;
    const int32_t* token;  // of each pair, in the order of experts
    const float* weight;   // of each pair
    const int32_t* pair;   // 0 … pairs − 1: the rows of `hidden_planes` in use
    Planes x_planes, hidden_planes;
    float* inner;  // [pairs, intermediate]: silu(gate)·up
    float* sums;   // [tokens, padded hidden]
    const Item* items;
    int32_t num_items;
    int32_t down_panels;  // per item of down
    int32_t next_gate_up, next_down;
};

// One matrix times all tokens.
struct LinearCall {
    const void* x;
    void* out;
    int32_t dtype;
    int32_t digits;
    int64_t tokens, rows, bits;
    Matrices weights;      // of one expert
    const int32_t* token;  // 0 … tokens − 1
    Planes planes;
    int32_t panels;  // per item
    int32_t next;
};

using Run = void (*)(Call*, int thread, int threads);
using RunLinear = void (*)(LinearCall*, int thread, int threads);

void run_scalar(Call* call, int thread, int threads);
void run_avx2(Call* call, int thread, int threads);
void run_avx512(Call* call, int thread, int threads);
void run_vnni(Call* call, int thread, int threads);

void run_linear_scalar(LinearCall* call, int thread, int threads);
void run_linear_avx2(LinearCall* call, int thread, int threads);
void run_linear_avx512(LinearCall* call, int thread, int threads);
void run_linear_vnni(LinearCall* call, int thread, int threads);

}  // namespace moeq
