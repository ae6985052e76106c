#include "host.h"

#include <algorithm>
#include <stdexcept>

namespace moeq {

std::vector<Segment> make_segments(int64_t columns, int64_t group_size, int64_t offset) {
    std::vector<Segment> segments;
    int64_t column = 0;
    while (column < columns) {
        const int64_t group = (offset + column) / group_size;
        const int64_t end = std::min({columns, (group + 1) * group_size - offset, column + kChunk * kSegmentChunks});
        const bool fresh = segments.empty() || segments.back().group != group;
        segments.push_back({static_cast<int32_t>(column / kChunk), static_cast<int32_t>((end - column) / kChunk),
                            static_cast<int32_t>(group), fresh});
        column = end;
    }
    return segments;
}

int64_t panels_of(int64_t rows, bool gated) {
    return gated ? (rows / 2 + kLanes - 1) / kLanes : (rows + kPanelRows - 1) / kPanelRows;
}

Routing sort_pairs(const int32_t* ids, const float* weights, int64_t tokens, int64_t top_k, int64_t experts) {
    std::vector<int32_t> next(experts + 1, 0);
    for (int64_t i = 0; i < tokens * top_k; ++i) {
        if (ids[i] >= experts) throw std::out_of_range("an expert's index is not below the number of experts");
        if (ids[i] >= 0) ++next[ids[i] + 1];
    }
    Routing routing;
    for (int64_t e = 0; e < experts; ++e) {
        if (next[e + 1]) routing.active.push_back({static_cast<int32_t>(e), next[e], next[e + 1]});
        next[e + 1] += next[e];
    }
    const int32_t pairs = next[experts];
    routing.token.resize(pairs);
    routing.weight.resize(pairs);
    routing.pair.resize(pairs);
    for (int64_t i = 0; i < tokens * top_k; ++i) {
        if (ids[i] < 0) continue;
        const int32_t place = next[ids[i]]++;
        routing.token[place] = static_cast<int32_t>(i / top_k);
        routing.weight[place] = weights[i];
    }
    for (int32_t i = 0; i < pairs; ++i) routing.pair[i] = i;
    return routing;
}

std::vector<Item> make_items(const Call& call, int threads) {
    const auto cost = [&](const Active& active) {
        // Each bit of width costs reading and decoding; measured, a token costs about as much as a bit, and decoding a
        // trellis as much as five, whatever its width.
        const Coding coding = coding_of(call, active.expert);
        return (coding.scheme == kTrellis ? 5 : coding.bits) + active.count;
    };
    const int64_t panels = call.gate_up.panels;
    int64_t total = 0;
    for (int a = 0; a < call.num_active; ++a) total += panels * cost(call.active[a]);
    const int64_t share = total / (8 * threads) + 1;
    std::vector<Item> items;
    for (int a = 0; a < call.num_active; ++a) {
        const int64_t together = std::clamp<int64_t>(share / cost(call.active[a]), 1, panels);
        for (int64_t p = 0; p < panels; p += together) {
            items.push_back({a, static_cast<int32_t>(p), static_cast<int32_t>(std::min(together, panels - p))});
        }
    }
    return items;
}

std::vector<Kernel> kernels() {
    std::vector<Kernel> found = {{"scalar", run_scalar, run_linear_scalar, encode_scalar}};
#ifdef __x86_64__
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2) found.push_back({"avx2", run_avx2, run_linear_avx2, encode_avx2});
    if (avx512) found.push_back({"avx512", run_avx512, run_linear_avx512, encode_avx512});
    if (avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back({"vnni", run_vnni, run_linear_vnni, encode_avx512});
#endif
    return found;
}

}  // namespace moeq
