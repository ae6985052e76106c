// Random layers and linears through the kernel without torch, in buffers of exactly the needed size: built with sanitizers, it shows
// accesses outside of them. Prints what went wrong and exits with 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "host.h"

namespace {

using namespace moeq;

std::mt19937 generator(1);

int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float normal() { return std::normal_distribution<float>()(generator); }

// Memory aligned as torch's, and not a byte longer than asked for.
template <class T>
struct Exact {
    explicit Exact(int64_t count) : memory(nullptr) {
        const size_t bytes = count ? count * sizeof(T) : 1;
        if (posix_memalign(reinterpret_cast<void**>(&memory), 64, bytes)) std::abort();
        std::memset(memory, 0xff, bytes);
    }
    ~Exact() { std::free(memory); }
    Exact(const Exact&) = delete;
    T* memory;
};

struct Error {
    double wrong = 0, size = 1e-30;
    void add(double found, double expected) {
        wrong += (found - expected) * (found - expected);
        size += expected * expected;
    }
    double relative() const { return std::sqrt(wrong / size); }
};

struct Projection {
    int64_t rows, columns, group_size, offset;
    bool gated;
    std::vector<Segment> segments;
    std::vector<std::vector<double>> dense;  // per expert [rows, columns]
    std::unique_ptr<Exact<uint8_t>> data;
    std::vector<Coding> codings;
    std::vector<int64_t> first;
    std::unique_ptr<Exact<float>> biases;
    Matrices matrices{};

    Projection(int64_t r, int64_t c, int64_t g, int64_t o, bool is_gated, const std::vector<Coding>& all)
        : rows(r), columns(c), group_size(g), offset(o), gated(is_gated), segments(make_segments(c, g, o)), codings(all) {
        matrices.columns = static_cast<int32_t>(columns);
        matrices.groups = segments.back().group + 1;
        matrices.wide = 1;
        matrices.panels = static_cast<int32_t>(panels_of(rows, gated));
        matrices.segments = segments.data();
        matrices.num_segments = static_cast<int32_t>(segments.size());
        int64_t total = 0;
        for (const Coding& coding : codings) {
            first.push_back(total);
            total += matrices.panels * panel_bytes(matrices, coding);
        }
        data = std::make_unique<Exact<uint8_t>>(total);
        for (size_t e = 0; e < codings.size(); ++e) fill(codings[e], data->memory + first[e]);
        matrices.data = data->memory;
        matrices.offsets = first.data();
        matrices.stride = 1;
        if (pick(0, 1)) {
            biases = std::make_unique<Exact<float>>(codings.size() * matrices.panels * kPanelRows);
            for (size_t i = 0; i < codings.size() * matrices.panels * kPanelRows; ++i) biases->memory[i] = normal();
            matrices.bias = biases->memory;
        }
    }

    // The bias of a row, found in the order of the panels.
    double bias(int64_t expert, int64_t row) const {
        if (!biases) return 0;
        const int64_t half = gated ? rows / 2 : rows, lanes = gated ? kLanes : kPanelRows, inside = row % half;
        return bias_of(matrices, expert, inside / lanes)[row / half * kLanes + inside % lanes];
    }

