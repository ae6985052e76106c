// Declarations that the parts of the kernel share. This file includes no header of torch or of the C++ library, because
// it is compiled once per instruction set: the linker could keep an inline function of a header as built with AVX-512,
// for every other user of that header.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace moeq {

// Order in memory. A block is 16 rows, a panel two blocks; a panel of gate and up has 16 rows of each, so that their
// product needs no second pass; without a gate it has 32 rows of up. A chunk is 32 columns; a segment is up to four
// chunks that share a scale. A panel holds its segments one after the other, and each segment its two blocks. A block
// has 16 scales and 16 zeros if a scale group begins here, then the segment's codes: `bits` vectors of 64 bytes per
// chunk. A vector has 32 bits per row. Byte j of them holds codes of the columns that are j modulo 4, so one byte-wise
// shift and mask gives four consecutive columns of 16 rows.
//
// A trellis has one scale per row and the zero 63.25 (vllm_moeq/format). Its panel begins with the scales of both blocks.
// In a chunk each row has its `bits` words as the file has them; a block's rows are those of a tile.
constexpr int kLanes = 16;
constexpr int kBlocks = 2;
constexpr int kPanelRows = kLanes * kBlocks;
constexpr int kChunk = 32;
constexpr int kSteps = kChunk / 4;
constexpr int kSegmentChunks = 4;
constexpr int kVector = 64;

// The number of an expert's tokens that are multiplied with a panel before the next panel is decoded.
constexpr int kTokensAtOnce = 64;

// A trellis' code is an eighth of the sum of the bytes of state · kTrellisFactor, in 32 bits.
constexpr uint32_t kTrellisFactor = 0x83dcd12d;
constexpr float kTrellisZero = 63.25f;

enum Scheme : int64_t { kGrid = 0, kTrellis = 1 };

// How an expert's weights are coded.
struct Coding {
    int64_t bits, scheme;
};

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

struct Segment {
    int32_t chunk;   // index of the first chunk
    int32_t chunks;  // 1 to kSegmentChunks
    int32_t group;   // index of the scale group
    int32_t fresh;   // 1 if the group begins here
};

// The experts of one projection.
struct Matrices {
    const uint8_t* data;
    const int64_t* offsets;  // first byte of each expert
    int64_t stride;          // elements from one offset to the next
    const Segment* segments;
    int32_t num_segments;
    int32_t panels;
    int32_t columns;
    int32_t groups;
    int32_t wide;  // 1: scales and zeros are float32, not float16
    const float* bias;  // [experts, panels, kPanelRows] in the order of the panels' rows, or null
};

inline const float* bias_of(const Matrices& m, int64_t expert, int64_t panel) {
    return m.bias ? m.bias + (expert * m.panels + panel) * kPanelRows : nullptr;
}

// The functions of vllm_moeq/kernels/activations.py, in its order.
enum Function : int32_t { kSilu = 0, kGeluTanh = 1, kRelu2 = 2 };

// What is computed between the projections: function(min(gate, limit)) · (clamp(up, −limit, limit) + beta), and without
// a gate function(up). Without bounds limit and beta are not read.
struct Activation {
    int32_t function, gated, bounded;
    float alpha, limit, beta;
};

inline int64_t header_bytes(const Matrices& m) { return m.wide ? 2 * kVector : kVector; }

inline int64_t panel_bytes(const Matrices& m, Coding coding) {
    const int64_t headers = coding.scheme == kTrellis ? header_bytes(m) : kBlocks * m.groups * header_bytes(m);
    return headers + kBlocks * (m.columns / kChunk * coding.bits * kVector);
}

// Activations as fixed-point numbers: a power of two per row and segment, and signed digits of base 128 with magnitudes
// up to 64. The layout of `digits` is [segment][row][chunk][digit][32], so that the rows of one expert lie together.
struct Planes {
    int8_t* digits;
    float* scale;  // [segment][row]
    float* sum;    // [segment][row], sums of the integers
    int64_t rows;
};

// The activations' rotation in blocks of `size` columns. The factors hold, per column, its sign times size^(−1/2).
struct Rotation {
    const float* factors;
    int32_t size;  // 0: none
};

struct Active {
    int32_t expert;
    int32_t first;  // index of its first pair; pairs are sorted by expert
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
    Activation activation;
    const int64_t* codings;  // expert e has a width at codings[e · codings_stride], then a scheme
    int64_t codings_stride;
    const Active* active;
    int32_t num_active;
    const int32_t* token;  // each pair's token; pairs are sorted by expert
    const float* weight;   // each pair's routing weight
    const int32_t* pair;   // 0 … pairs − 1: the rows of `hidden_planes` in use
    Planes x_planes, hidden_planes;
    Rotation before_up, before_down;
    float* rotated;  // [tokens, hidden], if x is rotated
    float* inner;    // [pairs, intermediate]: down's inputs
    float* sums;     // [tokens, padded hidden]
    const Item* items;
    int32_t num_items;
    int32_t down_panels;  // panels per item of down
    int32_t next_gate_up, next_down;
};

inline Coding coding_of(const Call& call, int64_t expert) {
    const int64_t* numbers = call.codings + expert * call.codings_stride;
    return {numbers[0], numbers[1]};
}

// One matrix times all tokens.
struct LinearCall {
    const void* x;
    void* out;
    int32_t dtype;
    int32_t digits;
    int64_t tokens, rows, bits;
    Matrices weights;      // a single matrix
    const int32_t* token;  // 0 … tokens − 1
    Planes planes;
    int32_t panels;  // panels per item
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
