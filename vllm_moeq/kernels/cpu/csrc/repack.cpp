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
void repack_chunk(const uint32_t* words, int64_t bits, int lane, uint8_t* target) {
    uint32_t ordered[8];
    if (bits == 3) {
        order_threes(words, ordered);
    } else {
        for (int64_t w = 0; w < bits; ++w) {
            const uint32_t word = words[w];
            ordered[w] = bits == 1 ? order_ones(word) : bits == 2 ? order_twos(word) : bits == 4 ? order_fours(word) : word;
        }
    }
    for (int64_t w = 0; w < bits; ++w) std::memcpy(target + w * kVector + 4 * lane, &ordered[w], 4);
}

}  // namespace

void repack_panel(const Source& source, const std::vector<Segment>& segments, int64_t panel, uint8_t* target) {
    const int64_t words = source.columns / kChunk * source.bits, item = source.wide ? 4 : 2;
    const int64_t half = source.gated ? source.rows / 2 : source.rows;
    for (const Segment& segment : segments) {
        for (int block = 0; block < kBlocks; ++block) {
            const int64_t first = source.gated ? panel * kLanes : panel * kPanelRows + block * kLanes;
            const int64_t bytes = segment.chunks * source.bits * kVector, header = segment.fresh ? 2 * kLanes * item : 0;
            std::memset(target, 0, static_cast<size_t>(header + bytes));
            for (int lane = 0; lane < kLanes && first + lane < half; ++lane) {
                const int64_t row = first + lane + (source.gated ? block * half : 0);
                if (segment.fresh) {
                    const int64_t place = (row * source.groups + segment.group) * item;
                    std::memcpy(target + lane * item, static_cast<const char*>(source.scales) + place, item);
                    std::memcpy(target + (kLanes + lane) * item, static_cast<const char*>(source.zeros) + place, item);
                }
                const uint32_t* from = source.words + row * words + segment.chunk * source.bits;
                for (int64_t c = 0; c < segment.chunks; ++c) {
                    repack_chunk(from + c * source.bits, source.bits, lane, target + header + c * source.bits * kVector);
                }
            }
            target += header + bytes;
        }
    }
}

}  // namespace moeq