    void fill(Coding coding, uint8_t* target) {
        const int64_t bits = coding.bits, groups = coding.scheme == kTrellis ? 1 : matrices.groups;
        const float step = coding.scheme == kTrellis ? 1.0f / 18 : 1.0f / static_cast<float>(1 << bits);
        Exact<uint32_t> words(rows * columns / 32 * bits);
        Exact<float> scales(rows * groups), zeros(rows * groups);
        for (int64_t i = 0; i < rows * columns / 32 * bits; ++i) words.memory[i] = static_cast<uint32_t>(generator());
        for (int64_t i = 0; i < rows * groups; ++i) {
            scales.memory[i] = (1 + 0.1f * normal()) * step / std::sqrt(static_cast<float>(columns));
            zeros.memory[i] = 0.5f * static_cast<float>((1 << bits) - 1) + 0.1f * normal();
            if (coding.scheme == kTrellis) zeros.memory[i] = kTrellisZero;
        }
        const Source source = {words.memory, scales.memory, zeros.memory, rows, columns, groups, coding, true, gated};
        for (int64_t p = 0; p < matrices.panels; ++p) {
            repack_panel(source, matrices, p, target + p * panel_bytes(matrices, coding));
        }
        std::vector<double> values(rows * columns);
        for (int64_t i = 0; i < rows * columns; ++i) {
            const int64_t row = i / columns, column = i % columns;
            const int64_t place = row * groups + (coding.scheme == kTrellis ? 0 : (offset + column) / group_size);
            const uint32_t code = coding.scheme == kTrellis ? trellis_code(words.memory, row, column, bits)
                                                            : field(words.memory, i * bits, bits);
            values[i] = (static_cast<double>(code) - zeros.memory[place]) * scales.memory[place];
        }
        dense.push_back(std::move(values));
    }

    static uint32_t field(const uint32_t* words, int64_t first, int64_t bits) {
        uint32_t value = 0;
        for (int64_t b = 0; b < bits; ++b) value |= (words[(first + b) / 32] >> ((first + b) % 32) & 1u) << b;
        return value;
    }

    // The twelve bits of the tile's ring that end with the weight's own, one by one.
    uint32_t trellis_code(const uint32_t* words, int64_t row, int64_t column, int64_t bits) const {
        const int64_t ring = 256 * bits, end = (row % 16 * 16 + column % 16 + 1) * bits;
        uint32_t state = 0;
        for (int64_t j = 0; j < 12; ++j) {
            const int64_t bit = (end - 12 + j + ring) % ring, line = row / 16 * 16 + bit / (16 * bits);
            state |= field(words, line * columns * bits + column / 16 * 16 * bits + bit % (16 * bits), 1) << j;
        }
        const uint32_t p = state * kTrellisFactor;
        return ((p & 255) + (p >> 8 & 255) + (p >> 16 & 255) + (p >> 24)) >> 3;
    }
};

// A random rotation, in a buffer of exactly its size.
struct Rotated {
    Exact<float> factors;
    Rotation rotation;

    explicit Rotated(int64_t columns) : factors(columns), rotation{factors.memory, 0} {
        constexpr int32_t sizes[] = {0, 16, 32, 64};
        rotation.size = sizes[pick(0, 3)];
        if (!rotation.size || columns % rotation.size) rotation.size = 0;
        for (int64_t c = 0; c < columns; ++c) {
            factors.memory[c] = (pick(0, 1) ? 1.0f : -1.0f) / std::sqrt(static_cast<float>(rotation.size));
        }
    }

