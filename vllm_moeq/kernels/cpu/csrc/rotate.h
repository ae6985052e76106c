// Rotates activations: signs, then Hadamard matrices over blocks of columns (docs/format.md).
#pragma once

namespace moeq {
namespace {

// −1 in the lanes whose index has the bit 1, 2, 4 or 8.
alignas(64) constexpr float kLaneSigns[4][kLanes] = {
    {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
    {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
    {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
    {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1},
};

// Products with ±1 are exact, so every instruction set gets the same bits.
template <int BIT>
MOEQ_INLINE Floats add_lanes(Floats x) {
    return multiply_add(x, load(kLaneSigns[BIT]), swapped<1 << BIT>(x));
}

// Writes the rotated block: the stages within vectors of 16, then those between them.
template <int DTYPE>
void rotate_block(const void* x, int64_t first, const float* factors, int size, float* out) {
    for (int i = 0; i < size; i += kLanes) {
        const Floats v = load_as<DTYPE>(x, first + i) * load(factors + i);
        store(out + i, add_lanes<3>(add_lanes<2>(add_lanes<1>(add_lanes<0>(v)))));
    }
    for (int half = kLanes; half < size; half *= 2) {
        for (int begin = 0; begin < size; begin += 2 * half) {
            for (int i = begin; i < begin + half; i += kLanes) {
                const Floats a = load(out + i), b = load(out + i + half);
                store(out + i, a + b);
                store(out + i + half, a - b);
            }
        }
    }
}

// Rotates rows of `columns` values; `out` may be x itself. Threads share blocks evenly, as there may be only one row.
template <int DTYPE>
void rotate_part(const void* x, const Rotation& rotation, int64_t rows, int64_t columns, float* out, int thread,
                 int threads) {
    const int64_t work = rows * (columns / rotation.size), end = work * (thread + 1) / threads;
    for (int64_t i = work * thread / threads; i < end; ++i) {
        const int64_t first = i * rotation.size;
        rotate_block<DTYPE>(x, first, rotation.factors + first % columns, rotation.size, out + first);
    }
}

inline void rotate(const void* x, int dtype, const Rotation& rotation, int64_t rows, int64_t columns, float* out,
                   int thread, int threads) {
    if (dtype == kFloat32) rotate_part<kFloat32>(x, rotation, rows, columns, out, thread, threads);
    if (dtype == kBfloat16) rotate_part<kBfloat16>(x, rotation, rows, columns, out, thread, threads);
    if (dtype == kFloat16) rotate_part<kFloat16>(x, rotation, rows, columns, out, thread, threads);
}

}  // namespace
}  // namespace moeq
