// The parts that do not depend on the instruction set: order in memory, routing, the choice of a kernel.
#pragma once

#include <string>
#include <vector>

#include "core.h"
#include "encode_call.h"

namespace moeq {

// Returns the segments of `columns` columns; the first column lies `offset` columns behind the beginning of its group.
std::vector<Segment> make_segments(int64_t columns, int64_t group_size, int64_t offset);

// One projection of one expert as loaded: rows of packed words, scales and zeros [rows, groups]. A trellis has one group
// and no zeros.
struct Source {
    const uint32_t* words;
    const void* scales;
    const void* zeros;
    int64_t rows, columns, groups;
    Coding coding;
    bool wide;   // scales and zeros are float32
    bool gated;  // rows are gate's, then up's
};

int64_t panels_of(int64_t rows, bool gated);

// Writes one panel of panel_bytes to `target`, in m's segments; rows beyond the last become zeros.
void repack_panel(const Source& source, const Matrices& m, int64_t panel, uint8_t* target);

// Pairs of tokens and experts, sorted by expert.
struct Routing {
    std::vector<Active> active;
    std::vector<int32_t> token, pair;
    std::vector<float> weight;
};

// Throws std::out_of_range if an index is not below `experts`; negative indices are skipped.
Routing sort_pairs(const int32_t* ids, const float* weights, int64_t tokens, int64_t top_k, int64_t experts);

// Cuts gate and up into items of about equal cost, about eight per thread.
std::vector<Item> make_items(const Call& call, int threads);

struct Kernel {
    std::string name;
    Run run;
    RunLinear linear;
    Encode encode;
};

// Returns the kernels that this processor runs, the slowest first.
std::vector<Kernel> kernels();

}  // namespace moeq