    // Row by row of the Hadamard matrix.
    std::vector<double> of(const std::vector<double>& x) const {
        if (!rotation.size) return x;
        std::vector<double> result(x.size());
        for (size_t i = 0; i < x.size(); ++i) {
            const size_t size = rotation.size, first = i / size * size;
            for (size_t j = first; j < first + size; ++j) {
                const int parity = __builtin_popcountll((i - first) & (j - first)) & 1;
                result[i] += (parity ? -1 : 1) * factors.memory[j] * x[j];
            }
        }
        return result;
    }
};

Activation random_activation() {
    const int32_t function = static_cast<int32_t>(pick(0, 2)), gated = static_cast<int32_t>(pick(0, 1));
    return {function, gated, static_cast<int32_t>(pick(0, 1)), 1.7f, 0.7f, 1.0f};
}

double activated(const Activation& does, double x) {
    if (does.function == kSilu) return x / (1 + std::exp(-does.alpha * x));
    if (does.function == kGeluTanh) return x / 2 * (1 + std::tanh(std::sqrt(M_2_PI) * (x + 0.044715 * x * x * x)));
    return x > 0 ? x * x : 0;
}

double activated(const Activation& does, double gate, double up) {
    if (!does.bounded) return activated(does, gate) * up;
    const double limit = does.limit;
    return activated(does, std::min(gate, limit)) * (std::max(-limit, std::min(up, limit)) + does.beta);
}

// The first projection, the activation, then down, in double, for one token and expert.
void add_expected(const Projection& up, const Projection& down, const Activation& does, int64_t expert,
                  const std::vector<double>& x, const Rotated& before_down, float weight, double* out) {
    const int64_t inner = down.columns;
    std::vector<double> both(up.rows), hidden(inner);
    for (int64_t r = 0; r < up.rows; ++r) {
        both[r] = up.bias(expert, r);
        for (int64_t c = 0; c < up.columns; ++c) both[r] += up.dense[expert][r * up.columns + c] * x[c];
    }
    for (int64_t r = 0; r < inner; ++r) {
        hidden[r] = does.gated ? activated(does, both[r], both[inner + r]) : activated(does, both[r]);
    }
    hidden = before_down.of(hidden);
    for (int64_t r = 0; r < down.rows; ++r) {
        out[r] += weight * down.bias(expert, r);
        for (int64_t c = 0; c < inner; ++c) out[r] += weight * down.dense[expert][r * inner + c] * hidden[c];
    }
}

double error_of_one_layer(const Kernel& kernel, int32_t digits) {
    const int64_t hidden = 32 * pick(1, 6), inner = 32 * pick(1, 5), experts = pick(1, 4), group = 32 * pick(1, 5);
    const int64_t tokens = pick(1, 12), top_k = pick(1, experts);
    constexpr Coding all[] = {{1, kGrid}, {2, kGrid}, {3, kGrid}, {4, kGrid}, {8, kGrid},
                              {1, kTrellis}, {2, kTrellis}, {3, kTrellis}, {4, kTrellis}};
    std::vector<Coding> codings;
    for (int64_t e = 0; e < experts; ++e) codings.push_back(all[pick(0, 8)]);
    const Activation does = random_activation();
    const Projection up(does.gated ? 2 * inner : inner, hidden, group, 0, does.gated, codings);
    const Projection down(hidden, inner, group, 32 * pick(0, group / 32 - 1), false, codings);
    std::vector<int32_t> ids(tokens * top_k);
    std::vector<float> weights(tokens * top_k);
    for (auto& id : ids) id = static_cast<int32_t>(pick(-1, experts - 1));
    for (auto& weight : weights) weight = 0.5f + 0.1f * normal();
    Exact<float> x(tokens * hidden), out(tokens * hidden);
    for (int64_t i = 0; i < tokens * hidden; ++i) x.memory[i] = normal();

    const Routing routing = sort_pairs(ids.data(), weights.data(), tokens, top_k, experts);
    const int64_t pairs = static_cast<int64_t>(routing.pair.size());
    Exact<int8_t> x_digits(tokens * hidden * digits), inner_digits(pairs * inner * digits);
    Exact<float> x_scale(tokens * up.segments.size()), x_sum(tokens * up.segments.size());
    Exact<float> inner_scale(pairs * down.segments.size()), inner_sum(pairs * down.segments.size());
    const Rotated before_up(hidden), before_down(inner);
    Exact<float> rotated(tokens * hidden), activated(pairs * inner), sums(tokens * down.matrices.panels * kPanelRows);
    Call call{};
    call.x = x.memory;
    call.out = out.memory;
    call.dtype = kFloat32;
    call.digits = digits;
    call.tokens = tokens;
    call.hidden = hidden;
    call.intermediate = inner;
    call.pairs = pairs;
    call.gate_up = up.matrices;
    call.down = down.matrices;
    call.activation = does;
    call.codings = &codings[0].bits;
    call.codings_stride = 2;
    call.active = routing.active.data();
    call.num_active = static_cast<int32_t>(routing.active.size());
    call.token = routing.token.data();
    call.weight = routing.weight.data();
    call.pair = routing.pair.data();
    call.x_planes = {x_digits.memory, x_scale.memory, x_sum.memory, tokens};
    call.hidden_planes = {inner_digits.memory, inner_scale.memory, inner_sum.memory, pairs};
    call.before_up = before_up.rotation;
    call.before_down = before_down.rotation;
    call.rotated = rotated.memory;
    call.inner = activated.memory;
    call.sums = sums.memory;
    const std::vector<Item> items = make_items(call, 3);
    call.items = items.data();
    call.num_items = static_cast<int32_t>(items.size());
    call.down_panels = static_cast<int32_t>(pick(1, 3));
    kernel.run(&call, 0, 1);

    Error error;
    for (int64_t t = 0; t < tokens; ++t) {
        std::vector<double> expected(hidden);
        const std::vector<double> input = before_up.of({x.memory + t * hidden, x.memory + (t + 1) * hidden});
        for (int64_t k = 0; k < top_k; ++k) {
            const int64_t i = t * top_k + k;
            if (ids[i] >= 0) add_expected(up, down, does, ids[i], input, before_down, weights[i], expected.data());
        }
        for (int64_t c = 0; c < hidden; ++c) error.add(out.memory[t * hidden + c], expected[c]);
    }
    return error.relative();
}

double error_of_one_linear(const Kernel& kernel, int32_t digits) {
    const int64_t rows = pick(1, 100), columns = 32 * pick(1, 9), tokens = pick(1, 70);
    const Projection matrix(rows, columns, 32 * pick(1, 5), 0, false, {{pick(0, 1) ? 4 : 8, kGrid}});
    Exact<float> x(tokens * columns), out(tokens * rows);
    for (int64_t i = 0; i < tokens * columns; ++i) x.memory[i] = normal();
    Exact<int8_t> planes(tokens * columns * digits);
    Exact<float> scale(tokens * matrix.segments.size()), sum(tokens * matrix.segments.size());
    Exact<int32_t> token(tokens);
    for (int64_t t = 0; t < tokens; ++t) token.memory[t] = static_cast<int32_t>(t);
    LinearCall call{};
    call.x = x.memory;
    call.out = out.memory;
    call.dtype = kFloat32;
    call.digits = digits;
    call.tokens = tokens;
    call.rows = rows;
    call.bits = matrix.codings[0].bits;
    call.weights = matrix.matrices;
    call.token = token.memory;
    call.planes = {planes.memory, scale.memory, sum.memory, tokens};
    call.panels = static_cast<int32_t>(pick(1, 3));
    kernel.linear(&call, 0, 1);

    Error error;
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t r = 0; r < rows; ++r) {
            double expected = 0;
            for (int64_t c = 0; c < columns; ++c) expected += matrix.dense[0][r * columns + c] * x.memory[t * columns + c];
            error.add(out.memory[t * rows + r], expected);
        }
    }
    return error.relative();
}

}  // namespace

int main() {
    const Kernel all[] = {{"scalar", run_scalar, run_linear_scalar},
                          {"avx2", run_avx2, run_linear_avx2},
                          {"avx512", run_avx512, run_linear_avx512},
                          {"vnni", run_vnni, run_linear_vnni}};
    for (const Kernel& kernel : all) {
        for (int i = 0; i < 60; ++i) {
            const int32_t digits = i % 2 ? 2 : 4;
            for (const double error : {error_of_one_layer(kernel, digits), error_of_one_linear(kernel, digits)}) {
                if (error < (digits == 2 ? 2e-3 : 2e-6)) continue;
                std::printf("%s, pair %d, %d digits: relative error %g\n", kernel.name.c_str(), i, digits, error);
                return 1;
            }
        }
        std::printf("%s: 60 layers and linears\n", kernel.name.c_str());
    }
    return 0;
}
