#include <algorithm>
#include <cstring>

#include "host.h"

namespace moeq {
namespace {

// Exchanges the index bits LOW < HIGH of the elements, which have BITS bits each.
template <int BITS, int LOW, int HIGH>
uint32_t exchange(uint32_t x) {
    constexpr int distance = ((1 << HIGH) - (1 << LOW)) * BITS;
    uint32_t mask = 0;
    for (int i = 0; i < 32 / BITS; ++i) {
        if ((i >> LOW & 1) && !(i >> HIGH & 1)) mask |= ((1u << BITS) - 1) << (i * BITS);
    }
    const uint32_t changed = (x >> distance ^ x) & mask;
    return x ^ changed ^ changed << distance;
}

// Each function reorders the codes of consecutive columns, the first in the lowest bits, to the order of core.h: column
// 4·t + j moves to byte j, field t. In the bits of an element's index, t … j becomes j t ….
uint32_t order_ones(uint32_t x) {  // t2 t1 t0 j1 j0 → j1 j0 t2 t1 t0
    x = exchange<1, 0, 2>(x);      // t2 t1 j0 j1 t0
    x = exchange<1, 1, 3>(x);      // t2 j1 j0 t1 t0
    x = exchange<1, 2, 4>(x);      // j0 j1 t2 t1 t0
    return exchange<1, 3, 4>(x);   // j1 j0 t2 t1 t0
}

uint32_t order_twos(uint32_t x) { return exchange<2, 1, 3>(exchange<2, 0, 2>(x)); }

uint32_t order_fours(uint32_t x) { return exchange<4, 1, 2>(exchange<4, 0, 2>(x)); }

// The place of a 3-bit code in the three words of decode.h: the word and the lowest bit. Two of eight codes are split;
// their third bit lies in the last word at `third`.
struct Field {
    int word, shift, third;
};
constexpr Field kThrees[kSteps] = {{0, 0, 0}, {0, 3, 0}, {0, 6, 6}, {1, 0, 0}, {1, 3, 0}, {1, 6, 7}, {2, 0, 0}, {2, 3, 0}};

void order_threes(const uint32_t* words, uint32_t* ordered) {
    ordered[0] = ordered[1] = ordered[2] = 0;
    for (int k = 0; k < kChunk; ++k) {
        const int word = 3 * k / 32, shift = 3 * k % 32;
        uint32_t code = words[word] >> shift & 7;
        if (shift > 29) code |= words[word + 1] << (32 - shift) & 7;
        const Field field = kThrees[k / 4];
        const int byte = 8 * (k % 4);
        ordered[field.word] |= (field.third ? code & 3 : code) << (byte + field.shift);
        if (field.third) ordered[2] |= code >> 2 << (byte + field.third);
    }
}

// Writes one row's codes of a chunk into the row's lane of `bits` vectors.
void repack_chunk(const uint32_t* words, Coding coding, int lane, uint8_t* target) {
    uint32_t ordered[8];
    const int64_t bits = coding.bits;
    if (coding.scheme == kGrid && bits == 3) {
        order_threes(words, ordered);
        words = ordered;
    } else if (coding.scheme == kGrid && bits < 8) {
        const auto order = bits == 1 ? order_ones : bits == 2 ? order_twos : order_fours;
        for (int64_t w = 0; w < bits; ++w) ordered[w] = order(words[w]);
        words = ordered;
    }
    for (int64_t w = 0; w < bits; ++w) std::memcpy(target + w * kVector + 4 * lane, words + w, 4);
}

// The rows of a block: the first, and how many of its lanes have one.
struct Block {
    int64_t first;
    int lanes;
};

Block block_of(const Source& source, int64_t panel, int block) {
    const int64_t half = source.gated ? source.rows / 2 : source.rows;
    const int64_t first = source.gated ? panel * kLanes : panel * kPanelRows + block * kLanes;
    const int64_t lanes = std::clamp<int64_t>(half - first, 0, kLanes);
    return {first + (source.gated ? block * half : 0), static_cast<int>(lanes)};
}

// Writes the values [rows, groups] of a block's rows into a vector of items, which is zeros before.
void repack_values(const void* values, const Source& source, Block block, int64_t group, uint8_t* target) {
    const int64_t item = source.wide ? 4 : 2;
    for (int lane = 0; lane < block.lanes; ++lane) {
        const int64_t place = (block.first + lane) * source.groups + group;
        std::memcpy(target + lane * item, static_cast<const char*>(values) + place * item, item);
    }
}

}  // namespace

void repack_panel(const Source& source, const Matrices& m, int64_t panel, uint8_t* target) {
    const Coding coding = source.coding;
    const int64_t words = source.columns / kChunk * coding.bits, vector = header_bytes(m) / 2;
    std::memset(target, 0, static_cast<size_t>(panel_bytes(m, coding)));
    if (coding.scheme == kTrellis) {
        for (int block = 0; block < kBlocks; ++block, target += vector) {
            repack_values(source.scales, source, block_of(source, panel, block), 0, target);
        }
    }
    for (int s = 0; s < m.num_segments; ++s) {
        const Segment segment = m.segments[s];
        for (int b = 0; b < kBlocks; ++b) {
            const Block block = block_of(source, panel, b);
            if (coding.scheme == kGrid && segment.fresh) {
                repack_values(source.scales, source, block, segment.group, target);
                repack_values(source.zeros, source, block, segment.group, target + vector);
                target += header_bytes(m);
            }
            for (int64_t c = segment.chunk; c < segment.chunk + segment.chunks; ++c, target += coding.bits * kVector) {
                for (int lane = 0; lane < block.lanes; ++lane) {
                    repack_chunk(source.words + (block.first + lane) * words + c * coding.bits, coding, lane, target);
                }
            }
        }
    }
}

}  // namespace moeq
